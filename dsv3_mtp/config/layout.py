"""How ranks share the work: what each layout needs, what is refused, each with its reason.

A rule yields (key, text), as the rules of the sections do. Rules that need no number of ranks are
checked when a config is read; all of them when a run starts, and by `--dry-run`.
"""

from collections.abc import Iterator
from typing import Any

from dsv3_mtp.config.reader import Problem

# the sections that the rules read
NEEDS = ("model", "mtp", "data", "optim", "train", "parallel", "log")


def rank_problems(config: Any, world_size: int | None = None) -> list[str]:
    """Every reason why a config cannot run on `world_size` ranks (None: any), as "key: text".

    config: a Config, or anything with the sections in NEEDS.
    """
    return [f"{key}: {text}" for key, text in problems(config, world_size)]


def problems(config: Any, world_size: int | None = None) -> Iterator[Problem]:
    for rules in (_heads, _zero, _experts, _pipeline, _task, _sequence, _gradients, _clipping):
        yield from rules(config)
    if world_size is not None:
        yield from _ranks(config, world_size)


def _heads(config: Any) -> Iterator[Problem]:
    """What the heads read is there, and every depth has a teacher where an objective needs one."""
    mtp, last = config.mtp, config.model.num_hidden_layers - 1
    if beyond := [layer for layer in layers_read(mtp) if layer > last]:
        text = f"its heads read the output of trunk layer {', '.join(map(str, beyond))}"
        yield "mtp.mode", f"{text}; model.num_hidden_layers = {last + 1} gives 0..{last}"
    compared = [kind.name for kind, _ in mtp.objectives if kind.teacher]
    if compared and config.data.seq_len < (needed := mtp.lookahead):
        which = f"depth {mtp.depths} with the main head {needed - 1} slots later"
        text = f"and data.seq_len = {config.data.seq_len} has no such slot"
        yield "mtp.objective", f"{compared[0]} compares {which}, {text}"


def _zero(config: Any) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.offload_optimizer and parallel.zero_stage == 0:
        text = "needs parallel.zero_stage >= 1: ZeRO-0 has no optimizer shard to move"
        yield "parallel.offload_optimizer", text


def _experts(config: Any) -> Iterator[Problem]:
    model, parallel = config.model, config.parallel
    key, size = "parallel.expert_parallel_size", parallel.expert_parallel_size
    stage = parallel.zero_stage
    if size == 1:
        return
    if model.n_routed_experts % size:
        yield key, f"must divide model.n_routed_experts = {model.n_routed_experts} (got {size})"
    if size % model.n_group and model.n_group % size:
        groups = f"model.n_group = {model.n_group}, whose groups are nodes"
        yield key, f"must divide {groups}, or be a multiple (got {size})"
    if model.first_k_dense_replace == model.num_hidden_layers:
        all_dense = f"model.first_k_dense_replace = {model.num_hidden_layers}"
        yield key, f"has no experts to share with {all_dense}; set 1"
    if config.train.freeze == "trunk" and not has_experts(model, config.mtp):
        frozen = f"train.freeze: trunk and mtp.mode: {config.mtp.mode}"
        yield key, f"has no experts that learn with {frozen}; set 1"
    why = {0: "clips by each rank's own gradient norm", 3: "takes no expert-parallel groups"}
    if stage in why:
        text = f"needs parallel.zero_stage 1 or 2: DeepSpeed's ZeRO-{stage} {why[stage]}"
        yield key, f"{text} (got {stage})"


def _task(config: Any) -> Iterator[Problem]:
    """Its examples are answered by generation, for which each rank needs a whole model."""
    keys = ("expert_parallel_size", "pipeline_stages", "sequence_parallel_size")
    parted = any(getattr(config.parallel, key) > 1 for key in keys)
    if config.data.task is not None and (config.parallel.zero_stage == 3 or parted):
        sizes = f"{keys[0]}, {keys[1]} and {keys[2]} 1"
        text = f"needs parallel.zero_stage <= 2; {sizes}: every rank generates by itself"
        yield "data.task", text


