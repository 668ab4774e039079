import json
import multiprocessing
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsv3_mtp.data import tokenise
from dsv3_mtp.data.prepare import Arguments, prepare
from dsv3_mtp.data.shards import verify_folder
from dsv3_mtp.data.source import open_source
from dsv3_mtp.data.tokenizer import train_tokenizer
from tests.conftest import contents

OPTIONS = {"vocab_size": 280, "shard_tokens": 1500, "val_fraction": 0.2, "fim_rate": 0.3}


def texts(count: int) -> list[str]:
    words, draw = ["alpha", "beta", "gamma", "delta\n"], random.Random(0)
    return [" ".join(draw.choices(words, k=draw.randint(1, 30))) + str(i) for i in range(count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """One file of each kind."""
    root, all_texts = tmp_path_factory.mktemp("in"), [*texts(300), ""]
    (root / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in all_texts[:150]))
    (root / "b.txt").write_text(all_texts[150])
    pq.write_table(pa.table({"text": all_texts[151:]}), root / "c.parquet")
    return tuple(str(root / name) for name in ("a.jsonl", "b.txt", "c.parquet"))


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    prepare(out, Arguments(inputs=files, **OPTIONS))
    return out


def test_a_prepared_folder_holds_its_files_and_nothing_else(whole: Path):
    index = json.loads((whole / "index.json").read_text())
    shards = [shard["file"] for split in index["splits"].values() for shard in split["shards"]]
    expected = {f"{shard}.{suffix}" for shard in shards for suffix in ("bin", "idx")}
    assert set(contents(whole)) == expected | {"index.json", "tokenizer.json"}
    assert not whole.with_name("out.partial").exists()
    assert index["empty_documents"] == 1
    assert sum(split["documents"] for split in index["splits"].values()) == 300
    assert sum(split["bytes"] for split in index["splits"].values()) == len("".join(texts(300)))
    assert len(shards) > 5 and index["dtype"] == "uint16" and index["vocab_size"] == 280


@pytest.mark.parametrize("moments", [[0], [3], [1, 1, 1], [20], [2, 9, 4]])
def test_interrupted_anywhere_the_result_is_byte_identical(
    files, whole, tmp_path, monkeypatch, moments
):
    # saved every few batches, when a shard is full
    monkeypatch.setattr(tokenise, "BATCH_DOCUMENTS", 10)
    out = tmp_path / "out"
    for moment in moments:
        calls = iter(range(moment, -1, -1))

        def interrupt(*_, calls=calls) -> None:
            if next(calls) == 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare(out, Arguments(inputs=files, **OPTIONS), progress=interrupt)
        assert not out.exists() and (tmp_path / "out.partial").exists()
    prepare(out, Arguments(inputs=files, **OPTIONS))
    assert contents(out) == contents(whole)


def test_batches_do_not_show_in_the_result(files, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 100)
    monkeypatch.setattr(tokenise, "SAVE_SECONDS", 0.0)
    prepare(tmp_path / "out", Arguments(inputs=files, **OPTIONS))
    assert contents(tmp_path / "out") == contents(whole)


def interrupted(out: Path, files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tokenise, "BATCH_DOCUMENTS", 10)
    steps = iter(range(20))

    def interrupt(*_) -> None:
        if next(steps) == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(out, Arguments(inputs=files, **OPTIONS), progress=interrupt)
    return out.with_name(out.name + ".partial")


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx", "tokenizer.json"])
def test_what_was_damaged_meanwhile_is_refused(files, tmp_path, monkeypatch, name):
    partial = interrupted(tmp_path / "out", files, monkeypatch)
    (partial / name).write_bytes(b"\1" + (partial / name).read_bytes()[1:])
    with pytest.raises(ValueError, match=rf"{name}: .*(\n.*)*delete"):
        prepare(tmp_path / "out", Arguments(inputs=files, **OPTIONS))


def test_a_lost_open_shard_is_refused(files, tmp_path, monkeypatch):
    partial = interrupted(tmp_path / "out", files, monkeypatch)
    state = json.loads((partial / "progress.json").read_text())["splits"]["train"]
    assert state["open"]["documents"] > 0
    (partial / f"train-{len(state['shards']):05d}.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bin: 0 bytes, at least \d+ were recorded"):
        prepare(tmp_path / "out", Arguments(inputs=files, **OPTIONS))


@pytest.mark.parametrize("finished", [True, False])
def test_other_arguments_on_an_existing_folder_are_refused(
    files, whole, tmp_path, monkeypatch, finished
):
    out = whole if finished else interrupted(tmp_path / "out", files, monkeypatch).with_name("out")
    before = contents(out if finished else tmp_path / "out.partial")
    with pytest.raises(ValueError, match=r"made with other arguments.*(\n.*)*seed: 0 there, 1 now"):
        prepare(out, Arguments(inputs=files, seed=1, **OPTIONS))
    with pytest.raises(ValueError, match="files: other contents"):
        prepare(out, Arguments(inputs=files[:1], **OPTIONS))
    assert contents(out if finished else tmp_path / "out.partial") == before


def test_inputs_that_changed_since_the_interruption_are_refused(files, tmp_path, monkeypatch):
    copy = tmp_path / "a.jsonl"
    copy.write_bytes(Path(files[0]).read_bytes())
    interrupted(tmp_path / "out", (str(copy), *files), monkeypatch)
    copy.write_bytes(copy.read_bytes().replace(b"alpha", b"omega"))
    with pytest.raises(ValueError, match="input files changed"):
        prepare(tmp_path / "out", Arguments(inputs=(str(copy), *files), **OPTIONS))


def test_a_finished_folder_is_left_alone_and_a_foreign_one_refused(files, whole, tmp_path):
    before = (whole / "index.json").stat().st_mtime_ns
    assert prepare(whole, Arguments(inputs=files, **OPTIONS)) == json.loads(
        (whole / "index.json").read_text()
    )
    assert (whole / "index.json").stat().st_mtime_ns == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no prepared folder"):
        prepare(tmp_path, Arguments(inputs=files, **OPTIONS))
    assert list(contents(tmp_path)) == ["notes.txt"]


def test_formats_agree(files, tmp_path):
    all_texts = texts(40)
    (tmp_path / "folder").mkdir()
    for i, text in enumerate(all_texts):
        (tmp_path / f"folder/{i:02d}.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in all_texts))
    pq.write_table(pa.table({"text": all_texts}), tmp_path / "a.parquet")
    results = []
    for name in ("folder", "a.jsonl", "a.parquet"):
        index = prepare(
            tmp_path / f"out-{name}", Arguments(inputs=(str(tmp_path / name),), **OPTIONS)
        )
        results.append((index["splits"], index["manifest_hash"], index["tokenizer_sha256"]))
    assert results[0] == results[1] == results[2]


def test_a_given_tokenizer_is_kept_as_it_is(files, tmp_path):
    (tmp_path / "t.json").write_text(train_tokenizer(texts(50), 270))
    index = prepare(tmp_path / "out", Arguments(inputs=files, tokenizer=str(tmp_path / "t.json")))
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "t.json").read_bytes()
    assert index["vocab_size"] == 270
    (tmp_path / "t.json").write_text((tmp_path / "t.json").read_text() + "\n")
    with pytest.raises(ValueError, match="tokenizer: other contents"):
        prepare(tmp_path / "out", Arguments(inputs=files, tokenizer=str(tmp_path / "t.json")))


def test_fim_without_its_tokens_and_splits_without_documents_are_refused(files, tmp_path):
    plain = train_tokenizer(texts(50), 270).replace("<|fim_hole|>", "<|other|>")
    (tmp_path / "t.json").write_text(plain)
    with pytest.raises(ValueError, match=r"t\.json has no fill-in-the-middle tokens"):
        prepare(
            tmp_path / "a",
            Arguments(inputs=files, tokenizer=str(tmp_path / "t.json"), fim_rate=0.1),
        )
    with pytest.raises(ValueError, match=r"1 documents .* gave 1 for train and 0 for val"):
        prepare(
            tmp_path / "b",
            Arguments(inputs=files[1:2], tokenizer=str(tmp_path / "t.json"), val_fraction=1e-6),
        )
    prepare(
        tmp_path / "c",
        Arguments(inputs=files[1:2], tokenizer=str(tmp_path / "t.json"), val_fraction=0),
    )
    with pytest.raises(ValueError, match="the split 'val' is empty"):
        open_source(tmp_path / "c", "val")


def test_all_wrong_arguments_are_named_at_once():
    with pytest.raises(ValueError) as caught:
        Arguments(val_fraction=1.0, fim_rate=-1, shard_tokens=0)
    for name in (
        "--corpus or --input",
        "--tokenizer or --vocab-size",
        "val_fraction 1.0",
        "fim_rate",
        "shard_tokens",
    ):
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="split of pystdlib is fixed"):
        Arguments(corpus="pystdlib", vocab_size=300, val_fraction=0.2)


