"""Tables of docs/parallelism.md: what layouts hold and send, measured against the plan, and weak
scaling.

    python bench/parallel.py refusals
    python bench/parallel.py activations
    torchrun --nproc_per_node 2 bench/parallel.py activations --set data.seq_len=2048 \\
        --set parallel.sequence_parallel_size=2                # long rows, over 2 ranks
    torchrun --nproc_per_node 2 bench/parallel.py memory
    torchrun --nproc_per_node 1 bench/parallel.py scaling      # then with 2: as much per process
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from typing import Any

LAYOUTS = {
    **{f"ZeRO-{stage}": [f"parallel.zero_stage={stage}"] for stage in range(4)},
    "ZeRO-1, EP=2": ["parallel.expert_parallel_size=2"],
    "ZeRO-2, EP=2": ["parallel.zero_stage=2", "parallel.expert_parallel_size=2"],
}
# What can be combined: name -> settings, on top of ZeRO-1.
FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    **{f"ZeRO-{stage}": {"parallel": {"zero_stage": stage}} for stage in range(4)},
    "offload": {"parallel": {"offload_optimizer": True}},
    "EP": {"parallel": {"expert_parallel_size": 2}},
    "PP": {"parallel": {"pipeline_stages": 2}},
    "SP": {"parallel": {"sequence_parallel_size": 2}},
    "selective": {"train": {"activation_checkpointing": "selective"}},
    "full": {"train": {"activation_checkpointing": "full"}},
    "freeze": {"train": {"freeze": "trunk"}},
}
# So that ZeRO-3 shards this small a model at all, and lets go of what it has gathered.
ZERO = {"reduce_bucket_size": 5000, "stage3_param_persistence_threshold": 0}
ZERO |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=["refusals", "activations", "memory", "scaling"])
    parser.add_argument("--config", default="configs/v3_tiny.yaml", metavar="YAML")
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="a.b=c")
    parser.add_argument(
        "--steps", type=int, default=20, help="scaling: optimizer steps that are measured"
    )
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: must be at least 1")
    if args.table in ("memory", "scaling") and "RANK" not in os.environ:
        parser.error(
            f"{args.table}: start it with torchrun --nproc_per_node "
            f"2 bench/parallel.py {args.table}"
        )
    from dsv3_mtp.config import load_config

    try:
        config = load_config(args.config, args.sets)
        if args.table == "refusals":
            print(composition(config))
        else:
            measure(args)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sets = [*args.sets, f"run.dir={folder}", "log.tensorboard=false"]
        {"activations": activations, "memory": memory, "scaling": scaling}[args.table](args, sets)
        sys.stdout.flush()
        from dsv3_mtp.parallel.launch import finish

        finish()


def composition(config: Any) -> str:
    """A Markdown table of every pair of FEATURES: yes, or the number of the reason in the list
    below it.

    config: a Config, the rest of the run.
    """
    from dsv3_mtp.config.layout import rank_problems

    names, reasons = list(FEATURES), list[str]()

    def cell(row: str, column: str) -> str:
        if (row[:4] == column[:4] == "ZeRO" and row != column) or {row, column} == {
            "selective",
            "full",
        }:
            return "-"  # two values of one key
        run = config.model_copy(
            update={"parallel": config.parallel.model_copy(update={"zero_stage": 1})}
        )
        for section, keys in [*FEATURES[row].items(), *FEATURES[column].items()]:
            run = run.model_copy(update={section: getattr(run, section).model_copy(update=keys)})
        refused = rank_problems(run)
        reasons.extend(reason for reason in refused if reason not in reasons)
        return ", ".join(str(reasons.index(reason) + 1) for reason in refused) or "yes"

    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {row} | " + " | ".join(cell(row, column) for column in names) + " |" for row in names
    ]
    return "\n".join(
        [*lines, "", *(f"{number}. `{reason}`" for number, reason in enumerate(reasons, start=1))]
    )


def activations(args: argparse.Namespace, sets: list[str]) -> None:
    """Bytes that one forward leaves for its backward, beside the weights, with attention that keeps
    no probabilities, as a GPU's: masked, or of long rows.
    """
    import torch
    from meter import Meter
    from timing import timed

    from dsv3_mtp.config import load_config
    from dsv3_mtp.model.causal_lm import DeepseekV3MTP
    from dsv3_mtp.ops import choice
    from dsv3_mtp.ops.compute import Compute, building
    from dsv3_mtp.parallel.launch import start, starting
    from dsv3_mtp.parallel.sequence import shard_of
    from dsv3_mtp.plan.memory import layout, plan

    slices = load_config(args.config, sets).parallel.sequence_parallel_size
    with starting(600):
        world = start(threads=1, timeout_s=600, slices=slices)
    note, shard = choice.describe(world.device), shard_of(world)
    if world.is_main:
        print(note)
        print(
            "| checkpointing | held after forward, MiB | planned "
            "| peak of the backward, MiB | CPU time, none = 1 |"
        )
        print("|---|---|---|---|---|")
    base = 0.0
    for mode in ("none", "selective", "full"):
        config = load_config(args.config, [*sets, f"train.activation_checkpointing={mode}"])
        compute = Compute(core=shard.attention(None), shard=shard, recompute=mode)
        with building(compute):
            model = DeepseekV3MTP(config.model, config.mtp)
        model.init_weights(config.run.seed)
        ahead = config.mtp.lookahead
        shape = config.train.micro_batch_size, config.data.seq_len + ahead
        tokens = shard.cut(torch.randint(0, config.model.vocab_size, shape), ahead)
        with Meter() as meter:
            out = model(tokens)
            held = meter.held
            out.loss.backward()
        device = torch.device("cpu")

        def step(model: DeepseekV3MTP = model, tokens: torch.Tensor = tokens) -> None:
            model(tokens).loss.backward()

        times = [timed(step, device) for _ in range(9)]
        base = base or statistics.median(times)
        # its gradient, made in the forward
        held -= model.lm_head.weight.numel() * model.lm_head.weight.element_size()
        planned = sum(
            stage.activations for stage in plan(config, model, layout(config, world.size))
        )
        ratio = statistics.median(times) / base
        if world.is_main:
            print(
                f"| {mode} | {held / 2**20:.1f} | {planned / 2**20:.1f} "
                f"| {meter.peak / 2**20:.1f} | {ratio:.2f} |"
            )


def memory(args: argparse.Namespace, sets: list[str]) -> None:
    from meter import measure_step

    from dsv3_mtp.config import load_config
    from dsv3_mtp.model.causal_lm import meta_model
    from dsv3_mtp.plan.memory import communication, layout, plan

    main, ranks = os.environ["RANK"] == "0", int(os.environ["WORLD_SIZE"])
    if main:
        print("| layout | dtype | held, MiB | planned | sent per step, MiB | planned |")
        print("|---|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        for name, keys in LAYOUTS.items():
            own = [
                f"train.dtype={dtype}",
                f"run.name={name}-{dtype}",
                f"deepspeed.zero_optimization={ZERO}",
            ]
            own += [f"train.batch_size={8 * ranks}", "train.micro_batch_size=4"]
            config = load_config(args.config, [*sets, *own, *keys])
            held, sent = measure_step(config)
            model = meta_model(config.model, config.mtp)
            shape = layout(config, ranks)
            stages = plan(config, model, shape)
            planned = stages[0].weights + stages[0].gradients + stages[0].states
            volume = sum(
                value
                for key, value in communication(config, stages, shape).items()
                if key[0] != " "
            )
            numbers = [value / 2**20 for value in (held, planned, sum(sent.values()), volume)]
            if main:
                print(
                    f"| {name} | {dtype} | "
                    + " | ".join(f"{number:.2f}" for number in numbers)
                    + " |",
                    flush=True,
                )


def scaling(args: argparse.Namespace, sets: list[str]) -> None:
    """The same micro-batches per process; CPU time, because the machine may be busy with other
    things.
    """
    import torch

    from dsv3_mtp.config import load_config
    from dsv3_mtp.train.process import own_process

    ranks = int(os.environ["WORLD_SIZE"])
    batch = load_config(args.config, sets).train.batch_size * ranks
    trainer = own_process(
        load_config(args.config, [*sets, f"train.batch_size={batch}", "train.threads=1"]),
        command=[],
    )
    for _ in range(3):
        trainer.optimizer_step()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(args.steps):
        trainer.optimizer_step()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        for _ in range(args.steps):
            trainer.optimizer_step()
        profiled = time.perf_counter() - start
    under_way = (
        sum(
            event.time_range.elapsed_us()
            for event in profile.events()
            if event.name.startswith("gloo:")
        )
        / 1e6
    )
    if trainer.world.is_main:
        print(
            "| processes | tokens per step | CPU s per step "
            "and process | wall s per step | in collectives |"
        )
        print("|---|---|---|---|---|")
        tokens = batch * trainer.config.data.seq_len
        print(
            f"| {ranks} | {tokens} | {cpu / args.steps:.3f} | "
            f"{wall / args.steps:.3f} | {under_way / profiled:.1%} |"
        )


if __name__ == "__main__":
    sys.exit(main())
