"""What a layout costs each rank, from the config alone: parameters, memory, communication, pipeline
bubble.

Ranks = pipeline stages x data ranks; expert-parallel groups lie inside the data ranks (V3 3.2: 2048
= 16 x 128, groups of 64, so 2 copies of each expert), as do the groups that share rows. Memory
follows the ZeRO paper (arXiv 1910.02054, section 5) as DeepSpeed 0.19.8 carries it out; volumes are
bytes that one rank sends, with ring algorithms, in one optimizer step.
"""

from dataclasses import dataclass
from math import comb

from dsv3_mtp.config import Config
from dsv3_mtp.config.layout import data_size
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.objective_losses import CHUNK_ELEMENTS, CHUNKS_ON_GPU
from dsv3_mtp.ops.cross_entropy import chunk_rows
from dsv3_mtp.parallel.pipeline import stage_layers
from dsv3_mtp.plan.parts import Part, activation_elements, backward_elements, on_rank, parts
from dsv3_mtp.plan.states import (
    Sizes,
    bucket_elements,
    communication_size,
    element_size,
    gradient_size,
    host_bytes,
    reduction_bytes,
    setting,
    state_bytes,
    update_bytes,
    weight_bytes,
)


@dataclass(frozen=True)
class Layout:
    """The shape of the ranks and of one optimizer step at the full batch size."""

    stages: int
    data: int  # data-parallel ranks of a stage
    experts: int  # ranks that share a layer's routed experts
    micro_batches: int  # per data rank and step
    tokens: int  # per micro-batch and rank
    slices: int = 1  # ranks that share the slots of a row

    @property
    def copies(self) -> int:
        return self.data // self.experts


@dataclass(frozen=True)
class StagePlan:
    """Bytes on each rank of one pipeline stage."""

    names: list[str]
    dense: int  # parameters on this rank
    experts: int  # parameters of routed experts on this rank
    learned: tuple[int, int]  # `dense` and `experts` less what is frozen
    sent: tuple[float, float]  # `dense` and `experts` as ZeRO-3 gathers them: bytes
    blocks: int
    moe_blocks: int
    weights: float
    gradients: float
    states: float
    host: float  # in host memory: offloaded optimizer states, the average of the weights
    activations: float  # of all micro-batches in flight
    in_flight: int  # micro-batches whose activations are held at once (1F1B)
    buffers: float  # of the loss or of one block's backward, of the reduction, gathered weights
    update: float  # gradients and all that the update takes beside weights and states

    @property
    def total(self) -> float:
        """The peak: in the loss, in a backward, or in the update, when activations are gone."""
        working = self.gradients + self.activations + self.buffers
        return self.weights + self.states + max(working, self.update)


def layout(config: Config, world_size: int) -> Layout:
    """Raises nothing: `config.layout.rank_problems` says which numbers of ranks do not fit."""
    parallel, train = config.parallel, config.train
    groups, slices = data_size(config, world_size), parallel.sequence_parallel_size
    micro_batches = train.batch_size // (train.micro_batch_size * groups)
    tokens = train.micro_batch_size * config.data.seq_len // slices
    return Layout(
        parallel.pipeline_stages,
        groups * slices,
        parallel.expert_parallel_size,
        micro_batches,
        tokens,
        slices,
    )


def plan(config: Config, model: DeepseekV3MTP, shape: Layout) -> list[StagePlan]:
    """Memory of every pipeline stage; without a pipeline, of the only one. `model` may be on the
    meta device.
    """
    embedding, *layers, head = parts(model)
    count, stages = len(layers), []
    cuts = stage_layers(config) if shape.stages > 1 else [range(count)]
    for number, cut in enumerate(cuts):
        mine, last = [layers[n] for n in cut], number == shape.stages - 1
        if number == 0 or (last and config.mtp.reads_tokens):
            # the last stage's is a copy for the MTP modules, tied to the first stage's
            mine.insert(0, embedding)
        if last:
            mine.append(head)
        stages.append(
            _stage(config, mine, shape, in_flight=min(shape.stages - number, shape.micro_batches))
        )
    return stages