def _pipeline(config: Any) -> Iterator[Problem]:
    model, parallel, train = config.model, config.parallel, config.train
    if parallel.pipeline_stages == 1:
        return
    key = "parallel.pipeline_stages"
    if inner := layers_read(config.mtp):
        which = f"trunk layer {', '.join(map(str, inner))}, which the last stage does not have"
        text = f"needs 1: heads of mtp.mode {config.mtp.mode} read the output of {which}"
        yield key, f"{text} (got {parallel.pipeline_stages})"
    head, tail = uncut(config)
    pieces = model.num_hidden_layers + 1 - (head - 1) - (tail - 1)
    if parallel.pipeline_stages > pieces:
        together = [f"layers 0..{head - 1}"] * (head > 1)
        together += [f"layer {model.num_hidden_layers - 1} and the heads"] * (tail > 1)
        kept = f" ({'; '.join(together)} stay together)" if together else ""
        text = f"must be <= {pieces}, the pieces that layers and heads can be cut into{kept}"
        yield key, f"{text} (got {parallel.pipeline_stages})"
    if parallel.zero_stage == 0:
        why = "DeepSpeed's ZeRO-0 clips by each stage's own gradient norm"
        yield key, f"needs parallel.zero_stage 1: {why} (got 0)"
    if parallel.zero_stage in (2, 3):
        why = "DeepSpeed's pipeline reduces gradients once per step, ZeRO-2 and 3 in every backward"
        yield key, f"needs parallel.zero_stage 1: {why} (got {parallel.zero_stage})"
    if config.data.mask != "none":
        text = "needs data.mask none: stages pass on tokens, not which of them are targets"
        yield key, f"{text}; use data, expert or sequence parallelism"
    if train.freeze == "trunk":
        text = "needs train.freeze none: with trunk, all stages but the last have nothing to learn"
        yield key, text


def _sequence(config: Any) -> Iterator[Problem]:
    heads, length = config.model.num_attention_heads, config.data.seq_len
    key, size = "parallel.sequence_parallel_size", config.parallel.sequence_parallel_size
    if heads % size:
        text = f"must divide model.num_attention_heads = {heads}"
        yield key, f"{text}: attention is divided by heads (got {size})"
    if length % size:
        yield key, f"must divide data.seq_len = {length}: slices of a row are equal (got {size})"
    ahead = config.mtp.lookahead - 1
    if ahead > length // size and any(kind.teacher for kind, _ in config.mtp.objectives):
        slots = f"data.seq_len = {length} slots of a row"
        why = "so far away is the main head's slot that mtp.objective compares the last depth with"
        yield key, f"must leave each rank at least {ahead} of the {slots}: {why} (got {size})"


def uncut(config: Any) -> tuple[int, int]:
    """(first, last): the first `first` pieces of a pipeline share a stage, and the last `last` do.
    A piece is one trunk layer; the last is all that follows them. (1, 1): any cut is allowed.

    Two reasons forbid a cut. Heads that read the input of the trunk's last layer need that layer on
    their stage. And with expert parallelism every stage needs an MoE layer, because DeepSpeed adds
    up the gradient norm over the stages once for each kind of parameter.
    """
    model, mtp, shared = config.model, config.mtp, config.parallel.expert_parallel_size > 1
    with_heads = mtp.depths > 0 and "last_input" in mtp.kind.reads(mtp)
    with_heads = with_heads or (shared and not has_experts(model, mtp))
    return 1 + model.first_k_dense_replace if shared else 1, 2 if with_heads else 1


def has_experts(model: Any, mtp: Any) -> bool:
    """The heads have routed experts."""
    return mtp.depths > 0 and mtp.kind.has_experts(model, mtp)


def layers_read(mtp: Any) -> list[int]:
    """The trunk layers whose outputs heads read."""
    return sorted(j for j in mtp.kind.reads(mtp) if isinstance(j, int)) if mtp.depths else []


