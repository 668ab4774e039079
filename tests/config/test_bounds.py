"""What would keep the machine busy is refused within a second: aliases, nesting, sizes."""

import time

import pytest

from dsv3_mtp.config import ModelConfig
from dsv3_mtp.config.reader import ConfigError
from dsv3_mtp.config.tree import read_tree
from tests.conftest import TINY_CONFIG

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "its aliases stand for 1,362,025,166 values"),
        ("[" * 5000, "nested deeper than"),
        ("{a: " * 60 + "1" + "}" * 60, "nested deeper than"),
        ("a: &x [*x]", "an anchor contains itself"),
        ("a: " + "x" * 2_000_000, "characters, more than"),
    ],
    ids=["bomb", "deep list", "deep mapping", "itself", "long"],
)
def test_a_file_of_endless_values_is_refused_at_once(tmp_path, text, reason):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(ConfigError, match=reason):
        read_tree(path)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "key", [key for key, value in TINY_CONFIG["model"].items() if isinstance(value, int)]
)
def test_no_size_of_a_model_may_be_a_thousand_million(key):
    with pytest.raises(ValueError, match=r"less than or equal to|must be <="):
        ModelConfig.model_validate(TINY_CONFIG["model"] | {key: 10**9})
