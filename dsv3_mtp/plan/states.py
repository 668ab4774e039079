"""Bytes of weights, gradients and optimizer states, and what DeepSpeed's update takes beside them.

The ZeRO paper's Figure 1 (arXiv 1910.02054) is the first half. The second is read from DeepSpeed
0.19.8 and measured with its own steps (tests/plan/test_memory.py, `bench/parallel.py memory`).
"""

from dataclasses import dataclass
from typing import Any

from dsv3_mtp.config import Config
from dsv3_mtp.parallel.engine import sums_in_float32
from dsv3_mtp.train.optim import CHUNK

DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "stage3_max_live_parameters": 1e9,
    "sub_group_size": 1e9,
}  # zero_optimization, in elements
ALLREDUCE = 500_000_000  # elements that ZeRO 0, and 1 with float32 sums, copies to reduce them


@dataclass(frozen=True)
class Sizes:
    """Elements that a rank learns: all it computes with, and its shards of them."""

    ranks: int  # that share them
    whole: int
    shard: float
    group: float  # largest shard of one parameter group: ZeRO updates group by group
    dense: int  # of `whole`, all that no expert parallelism divides
    parameters: tuple[tuple[int, ...], ...]  # of each module, its own, in their order

    @property
    def largest(self) -> int:
        """Parameter."""
        return max((max(sizes) for sizes in self.parameters), default=0)


def element_size(config: Config) -> int:
    """Bytes of a weight and of an activation."""
    return 2 if config.train.dtype == "bfloat16" else 4


def gradient_size(config: Config) -> int:
    """Bytes of a gradient between micro-batches. A pipeline's float32 sum stands beside the
    gradient of the last micro-batch.
    """
    if not sums_in_float32(config):
        return element_size(config)
    return 6 if config.parallel.pipeline_stages > 1 else 4


def communication_size(config: Config) -> int:
    """Bytes of a gradient while the ranks' are summed."""
    asked = config.deepspeed.get("communication_data_type")
    if asked is not None:
        return 4 if asked == "fp32" else 2
    return 4 if sums_in_float32(config) else element_size(config)


def setting(config: Config, name: str) -> float:
    """A key of DeepSpeed's zero_optimization, in elements."""
    return float((DEFAULTS | config.deepspeed.get("zero_optimization", {}))[name])


def state_bytes(
    dense: int,
    experts: int,
    shape: Any,
    *,
    zero_stage: int,
    element: int,
    gradient: int,
    moment: int = 4,
) -> tuple[float, float, float]:
    """Weights, gradients and optimizer states of a rank that computes with these parameters (ZeRO
    paper, Figure 1).

    The master copy of the weights is float32; only float32 ZeRO-0 has no second copy. Experts are
    sharded over the ranks that hold copies of them, everything else over the data ranks. element,
    gradient: bytes of a weight, and of its gradient; moment: of each of AdamW's two moments.
    """
    whole, shard = dense + experts, dense / shape.data + experts / shape.copies
    states = 2 * moment + (4 if zero_stage or element == 2 else 0)
    return (
        element * (shard if zero_stage == 3 else whole),
        gradient * (shard if zero_stage >= 2 else whole),
        states * (shard if zero_stage else whole),
    )


def weight_bytes(
    whole: tuple[int, int], codes: tuple[int, int], shape: Any, *, zero_stage: int, element: int
) -> float:
    """Weights of a rank that computes with these parameters, dense ones and experts, of which
    `codes` are held in FP8: a byte each.
    """
    sizes = {"zero_stage": zero_stage, "gradient": 0}
    wide = state_bytes(*whole, shape, element=element, **sizes)[0]
    return wide - state_bytes(*codes, shape, element=element - 1, **sizes)[0]


