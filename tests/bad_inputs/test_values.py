"""Every key of a config with every kind of wrong value: kept as it was written, or refused by a
sentence that names the key.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from dsv3_mtp.config import Config
from dsv3_mtp.config.depth_weights.base import DEPTH_WEIGHTS
from dsv3_mtp.config.loss_weights.base import LOSS_WEIGHTS
from dsv3_mtp.config.reader import ConfigError
from dsv3_mtp.config.task import TASKS
from dsv3_mtp.heads import registry
from tests.conftest import tiny

ABSURD = [10**30, -(10**30), 10**400, 1e30, -1e30, float("nan"), float("inf"), -float("inf")]
OTHERS = [None, True, False, -1, 0, 1, 1.5, -0.0, "", "x", "1", "true", b"hi", [], [1], ["x"]]
OTHERS += [{}, {"a": 1}, {"type": "x"}, {1: 2}, [[]]]
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
TASK = {"data.train": None, "data.val": None, "data.mask_documents": True, "data.seq_len": 256}
TASK |= {"model.max_position_embeddings": 256, "model.vocab_size": 128}
RAMP = {"train.batch_size_ramp": {"start": 4, "until": 0.5}, "train.batch_size": 8}
WEIGHTS: dict[str, dict] = {
    "constant": {"value": 0.1},
    "step": {"values": [0.3, 0.1], "at": [0.5]},
    "linear": {"start": 0.1, "end": 0.3},
    "cosine": {"start": 0.1, "end": 0.3},
    "exponential": {"start": 0.1, "end": 0.3},
    "piecewise": {"points": [[0.0, 0.1], [1.0, 0.2]]},
    "warmup": {"value": 0.1, "until": 0.2},
}
# A config, and the section whose keys it shows.
SHOWN = [
    (tiny(), ""),
    (tiny({"model.rope_scaling": YARN}), "model.rope_scaling"),
    (tiny(RAMP), "train.batch_size_ramp"),
    (tiny({"log.wandb": {"project": "p"}}), "log.wandb"),
    *((tiny({"mtp.depth_weights": {"type": t}}), "mtp.depth_weights") for t in DEPTH_WEIGHTS),
    *(
        (tiny({"mtp.loss_weight": {"type": t} | WEIGHTS[t]}), "mtp.loss_weight")
        for t in LOSS_WEIGHTS
    ),
    *((tiny({"mtp.mode": m, "mtp.num_nextn_predict_layers": 2}), "mtp") for m in registry()),
    *((tiny(TASK | {"data.task": {"type": t}}), "data.task") for t in TASKS),
]


def keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")


def at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def pairs() -> Iterator[tuple[Config, str, Any]]:
    """(config, key, wrong value)."""
    seen = set()
    for config, section in SHOWN:
        for key in keys(config.to_dict()):
            kind = (key, str(at(config.to_dict(), section).get("type")) if section else "")
            if key.startswith(section) and kind not in seen:
                seen.add(kind)
                yield from ((config, key, value) for value in [*ABSURD, *OTHERS])


def same(kept: Any, given: Any) -> bool:
    """The value as it was written; a whole number may be written 1.0, and a constant as it is."""
    if isinstance(kept, dict) and kept.get("type") == "constant" and not isinstance(given, dict):
        kept = kept["value"]
    return kept == given and isinstance(kept, bool) == isinstance(given, bool)


def fault(config: Config, key: str, value: Any) -> str | None:
    """What is wrong with the answer to a value; None: nothing."""
    try:
        kept = at(config.replace(key, value).to_dict(), key)
    except ConfigError as error:
        lines = str(error).splitlines()
        parent, _, name = key.rpartition(".")
        if not any(parent in line and name in line for line in lines[1:]):
            return f"does not name it: {error}"
        return f"is long: {error}" if any(len(line) > 300 for line in lines) else None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if isinstance(kept, dict) and isinstance(value, dict):
        return None  # a section of which some keys are given
    if any(value is one for one in ABSURD):
        return f"is kept as {kept!r}"
    return None if same(kept, value) else f"becomes {kept!r}"


@pytest.mark.parametrize(
    "step", [11, pytest.param(1, marks=pytest.mark.slow)], ids=["every 11th", "all"]
)
def test_a_wrong_value_is_kept_as_it_is_or_refused_by_its_key(step: int):
    cases = [*pairs()][::step]
    assert len(cases) > 4000 / step
    found = [
        (key, value, said) for config, key, value in cases if (said := fault(config, key, value))
    ]
    assert found == []
