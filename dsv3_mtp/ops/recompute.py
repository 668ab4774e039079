"""Activation checkpointing: what the backward recomputes instead of keeping it (V3 section 3.2.3).

    with recomputing():
        hidden = recomputed(norm, x)  # dropped; the backward computes norm(x) anew
        y = linear(hidden)

`torch.utils.checkpoint` repeats a whole region; here the results of single cheap functions are
dropped, however expensive the operations are that read them. Each is made once per backward and
gives the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass
class _Call:
    """One call of `recomputed`."""

    function: Callable[..., Any]
    arguments: list[Any]
    uses: int = 0  # times that something saved a part of the result
    left: int = 0  # of these, still to be asked for in this backward
    made: list[Tensor] = field(default_factory=list)

    def use(self) -> None:
        self.uses += 1
        if self.uses == 1:
            for argument in self.arguments:
                if isinstance(argument, _Dropped):
                    argument.call.use()

    def result(self, index: int) -> Tensor:
        if not self.made:
            self.left = self.uses
            with torch.no_grad():
                self.made = _tensors(self.function(*map(_unpack, self.arguments)))
        result = self.made[index]
        self.left -= 1
        if not self.left:
            self.made = []
        return result


@dataclass
class _Dropped:
    """In place of a saved tensor: how to make it, and which view of the result it was."""

    call: _Call
    index: int
    view: tuple[torch.Size, tuple[int, ...], int]  # size, stride, offset


# storage -> what made it; the tensor, so that it stays alive
_Scope = dict[int, tuple[_Call, int, Tensor]]
_scopes: list[_Scope] = []


@contextmanager
def recomputing() -> Iterator[None]:
    """Inside, `recomputed` drops what it makes."""
    scope: _Scope = {}
    _scopes.append(scope)
    try:
        with saved_tensors_hooks(lambda tensor: _pack(tensor, scope), _unpack):
            yield
    finally:
        _scopes.pop()
        scope.clear()


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args). Inside `recomputing`, the tensors it returns are dropped as described above.

    `function` must be pure and may itself save nothing but its arguments, or that is kept.
    """
    result = function(*args)
    remember(result, function, *args)
    return result


def remember(result: Any, function: Callable[..., Any], *args: Any) -> None:
    """`recomputed` of a result that is there already: function(*args) gives its bits again."""
    if _scopes:
        scope = _scopes[-1]
        call = _Call(
            function,
            [_known(arg.detach(), scope) if isinstance(arg, Tensor) else arg for arg in args],
        )
        for index, tensor in enumerate(_tensors(result)):
            scope[tensor.untyped_storage()._cdata] = call, index, tensor


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _known(tensor: Tensor, scope: _Scope) -> Tensor | _Dropped:
    """The tensor itself, or how to make it."""
    made = scope.get(tensor.untyped_storage()._cdata)
    if made is None:
        return tensor
    call, index, _ = made
    return _Dropped(call, index, (tensor.size(), tensor.stride(), int(tensor.storage_offset())))


def _pack(tensor: Tensor, scope: _Scope) -> Tensor | _Dropped:
    saved = _known(tensor, scope)
    if isinstance(saved, _Dropped):
        saved.call.use()
    return saved


def _unpack(saved: Any) -> Any:
    return (
        saved.call.result(saved.index).as_strided(*saved.view)
        if isinstance(saved, _Dropped)
        else saved
    )