def update_bytes(config: Config, sizes: Sizes) -> float:
    """What an update holds at its peak beside weights and optimizer states: gradients, copies of
    them, and moments in float32 where they are kept in bfloat16.

    The copies of the last reduction count here too: activations are gone by then.
    """
    zero, element, sums = config.parallel.zero_stage, element_size(config), gradient_size(config)
    moments = 8.0 if config.optim.moments == "bfloat16" else 0.0
    if zero == 0:
        largest = min(CHUNK, sizes.largest)
        masters = (4 if element == 2 else 0) * sizes.whole + moments * largest
        copy = element * min(sizes.whole, ALLREDUCE)
        return element * sizes.whole + max(copy, masters)
    if config.parallel.offload_optimizer:  # the rest is on the host
        if zero == 1:  # its shard's are copied as all are reduced
            sent = bucket_elements(config, sizes.largest) + first_bucket(config, sizes)
            return sums * (sizes.whole + sizes.shard) + communication_size(config) * sent
        return sums * sizes.shard if zero == 2 else 0
    group = min(sizes.group, setting(config, "sub_group_size")) if zero == 3 else sizes.group
    moments *= min(CHUNK, group)
    norm = 8.0 * min(sizes.largest, sizes.shard)  # of one parameter, in float64
    if not sums_in_float32(config) or zero == 3:
        flat = (sums if zero == 3 else element) * group
        wide = 4 * group if element == 2 else 0  # float32 made of what is flat
        if zero == 3 and sums == 4:
            flat, wide = 4 * group, 0
        peak = max(flat + wide, (wide or flat) + moments, norm)
    elif zero == 1:
        # AdamW reads the sums themselves. Two small tensors or more are copied to be reduced.
        copy = 4 * sizes.dense if sizes.dense <= ALLREDUCE else 0
        return sums * sizes.whole + max(copy, moments)
    else:
        peak = max(norm, moments)
    bucket = communication_size(config) * setting(config, "reduce_bucket_size")
    update = sums * sizes.shard + peak + (bucket if zero == 3 else 0)
    if (
        zero == 1
    ):  # as the last backward ends, its shard's gradients are copied; the bucket is there
        copies = sizes.whole - first_bucket(config, sizes) + overlapping(sizes)
        return max(update, element * copies + bucket)
    return update


def host_bytes(config: Config, sizes: Sizes, states: float) -> float:
    """Of offloaded states on the host: they, float32 gradients, and what waits to be copied."""
    if config.parallel.zero_stage == 3:
        return states + (4 + gradient_size(config)) * sizes.shard
    # up to ZeRO-2 the new weights, and two pages for the largest parameter
    return states + 4 * sizes.shard + element_size(config) * (sizes.shard + 2 * sizes.largest)


def reduction_bytes(config: Config, sizes: Sizes, micro_batches: int) -> float:
    """What DeepSpeed keeps for the reduction of gradients while a backward runs: its bucket, and
    under ZeRO-2 the last micro-batch's gradients until they are added.
    """
    zero, waiting = config.parallel.zero_stage, 0.0
    if not zero or (zero == 1 and sums_in_float32(config)):
        return 0.0
    if zero == 2 and micro_batches > 1 and not sums_in_float32(config):
        waiting = element_size(config) * overlapping(sizes)
    if zero == 3 and config.parallel.offload_optimizer:  # of a norm, in float64
        waiting = 8 * sizes.largest / sizes.ranks
    size = communication_size(config) if zero == 3 else element_size(config)
    return waiting + size * bucket_elements(config, sizes.largest)


def bucket_elements(config: Config, largest: int) -> float:
    """Gradients that are reduced at a time; a larger parameter takes a bucket of its own."""
    return max(setting(config, "reduce_bucket_size"), largest)


def first_bucket(config: Config, sizes: Sizes) -> int:
    """Elements of the gradients that a backward makes before it sends the first."""
    waiting, bucket = 0, bucket_elements(config, sizes.largest)
    for module in reversed(sizes.parameters):  # it comes to the last first
        for size in reversed(module):
            if waiting + size > bucket:
                return waiting
            waiting += size
    return waiting


def overlapping(sizes: Sizes) -> int:
    """Elements of the parameters that lie in a rank's shard, wholly or in part; the most of any."""
    shard, begin, found = sizes.whole / sizes.ranks, 0, [0] * sizes.ranks
    for size in (size for module in sizes.parameters for size in module):
        first, last = int(begin // shard), int((begin + size - 1) // shard)
        for rank in range(first, min(last, sizes.ranks - 1) + 1):
            found[rank] += size
        begin += size
    return max(found)
