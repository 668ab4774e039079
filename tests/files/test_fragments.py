"""Ranges of tensors in the files of several ranks: written whole or not at all, read in any other
cut.
"""

import json
from itertools import pairwise

import pytest
import torch

from dsv3_mtp.files.fragments import (
    INDEX,
    Fragment,
    Fragments,
    merge_index,
    shard_name,
    write_fragments,
)
from tests.made_runs import read_state_dict


def write(folder, tensors, cuts):
    """Rank r writes elements cuts[r] .. cuts[r + 1] of each tensor, and their squares and step 7 as
    the optimizer's.
    """
    parts = []
    for rank, (start, stop) in enumerate(pairwise(cuts)):
        flat = {name: tensor.flatten()[start:stop] for name, tensor in tensors.items()}
        fragments = [
            Fragment(
                name,
                tuple(tensors[name].shape),
                start,
                values,
                {"exp_avg": values**2},
                {"step": 7.0},
            )
            for name, values in flat.items()
        ]
        parts.append(write_fragments(folder, rank, fragments)[0])
    return parts


@pytest.fixture
def stored(tmp_path):
    """(folder, tensors of 24 elements in it), in ranges of 5, 2, 10, 7."""
    tensors = {"a": torch.randn(4, 6), "b.c": torch.randn(2, 3, 4, dtype=torch.bfloat16)}
    (tmp_path / INDEX).write_text(
        json.dumps(merge_index(write(tmp_path, tensors, [0, 5, 7, 17, 24])))
    )
    return tmp_path, tensors


def test_every_range_is_read_from_every_cut(stored):
    folder, tensors = stored
    reader = Fragments(folder)
    for name, tensor in tensors.items():
        for start in range(24):
            for stop in range(start + 1, 25):
                assert torch.equal(reader.read(name, start, stop), tensor.flatten()[start:stop])
        assert torch.equal(reader.read(name, 4, 18, state="exp_avg"), tensor.flatten()[4:18] ** 2)
        assert reader.index[name]["scalars"] == {"step": 7.0}
    whole = read_state_dict(folder)
    assert all(torch.equal(whole[name], tensor) for name, tensor in tensors.items())


def test_the_shards_are_safetensors_files(stored):
    from safetensors.torch import load_file

    folder, tensors = stored
    content = load_file(folder / shard_name(2))
    assert set(content) == {"a", "a/exp_avg", "b.c", "b.c/exp_avg"}
    assert torch.equal(content["b.c"], tensors["b.c"].flatten()[7:17])


@pytest.mark.parametrize(
    "cuts", [[0, 5, 23], [1, 24], [0, 12, 24, 24 + 1]], ids=["end", "start", "over"]
)
def test_a_tensor_that_no_rank_or_two_ranks_wrote_in_part_makes_no_index(tmp_path, cuts):
    parts = write(tmp_path, {"a": torch.zeros(30)[:25]}, cuts)
    for part in parts:
        part[0]["shape"] = [24]
    with pytest.raises(RuntimeError, match=r"a \[24\]: not written once and wholly"):
        merge_index(parts)
    with pytest.raises(RuntimeError, match="not written once"):
        merge_index(
            [
                *write(tmp_path, {"a": torch.zeros(24)}, [0, 24]),
                *write(tmp_path, {"a": torch.zeros(24)}, [0, 24]),
            ]
        )


def test_ranks_that_disagree_about_a_tensor_make_no_index(tmp_path):
    first, second = write(tmp_path, {"a": torch.zeros(24)}, [0, 12, 24])
    second[0]["scalars"] = {"step": 8.0}
    with pytest.raises(RuntimeError, match="a: ranks disagree"):
        merge_index([first, second])


@pytest.mark.parametrize("keep", [4, 40, -1], ids=["no header", "half a header", "a byte of data"])
def test_a_damaged_shard_is_told_by_its_folder(stored, keep):
    folder, _ = stored
    shard = folder / shard_name(1)
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=f"{folder}: damaged .*delete {folder} to use the checkpoint before"
    ):
        read_state_dict(folder)


def test_a_damaged_index_and_another_format_are_told(stored):
    folder, _ = stored
    (folder / INDEX).write_text("[1, 2")
    with pytest.raises(ValueError, match="damaged"):
        Fragments(folder)
    (folder / INDEX).unlink()
    with pytest.raises(ValueError, match="older version of dsv3_mtp in DeepSpeed's own format"):
        Fragments(folder)