def _stage(config: Config, mine: list[Part], shape: Layout, in_flight: int) -> StagePlan:
    dense, experts = on_rank(((part.dense, part.experts) for part in mine), shape.experts)
    zero, element = config.parallel.zero_stage, element_size(config)
    moment = 2 if config.optim.moments == "bfloat16" else 4
    sizes = {
        "zero_stage": zero,
        "element": element,
        "gradient": gradient_size(config),
        "moment": moment,
    }
    coded = on_rank((part.codes for part in mine), shape.experts)
    weights = weight_bytes((dense, experts), coded, shape, zero_stage=zero, element=element)
    scales = on_rank((part.scales for part in mine), shape.experts)
    learned = on_rank((part.learned for part in mine), shape.experts)
    _, gradients, states = state_bytes(*learned, shape, **sizes)
    shards = [learned[0] / shape.data, learned[1] / shape.copies]
    elements = Sizes(
        ranks=shape.data,
        whole=sum(learned),
        shard=sum(shards),
        group=max(shards) if shape.experts > 1 else sum(shards),
        dense=learned[0] if shape.experts > 1 else sum(learned),
        parameters=tuple(
            own.here(shape.experts) for part in mine for own in part.own if own.learned
        ),
    )
    average = 0 if config.train.ema_decay is None else 4 * sum(shards)
    # the loss is over when the backward begins, and before it no weight is made of codes any more
    made = (max(own.here(shape.experts)) for part in mine for own in part.own if own.codes)
    buffers = max(_loss_bytes(config, mine), _backward_bytes(config, mine, shape))
    buffers = max(buffers, element * max(made, default=0))
    buffers += reduction_bytes(config, elements, shape.micro_batches)
    buffers += _gathered_bytes(config, mine, shape, dense + experts)
    offload = config.parallel.offload_optimizer
    # from the stage before
    received = 0 if mine[0].name == "embedding" else config.model.hidden_size
    kept = received + sum(activation_elements(config, part) for part in mine)
    return StagePlan(
        names=[part.name for part in mine],
        dense=dense,
        experts=experts,
        learned=learned,
        sent=(
            element * dense - (element - 1) * coded[0],
            element * experts - (element - 1) * coded[1],
        ),
        blocks=sum(part.dense_blocks + part.moe_blocks for part in mine),
        moe_blocks=sum(part.moe_blocks for part in mine),
        weights=weights + 4 * sum(scales),
        gradients=0.0 if offload and zero == 3 else gradients,  # their sums are on the host
        states=0.0 if offload else states,
        host=average + (host_bytes(config, elements, states) if offload else 0.0),
        activations=kept * shape.tokens * element * in_flight,
        in_flight=in_flight,
        buffers=buffers,
        update=update_bytes(config, elements),
    )


def _gathered_bytes(config: Config, mine: list[Part], shape: Layout, parameters: int) -> float:
    """Weights that ZeRO-3 has gathered at once: what it may keep, but at least one module's."""
    if config.parallel.zero_stage < 3:
        return 0.0
    module = max(sum(own.here(shape.experts)) for part in mine for own in part.own)
    live = min(setting(config, "stage3_max_live_parameters"), parameters)
    return element_size(config) * max(live, module)


def _loss_bytes(config: Config, mine: list[Part]) -> float:
    """Working memory of the loss: a chunk of logits, which their gradient replaces, and the
    gradient of the head in float32.
    """
    model, scored = config.model, sum(part.rows for part in mine)
    if not scored:
        return 0.0
    rows = scored * config.train.micro_batch_size * config.data.seq_len
    chunk = min(chunk_rows(model.vocab_size, on_gpu=True), rows)
    # none of a frozen one
    wide = 0 if config.train.freeze == "trunk" else 4 * model.vocab_size * model.hidden_size
    size = float(element_size(config) * chunk * model.vocab_size + wide)
    if any(not kind.cross_entropy for kind, _ in config.mtp.objectives):
        # other objectives: eight chunks in float32, and one more gradient of the head
        size += 8 * 4 * min(CHUNKS_ON_GPU * CHUNK_ELEMENTS, rows * model.vocab_size) + wide
    return size


def _backward_bytes(config: Config, mine: list[Part], shape: Layout) -> float:
    """The most that a backward holds beside sums, bucket, and the activations of the whole forward,
    of which it frees what it has passed: a block's working memory and the gradients that one of its
    functions makes, or those and the copies of a bucket that is reduced.
    """
    zero, element = config.parallel.zero_stage, element_size(config)
    sizes = [own.here(shape.experts) for part in mine for own in part.own if own.learned]
    bucket = bucket_elements(config, max(map(max, sizes), default=0))
    wide = communication_size(config)
    # of a bucket that is sent: flattened, and up to ZeRO-2 widened as well
    copied = 0 if zero < 2 else element + (wide if zero == 2 and wide != element else 0)
    most = freed = waiting = 0.0
    for part in reversed(mine):
        together = 0
        for own in reversed(part.own):
            few = own.here(shape.experts) if own.learned else ()
            together = max(together, sum(few))
            for size in reversed(few):
                if waiting + size > bucket:
                    most = max(most, copied * waiting + element * sum(few) - freed)
                    waiting = 0
                waiting += size
        block = backward_elements(config, part) * shape.tokens
        most = max(most, element * (block + together) - freed)
        freed += element * activation_elements(config, part) * shape.tokens
    return max(most, copied * waiting - freed)


