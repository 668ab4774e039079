"""Counts, without a GPU, where the host would wait for one."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# copies into the host's memory, which a tensor on a CPU makes without an operation
COPIES = {Tensor.tolist: "tolist", Tensor.cpu: "cpu", Tensor.numpy: "numpy"}
# one number (item, int, bool), and results whose shapes depend on numbers
OPERATIONS = {
    "_local_scalar_dense.default",
    "nonzero.default",
    "masked_select.default",
    "bincount.default",
    "_unique2.default",
    "repeat_interleave.Tensor",  # without output_size
}


class Waits:
    """`with Waits() as waits:`, then `waits.seen`: what would have waited inside, in its order."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.modes = _Copies(self.seen), _Operations(self.seen)

    def __enter__(self) -> "Waits":
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)


class _Copies(TorchFunctionMode):
    def __init__(self, seen: list[str]):
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function in COPIES:
            self.seen.append(COPIES[function])
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, seen: list[str]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = str(function).removeprefix("aten.")
        by_mask = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        known = (kwargs or {}).get("output_size") is not None
        if (name in OPERATIONS and not known) or by_mask:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))
