"""Named ranges of a step in a profiler's trace: data, forward, heads, loss, backward, optimizer.

Without a profiler a range costs one comparison.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.profiler import record_function

P, R = ParamSpec("P"), TypeVar("R")
recording = False  # train/profile.py sets it while a profiler runs in this process


def named(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: what the function does has this name in a trace."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def inside(*args: P.args, **keywords: P.kwargs) -> R:
            if not recording:
                return function(*args, **keywords)
            with record_function(name):
                return function(*args, **keywords)

        return inside

    return decorate