def communication(config: Config, stages: list[StagePlan], shape: Layout) -> dict[str, float]:
    """Bytes that a rank of the busiest stage sends in one optimizer step, by purpose."""
    zero, element, model = config.parallel.zero_stage, element_size(config), config.model
    every, learned = (
        max(ring(shape.data) * dense + ring(shape.copies) * experts for dense, experts in sizes)
        for sizes in ([stage.sent for stage in stages], [stage.learned for stage in stages])
    )
    # DeepSpeed all-reduces whole buckets up to ZeRO-2, twice the reduce-scatter that would do.
    # ZeRO-2 and 3 reduce in every backward; ZeRO-3 gathers the weights in every forward and
    # backward, ZeRO-1 and 2 once after the update.
    gradients = communication_size(config) * learned * (shape.micro_batches if zero >= 2 else 1)
    rows = {"gradients": gradients * (1 if zero == 3 else 2)}
    if zero:
        rows["weights"] = every * 2 * shape.micro_batches if zero == 3 else element * learned
    if shape.experts > 1:
        rows |= _expert_exchange(config, shape, max(stage.moe_blocks for stage in stages))
    if shape.slices > 1:
        heads, key = model.num_attention_heads, model.qk_nope_head_dim + model.qk_rope_head_dim
        # forward, forward again, backward
        passes = 3 if config.train.activation_checkpointing == "full" else 2
        widths = 2 * key + 2 * model.v_head_dim  # query and key; value and output
        exchanged = element * heads * widths * shape.tokens * ring(shape.slices)
        blocks = max(stage.blocks for stage in stages)
        rows["slices of rows, all-to-all around attention"] = (
            exchanged * passes * blocks * shape.micro_batches
        )
    if shape.stages > 1:
        boundary = element * shape.tokens * model.hidden_size * shape.micro_batches
        rows["pipeline: activations, their gradients"] = boundary * (2 if shape.stages > 2 else 1)
        if "embedding" in stages[-1].names:
            rows["pipeline: gradient of the tied embedding"] = (
                communication_size(config) * model.vocab_size * model.hidden_size
            )
    return rows


def ring(ranks: int) -> float:
    """Share of a tensor that each rank sends in a ring reduce-scatter or all-gather."""
    return (ranks - 1) / ranks


def _expert_exchange(config: Config, shape: Layout, layers: int) -> dict[str, float]:
    """Rows to the experts and back, forward and backward; a token travels once to each rank with
    experts of it.

    Routing is taken as even over the experts that a token may choose, those of `topk_group` groups:
    nodes.
    """
    model, top_k = config.model, config.model.num_experts_per_tok
    groups = max(model.n_group // shape.experts, 1)  # on a rank, wholly or in part
    local = model.n_routed_experts // shape.experts // groups  # experts of each
    reachable = model.n_routed_experts * model.topk_group // model.n_group
    missed = (
        # chance that no choice is on a given rank, by how many of its groups are among the token's
        sum(
            comb(groups, mine)
            * comb(model.n_group - groups, model.topk_group - mine)
            * comb(reachable - mine * local, top_k)
            for mine in range(min(groups, model.topk_group) + 1)
        )
        / (comb(model.n_group, model.topk_group) * comb(reachable, top_k))
    )
    visits = shape.experts * (1 - missed)
    # A row goes there and back in the forward and its gradient in the backward: 4 times. Along with
    # it go, for each choice, the number of an expert (8 bytes) and a gate (4), and back the gate's
    # gradient (4). full: two forwards.
    forwards = 2 if config.train.activation_checkpointing == "full" else 1
    row = element_size(config) * model.hidden_size * 2 * (forwards + 1) + top_k * (
        12 * forwards + 4
    )
    sent = row * shape.tokens * shape.micro_batches * layers
    rows = {
        f"experts, all-to-all ({visits:.2f} ranks per token)": sent * visits * ring(shape.experts)
    }
    nodes = min(model.n_group, shape.experts)
    if nodes > 1:
        rows["  of it between nodes"] = sent * visits * ring(nodes)
        once = min(model.topk_group, top_k)
        rows[f"  with one copy per node, {once} nodes (V3 3.2.2; not done here)"] = (
            sent * once * ring(nodes)
        )
    return rows


def bubbles(shape: Layout, *, recompute: bool) -> dict[str, float]:
    """Idle share of a step, 0 to 1, of pipeline schedules (V3 Table 2): bubble / (bubble + work).

    F, B and W are taken from the FLOPs: B = 2F (3F when blocks are computed again), its half W = F
    for the weights. V3's overlapped pair F&B is taken as F + B: no gain from overlap.
    """
    stages, forward, weights = shape.stages, 1.0, 1.0
    backward = 3.0 if recompute else 2.0
    idle = {
        "1F1B (run here)": (stages - 1) * (forward + backward),
        "ZB1P": (stages - 1) * (forward + backward - 2 * weights),
        "DualPipe": (stages / 2 - 1) * (forward + 2 * backward - 3 * weights),
    }
    work = shape.micro_batches * (forward + backward)
    return {name: time / (time + work) for name, time in idle.items()}
