"""The curves that schedules are made of."""

from math import cos, pi


def position(progress: float, begin: float, end: float) -> float:
    """Where progress stands between two fractions, in [0, 1]; 1 from `end` on."""
    if progress >= end:
        return 1.0
    return max(0.0, (progress - begin) / (end - begin))


def line(start: float, end: float, x: float) -> float:
    """From start to end while x goes from 0 to 1."""
    return start * (1 - x) + end * x


def cosine(start: float, end: float, x: float) -> float:
    """The same, slow at both ends."""
    return line(start, end, (1 - cos(pi * x)) / 2)