def test_verify_names_every_damaged_file(whole, tmp_path):
    for name, content in contents(whole).items():
        (tmp_path / name).write_bytes(content)
    verify_folder(tmp_path)
    (tmp_path / "val-00000.bin").write_bytes(b"")
    (tmp_path / "train-00001.idx").unlink()
    with pytest.raises(
        ValueError, match=r"train-00001\.idx: sha256 is missing(.|\n)*val-00000\.bin"
    ):
        verify_folder(tmp_path)


def test_building_pystdlib_again_gives_the_same_bytes_and_its_manifest(
    pystdlib, small_stdlib, tmp_path, monkeypatch
):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(small_stdlib))
    index = prepare(tmp_path / "again", Arguments(corpus="pystdlib", vocab_size=512))
    assert contents(tmp_path / "again") == contents(pystdlib)
    manifest = json.loads((pystdlib / "manifest.json").read_text())
    assert (
        manifest["manifest_hash"]
        == index["manifest_hash"]
        == open_source(pystdlib, "train").manifest_hash
    )
    assert len(manifest["files"]) == 120
    with pytest.raises(ValueError, match="vocab_size: 512 there, 513 now"):
        prepare(tmp_path / "again", Arguments(corpus="pystdlib", vocab_size=513))


def build(out: Path, files: tuple[str, ...], start) -> None:
    start.wait()
    prepare(out, Arguments(inputs=files, **OPTIONS))


