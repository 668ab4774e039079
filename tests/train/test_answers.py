"""Text that a trunk writes itself: what it would have answered, prompts unscored, the same bytes
after a kill.
"""

import json
from itertools import pairwise

import pytest
import torch

from dsv3_mtp.data.shards import read_folder_index, verify_folder
from dsv3_mtp.data.source import open_source
from dsv3_mtp.data.tokenizer import load_encoder
from dsv3_mtp.decode.generate import generate
from dsv3_mtp.runs.model import load_model
from dsv3_mtp.train import answers
from dsv3_mtp.train.answers import AnswerArguments, write_answers
from tests.conftest import contents, tiny
from tests.made_runs import write_text_run


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of random weights with a tokenizer, and a file of twelve prompts."""
    config = tiny({"train.dtype": "float32"})
    model = config.model.model_copy(update={"vocab_size": 260, "max_position_embeddings": 48})
    config = config.model_copy(update={"model": model})
    monkeypatch.chdir(tmp_path)
    folder, _ = write_text_run(config, tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    records = [{"prompt": "plain text"[: 2 + n % 7] + str(n)} for n in range(12)]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder, prompts, [record["prompt"] for record in records]


def arguments(folder, prompts, **more):
    settings = {"max_new_tokens": 9, "batch": 5, "val_fraction": 0.3, "shard_tokens": 60}
    return AnswerArguments(run=str(folder), prompts=str(prompts), **settings | more)


def documents(source):
    starts = source.document_starts
    for start, stop in pairwise(starts):
        yield source.read(start, stop).tolist(), source.read_scored(start, stop).tolist()


def test_answers_are_the_main_models_samples_and_prompts_are_no_targets(tmp_path, run):
    folder, prompts, texts = run
    wanted = arguments(folder, prompts)
    index = write_answers(tmp_path / "own", wanted)
    verify_folder(tmp_path / "own")
    assert index["arguments"]["temperature"] == 1.0 and index["arguments"]["seed"] == 0
    encoder, model = load_encoder(tmp_path / "own/tokenizer.json"), load_model(folder).model
    ids = [encoder.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    expected = []
    for number in range(3):
        part = ids[number * 5 : number * 5 + 5]
        settings = wanted.settings(number, eos=encoder.eos_id)
        assert (settings.temperature, settings.top_p, settings.draft_depth) == (1.0, 1.0, 0)
        found = generate(model, part, settings).tokens
        expected += [
            (prompt + answer, [False] * len(prompt) + [True] * len(answer))
            for prompt, answer in zip(part, found, strict=True)
        ]
    found = [
        document
        for split in ("train", "val")
        for document in documents(open_source(tmp_path / "own", split))
    ]
    assert sorted(found) == sorted(expected) and len(found) == 12
    assert len({tuple(tokens) for tokens, _ in found}) == 12


def test_a_kill_changes_no_byte_and_other_arguments_are_refused(tmp_path, run, monkeypatch):
    folder, prompts, _ = run
    write_answers(tmp_path / "whole", arguments(folder, prompts))
    left = iter([True])

    def killed(*args):
        if not next(left, None):
            raise KeyboardInterrupt
        return generate(*args)

    monkeypatch.setattr(answers, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        write_answers(tmp_path / "parts", arguments(folder, prompts))
    monkeypatch.setattr(answers, "generate", generate)
    with pytest.raises(ValueError, match="was begun with another seed; repeat it"):
        write_answers(tmp_path / "parts", arguments(folder, prompts, seed=3))
    write_answers(tmp_path / "parts", arguments(folder, prompts))
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    with pytest.raises(ValueError, match="made with other arguments"):
        write_answers(tmp_path / "parts", arguments(folder, prompts, temperature=0.5))
    assert read_folder_index(tmp_path / "parts")["version"] == 2


def test_weights_that_were_trained_on_since_do_not_go_on_with_older_answers(
    tmp_path, run, monkeypatch
):
    folder, prompts, _ = run
    write_answers(tmp_path / "own", arguments(folder, prompts))

    def moved(path):
        loaded = load_model(path)
        with torch.no_grad():
            loaded.model.lm_head.weight.mul_(1.01)
        return loaded

    monkeypatch.setattr(answers, "load_model", moved)
    with pytest.raises(ValueError, match="weights"):
        write_answers(tmp_path / "own", arguments(folder, prompts))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file"),
        ("empty.txt", "\n\n", "holds no prompt"),
        ("empty.jsonl", "", "holds no prompt"),
        ("keys.jsonl", '{"text": "a"}\n', "line 1: holds no prompt"),
        ("chat.jsonl", '{"messages": []}\n', "the run has no chat template"),
        ("long.txt", "word " * 60 + "\n", "max_position_embeddings"),
    ],
)
def test_prompts_that_cannot_be_used_are_one_sentence(tmp_path, run, name, content, message):
    folder, _, _ = run
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.*{message}" if name != "chat.jsonl" else message):
        write_answers(tmp_path / "own", arguments(folder, tmp_path / name))
    assert not (tmp_path / "own").exists()
