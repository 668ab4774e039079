"""What a launcher (deepspeed, torchrun) says of the ranks in the environment. No torch."""

import os

# Variable -> the least whole number that it may hold.
LEAST = {
    "RANK": 0,
    "WORLD_SIZE": 1,
    "LOCAL_RANK": 0,
    "LOCAL_SIZE": 1,
    "LOCAL_WORLD_SIZE": 1,
    "MASTER_PORT": 0,
}
NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def check_numbers() -> None:
    """Raises ValueError where a variable holds no number that a launcher sets."""
    wrong = [
        f"{name}={text!r}: must be a whole number >= {least}; a launcher sets it, or leave it out"
        for name, least in LEAST.items()
        if (text := os.environ.get(name)) is not None
        and not (text.isdecimal() and len(text) < 10 and int(text) >= least)
    ]
    if wrong:
        raise ValueError("environment: " + "\n  ".join(wrong))


def check_ranks() -> None:
    """Raises ValueError where the environment describes half of a world, or a rank outside it."""
    check_numbers()
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    missing = [name for name in NEEDED if name not in os.environ]
    if given and missing:
        raise ValueError(
            f"environment: {given[0]} is set, {', '.join(missing)} not; start with deepspeed or "
            f"torchrun, or leave {given[0]} out for one process"
        )
    rank, size = (int(os.environ.get(name, LEAST[name])) for name in ("RANK", "WORLD_SIZE"))
    if rank >= size:
        raise ValueError(f"environment: RANK={rank} must be < WORLD_SIZE={size}")