def test_concurrent_builders_make_one_right_folder(files, whole, tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    builders = [
        context.Process(target=build, args=(tmp_path / "out", files, start)) for _ in range(3)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    assert [builder.exitcode for builder in builders] == [0, 0, 0]
    assert contents(tmp_path / "out") == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("out", ["", ".", "/"])
def test_a_folder_that_has_no_name_cannot_be_made(out: str):
    with pytest.raises(ValueError, match="names no folder to make"):
        prepare(out, Arguments(inputs=("x",), vocab_size=300))


def test_what_failed_before_its_first_document_leaves_nothing_behind(tmp_path):
    """So that the advice of its message can be followed: name the key, with other arguments."""
    pq.write_table(pa.table({"content": texts(40)}), tmp_path / "a.parquet")
    options = {"inputs": (str(tmp_path / "a.parquet"),), "val_fraction": 0.3}
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(texts(40), 280))
    options |= {"tokenizer": str(tmp_path / "tokenizer.json")}
    with pytest.raises(ValueError, match="--text-key"):
        prepare(tmp_path / "out", Arguments(**options))
    assert not (tmp_path / "out.partial").exists()
    assert prepare(tmp_path / "out", Arguments(text_key="content", **options))["splits"]


def test_one_text_file_is_split_by_position_and_the_error_says_how(tmp_path):
    (tmp_path / "whole.txt").write_text("\n".join(texts(100)))
    options = {"inputs": (str(tmp_path / "whole.txt"),), "vocab_size": 280}
    with pytest.raises(ValueError, match=r"1 for train and 0 for val.*--val-by-position"):
        prepare(tmp_path / "out", Arguments(**options))
    splits = prepare(tmp_path / "out", Arguments(val_by_position=True, **options))["splits"]
    assert splits["train"]["documents"] == splits["val"]["documents"] == 1
    assert 0 < splits["val"]["bytes"] < 0.1 * splits["train"]["bytes"] + 100
