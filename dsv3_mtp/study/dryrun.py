"""What a study would run and what it would cost, without running it."""

from dsv3_mtp.report.progress import columns, duration, quantity
from dsv3_mtp.study.expand import Run, expand, size_of, tokens_of, training_flops
from dsv3_mtp.study.load import LoadedStudy
from dsv3_mtp.study.power import POWER, detectables
from dsv3_mtp.study.tables import power_rows
from dsv3_mtp.study.trends import detectable_lines


def dry_run(loaded: LoadedStudy, *, jobs: int | None) -> str:
    """The matrix of arms, their sizes and budgets, FLOPs and time, forked prefixes counted once.

    An arm with the measured time of another has no budget yet: it is counted with that arm's.
    """
    study, speed = loaded.study, loaded.study.scales[loaded.study.scale].flops_per_s
    runs = {run.name: run for run in expand(loaded, budgets={})}
    rows = [["arm", "parameters", "of these MTP", "tokens", "FLOPs", "forks from", "what"]]
    total = 0.0
    for name, arm in study.arms.items():
        config = loaded.configs[name]
        size, run = size_of(config), runs.get(f"{name}-seed{study.seeds[0]}")
        flops = cost(run) if run else _matched_cost(loaded, name)
        total += flops * len(study.seeds)
        tokens = tokens_of(loaded, name, {})
        parent = "-"
        if run and run.parent:
            parent = f"{run.parent.rpartition('-')[0]} at step {run.fork_step}"
        budget = quantity(tokens) if tokens else f"time of {arm.match.arm if arm.match else ''}"
        counts = [quantity(count) for count in (size.total + size.mtp_total, size.mtp_total)]
        rows.append([name, *counts, budget, f"{flops:.2e}", parent, arm.about])
    workers, ranks, arms, seeds = jobs or 1, study.ranks, len(study.arms), len(study.seeds)
    at_once = f"{workers} process(es)" if ranks == 1 else f"{workers} run(s) of {ranks} processes"
    lines = [f"# {study.run.name}, scale {study.scale}: {study.question.strip()}", ""]
    lines += [*columns(rows), "", f"{arms} arms x {seeds} seeds = {arms * seeds} runs"]
    lines += [
        f"training FLOPs: {total:.3e}",
        f"time: about {duration(total / speed / workers / ranks)} in {at_once} at a time, "
        f"at {speed:.1e} FLOP/s each (scales.{study.scale}.flops_per_s)",
        f"results: {study.folder}",
        "",
    ]
    return "\n".join([*lines, *power_lines(loaded), *trend_lines(loaded)])


def trend_lines(loaded: LoadedStudy) -> list[str]:
    sizes = {}
    for name, config in loaded.configs.items():
        # a matched arm has no budget yet: that of its own config
        tokens = tokens_of(loaded, name, {}) or config.train.total_tokens
        sizes[name] = (float(tokens), float(size_of(config).total))
    return detectable_lines(loaded.study, sizes)


def power_lines(loaded: LoadedStudy) -> list[str]:
    """What the study can find with its seeds, and which comparisons are unresolved in advance."""
    found = list(detectables(loaded.study))
    unresolved = [d for d in found if d.unresolved]
    lines = [
        f"smallest effect that {len(loaded.study.seeds)} seeds find with probability {POWER}, "
        "at Holm's first step:",
        *columns(power_rows(found)),
        *dict.fromkeys(f"sd of {d.metric}, {d.comparison}: {d.source}" for d in found if d.sd),
    ]
    return lines + [
        f"UNRESOLVED in advance: {item.arm} against {item.against}, {item.metric}: expected is "
        f"{item.expected:+.3g}, found is {item.smallest:.3g} or more"
        for item in unresolved
    ]


def cost(run: Run) -> float:
    """Training FLOPs of one run; of a forked one only what comes after the fork."""
    flops = training_flops(run.config)
    if run.parent is None:
        return flops
    train, data = run.config.train, run.config.data
    return flops * (1 - run.fork_step * train.batch_size * data.seq_len / train.total_tokens)


def _matched_cost(loaded: LoadedStudy, name: str) -> float:
    match = loaded.study.arms[name].match
    return training_flops(loaded.configs[match.arm]) if match else 0.0
