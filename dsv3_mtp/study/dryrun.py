"""What a study would run and what it would cost, without running it."""

from dsv3_mtp.report.progress import duration, quantity
from dsv3_mtp.study.expand import Run, expand, size_of, tokens_of, training_flops
from dsv3_mtp.study.matrix import LoadedStudy


def dry_run(loaded: LoadedStudy, *, jobs: int | None) -> str:
    """The matrix of arms, their sizes and budgets, and an estimate of FLOPs and time, each forked
    prefix counted once.

    An arm with the measured time of another has no budget yet: it is counted with the time of that
        arm.
    """
    study, speed = loaded.study, loaded.study.scales[loaded.study.scale].flops_per_s
    runs = {run.name: run for run in expand(loaded, budgets={})}
    rows = [("arm", "parameters", "of these MTP", "tokens", "FLOPs", "forks from", "what")]
    total = 0.0
    for name, arm in study.arms.items():
        config = loaded.configs[name]
        size, run = size_of(config), runs.get(f"{name}-seed{study.seeds[0]}")
        flops = cost(run) if run else _matched_cost(loaded, name)
        total += flops * len(study.seeds)
        tokens = tokens_of(loaded, name, {})
        parent = (
            f"{run.parent.rpartition('-')[0]} at step {run.fork_step}"
            if run and run.parent
            else "-"
        )
        budget = quantity(tokens) if tokens else f"time of {arm.match.arm if arm.match else ''}"
        count = quantity(size.total + size.mtp_total)
        rows.append(
            (name, count, quantity(size.mtp_total), budget, f"{flops:.2e}", parent, arm.about)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    table = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[6]])
        for row in rows
    ]
    workers = jobs or 1
    return "\n".join(
        [
            f"# {study.run.name}, scale {study.scale}: {study.question.strip()}",
            "",
            *table,
            "",
            (
                f"{len(study.arms)} arms x {len(study.seeds)} "
                f"seeds = {len(study.arms) * len(study.seeds)} runs"
            ),
            f"training FLOPs: {total:.3e}",
            f"time: about {duration(total / speed / workers)} in {workers} process(es) at a time, "
            f"at {speed:.1e} FLOP/s each (scales.{study.scale}.flops_per_s)",
            f"results: {study.folder}",
        ]
    )


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