def data_size(config: Any, world_size: int) -> int:
    """Groups of ranks that work on different rows, in one pipeline stage."""
    shared = config.parallel.pipeline_stages * config.parallel.sequence_parallel_size
    return max(world_size // shared, 1)


def _gradients(config: Any) -> Iterator[Problem]:
    """The gradients' angle is measured outside DeepSpeed, on parameters that are whole."""
    parallel = config.parallel
    if not config.log.gradients:
        return
    if not config.mtp.depths or config.mtp.detach == "all" or config.train.freeze == "trunk":
        yield "log.gradients", "needs heads whose gradients reach the trunk; set 0"
    parts = (parallel.pipeline_stages, parallel.expert_parallel_size)
    if parallel.zero_stage == 3 or max(parts) > 1:
        sizes = "parallel.zero_stage <= 2, pipeline_stages 1, expert_parallel_size 1"
        yield "log.gradients", f"needs whole parameters on every rank: {sizes}; or set 0"


def _clipping(config: Any) -> Iterator[Problem]:
    """Clipping apart needs groups of parameters that only the last stage would have."""
    if clips_apart(config) and config.parallel.pipeline_stages > 1:
        yield (
            "mtp.detach",
            "all clips trunk and heads apart, which needs parallel.pipeline_stages 1: DeepSpeed's "
            "stages must have equal parameter groups; set optim.grad_clip 0, or mtp.detach trunk",
        )


def _ranks(config: Any, world_size: int) -> Iterator[Problem]:
    train, parallel = config.train, config.parallel
    experts, stages = parallel.expert_parallel_size, parallel.pipeline_stages
    slices = parallel.sequence_parallel_size
    if world_size % stages:
        text = f"must divide the number of ranks, {world_size} (got {stages})"
        yield "parallel.pipeline_stages", text
        return
    replicas = world_size // stages
    of = f"the ranks of a stage, {replicas}" if stages > 1 else f"the number of ranks, {replicas}"
    if replicas % experts:
        yield "parallel.expert_parallel_size", f"must divide {of} (got {experts})"
    if replicas % slices:
        yield "parallel.sequence_parallel_size", f"must divide {of} (got {slices})"
        return
    groups = data_size(config, world_size)
    rows = train.micro_batch_size * groups
    if train.batch_size % rows:
        ranks = f"{'data-parallel ' * (stages > 1)}ranks"
        on = ranks if slices == 1 else f"groups of {slices} ranks"
        parts = f"micro-batches of {train.micro_batch_size} on {groups} {on}"
        text = f"{train.batch_size} sequences do not divide into {parts}; use a multiple of {rows}"
        smaller = range(train.micro_batch_size - 1, 0, -1)
        if fits := [size for size in smaller if train.batch_size % (size * groups) == 0]:
            text += f", or train.micro_batch_size: {fits[0]}, the same batch"
        yield "train.batch_size", text


def clips_apart(config: Any) -> bool:
    """optim.grad_clip bounds the gradients of trunk and heads apart: no gradient of the
    heads reaches the trunk (mtp.detach: all), and their norm shall not reach its steps either.
    """
    both_learn = config.mtp.depths > 0 and config.train.freeze == "none"
    return both_learn and config.mtp.detach == "all" and config.optim.grad_clip > 0


def describe(config: Any, world_size: int) -> str:
    """The layout in a few words: "2 ranks x 4 sequences, ZeRO-1"."""
    parallel = config.parallel
    ranks = f"{world_size} rank{'s' * (world_size > 1)}"
    parts = [f"{ranks} x {config.train.micro_batch_size} sequences"]
    parts += [f"ZeRO-{parallel.zero_stage}{' with offload' * parallel.offload_optimizer}"]
    parts += [f"EP {parallel.expert_parallel_size}"] * (parallel.expert_parallel_size > 1)
    parts += [f"PP {parallel.pipeline_stages}"] * (parallel.pipeline_stages > 1)
    parts += [f"SP {parallel.sequence_parallel_size}"] * (parallel.sequence_parallel_size > 1)
    return ", ".join(parts)
