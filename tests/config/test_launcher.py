"""Half of a world, or a rank outside it, is refused in a sentence."""

import pytest

from dsv3_mtp.config.launcher import NEEDED, check_ranks

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": "2"}, "RANK=2 must be < WORLD_SIZE=2"),
        ({"RANK": "x"}, "RANK='x': must be a whole number >= 0"),
        ({"RANK": "9" * 400}, "must be a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0': must be a whole number >= 1"),
        ({"LOCAL_WORLD_SIZE": "-1"}, "LOCAL_WORLD_SIZE='-1'"),
        *(({name: None}, f"is set, {name} not") for name in NEEDED),
    ],
)
def test_what_no_launcher_says_is_refused(monkeypatch, change, said):
    for name, value in (WHOLE | change).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        check_ranks()


def test_a_world_and_no_world_are_taken(monkeypatch):
    for name in NEEDED:
        monkeypatch.delenv(name, raising=False)
    check_ranks()
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    check_ranks()
