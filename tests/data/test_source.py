import json
from pathlib import Path

import numpy as np
import pytest

from dsv3_mtp.data.megatron import open_pair
from dsv3_mtp.data.opening import build_missing
from dsv3_mtp.data.prepare import Arguments, prepare
from dsv3_mtp.data.source import check_documents, check_tokenizers, check_vocab, open_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with several shards."""
    root = tmp_path_factory.mktemp("prepared")
    lines = [json.dumps({"text": f"document {i} " * (1 + i % 5)}) for i in range(200)]
    (root / "in.jsonl").write_text("\n".join(lines))
    arguments = Arguments(
        inputs=(str(root / "in.jsonl"),), vocab_size=270, shard_tokens=500, val_fraction=0.2
    )
    prepare(root / "out", arguments)
    return root / "out"


def test_shards_are_one_array(folder: Path):
    source = open_source(folder, "train")
    index = json.loads((folder / "index.json").read_text())
    files = [folder / shard["file"] for shard in index["splits"]["train"]["shards"]]
    assert len(files) > 2
    whole = np.concatenate([open_pair(file)[0] for file in files]).astype(np.int64)
    assert (source.tokens, source.documents) == (len(whole), index["splits"]["train"]["documents"])
    assert source.bytes == index["splits"]["train"]["bytes"]
    for start, stop in [(0, len(whole)), (499, 1100), (5, 6), (len(whole) - 1, len(whole)), (7, 7)]:
        assert np.array_equal(source.read(start, stop), whole[start:stop])
    ends = source.read(0, len(whole))[source.document_starts[1:] - 1]
    assert (ends == index["eos_id"]).all()


def test_a_plain_pair_opens_with_and_without_suffix_and_is_known_by_its_documents_and_tokens(
    megatron,
):
    prefix = megatron([[[1, 2]], [[3]]])
    sources = [open_source(path, "train") for path in (prefix, f"{prefix}.bin", f"{prefix}.idx")]
    for source in sources:
        assert (source.manifest_hash, source.tokens, source.documents) == (
            sources[0].manifest_hash,
            3,
            2,
        )
        assert (source.vocab_size, source.bytes) == (None, None)
    same_index = open_source(megatron([[[2, 1]], [[3]]]), "train")
    assert same_index.manifest_hash != sources[0].manifest_hash


def test_nothing_to_open_says_how_to_prepare_or_finish(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"neither a prepared folder nor a Megatron prefix.*dsv3 prepare"
    ):
        open_source(tmp_path / "none", "train")
    (tmp_path / "some.partial").mkdir()
    with pytest.raises(ValueError, match=r"some\.partial is unfinished"):
        open_source(tmp_path / "some", "train")
    with pytest.raises(ValueError, match=r"has no index\.json"):
        open_source(tmp_path, "train")


def test_a_folder_that_is_not_ours_or_lacks_the_split_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="no split 'test', there are"):
        open_source(folder, "test")
    for content, message in [("{", "damaged"), ('{"format": "x"}', "format"), ("[]", "damaged")]:
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path, "train")


def test_a_shard_that_the_index_does_not_describe_is_refused(folder: Path, tmp_path: Path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for suffix in ("bin", "idx"):
        (tmp_path / f"train-00000.{suffix}").write_bytes(
            (folder / f"val-00000.{suffix}").read_bytes()
        )
    with pytest.raises(ValueError, match=r"train-00000\.bin: \d+ tokens in .* promises"):
        open_source(tmp_path, "train")


def test_a_vocabulary_above_the_models_is_refused_with_both_numbers(folder: Path, megatron):
    check_vocab(open_source(folder, "train"), 270)
    with pytest.raises(ValueError, match=r"vocab_size 270, but model\.vocab_size is 269"):
        check_vocab(open_source(folder, "train"), 269)
    plain = open_source(megatron([[[1, 99, 2]]]), "train")
    check_vocab(plain, 100)
    with pytest.raises(ValueError, match=r"token id 99, but model\.vocab_size is 99"):
        check_vocab(plain, 99)
    with pytest.raises(ValueError, match="token id -1"):
        check_vocab(open_source(megatron([[[1, -1]]], name="negative"), "train"), 100)


def test_masked_documents_too_short_for_a_depth_are_refused(megatron):
    """All losses would be 0 where there is no target."""
    source = open_source(megatron([[[1, 2, 3]], [[4]]]), "train")
    check_documents(source, 1, 2)
    with pytest.raises(
        ValueError, match=r"longest document has 3 tokens, .* depth 2 never has a target"
    ):
        check_documents(source, 2, 3)


def test_data_of_different_tokenizers_is_refused_where_it_says_of_which(folder: Path, megatron):
    (path, mine), plain = (
        (folder, open_source(folder, "train")),
        open_source(megatron([[[1, 2]]]), "train"),
    )
    check_tokenizers(
        (source.path, source.tokenizer_sha256) for source in (mine, plain, open_source(path, "val"))
    )
    with pytest.raises(ValueError, match="first and third have different tokenizers"):
        check_tokenizers([("first", "a"), ("second", None), ("third", "b"), ("fourth", "a")])


def test_a_users_own_folder_is_never_filled_with_the_builtin_corpus(
    tmp_path: Path, make_tiny_config
):
    """data.build is inherited from the base: a name that was mistyped must not train on it."""
    folder = tmp_path / "mine"
    config = make_tiny_config({"data.train": str(folder), "data.build": "pystdlib"})
    with pytest.raises(ValueError, match=rf"dsv3 prepare --input FILES --out {folder} --vocab"):
        build_missing(config)
    assert list(tmp_path.iterdir()) == []
