"""What a run really holds and sends, to check a plan against. Counts every tensor; slow; for tests
and tables.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_mtp.config import Config
from dsv3_mtp.train.process import own_process


class Meter(TorchDispatchMode):
    """Bytes of the tensors made inside this context that are still held, whoever holds them, and
    bytes sent.

    Sizes of collectives are taken as a ring sends them: an all-reduce of n ranks sends 2 (n-1)/n of
        its tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.sent: Counter[str] = Counter()  # collective -> bytes
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if operator.namespace == "c10d":
            self._count(operator._schema.name.removeprefix("c10d::"), args)
        given = {storage._cdata for storage in _storages((args, kwargs))}  # a view is no new memory
        result = operator(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._known | given:
                self._known.add(storage._cdata)
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size

    def _count(self, name: str, args: tuple) -> None:
        group = next(ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        ranks, sizes = group.size(), [_nbytes(arg) for arg in args[:2]]
        match name:
            case "allreduce_":
                self.sent["all_reduce"] += 2 * sizes[0] * (ranks - 1) // ranks
            case "_allgather_base_" | "allgather_" | "allgather_into_tensor_coalesced_":
                self.sent["all_gather"] += sizes[0] * (ranks - 1) // ranks
            case "_reduce_scatter_base_" | "reduce_scatter_" | "reduce_scatter_tensor_coalesced_":
                self.sent["reduce_scatter"] += sizes[1] * (ranks - 1) // ranks
            case "alltoall_base_":
                splits = args[4] or [1] * ranks
                self.sent["all_to_all"] += sizes[1] - sizes[1] * splits[group.rank()] // max(
                    sum(splits), 1
                )
            case "send":
                self.sent["send"] += sizes[0]
            case "broadcast_" | "reduce_":
                self.sent[name.rstrip("_")] += sizes[0]
            case "barrier" | "recv_" | "recv_any_source_":
                pass
            case _:
                raise ValueError(f"{name}: the meter does not know what this collective sends")


def measure_step(config: Config) -> tuple[int, dict[str, int]]:
    """What this rank holds between two micro-batches of the second optimizer step, and sends in
    that step: bytes.

    At that point there are weights, gradients and optimizer states, and no activations. Needs two
    micro-batches.
    """
    with Meter() as meter:
        trainer = own_process(config, command=[])
        trainer.optimizer_step()
        meter.sent.clear()
        backward, held = trainer.engine.backward, []

        def record(loss: Tensor, *, last: bool) -> None:
            backward(loss, last=last)
            held.append(meter.held)

        trainer.engine.backward = record  # type: ignore[method-assign]
        trainer.optimizer_step()
    return held[0], dict(meter.sent)


def measure_peaks(config: Config) -> tuple[int, int]:
    """Most bytes of tensors that this rank holds at once in its third optimizer step, and in the
    update of that step; host memory included. (The first step makes the optimizer's states.)
    """
    with Meter() as meter:
        trainer = own_process(config, command=[])
        trainer.optimizer_step()
        trainer.optimizer_step()
        meter.peak = meter.held
        whole, step = [0], trainer.engine.step

        def update(*arguments: Any, **keywords: Any) -> Any:
            whole[0], meter.peak = meter.peak, meter.held
            return step(*arguments, **keywords)

        trainer.engine.step = update  # type: ignore[method-assign]
        trainer.optimizer_step()
    return max(whole[0], meter.peak), meter.peak


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [tensor.untyped_storage() for tensor in _tensors(tree) if tensor.device.type != "meta"]


def _nbytes(tree: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(tree))


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Those in an operator's arguments or results. (torch's own walk takes longer than the
    operator.)
    """
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list | dict):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(branch)
