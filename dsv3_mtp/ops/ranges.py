"""Named ranges of a step in a profiler's trace: data, forward, heads, loss, backward, optimizer.

Without a profiler a range costs one comparison.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch.profiler import record_function

F = TypeVar("F", bound=Callable[..., Any])
recording = False  # train/profile.py sets it while a profiler runs in this process


def named(name: str) -> Callable[[F], F]:
    """Decorator: what the function does has this name in a trace."""

    def decorate(function: F) -> F:
        @wraps(function)
        def inside(*arguments: Any, **keywords: Any) -> Any:
            if not recording:
                return function(*arguments, **keywords)
            with record_function(name):
                return function(*arguments, **keywords)

        return inside  # type: ignore[return-value]

    return decorate
