"""Questions and answers: only answers are targets, from the JSON lines to the loss."""

import json

import numpy as np
import pytest

from dsv3_mtp.config import Config
from dsv3_mtp.data.chat import Piece, read_template, record_pieces
from dsv3_mtp.data.opening import open_sources
from dsv3_mtp.data.prepare import Arguments, prepare
from dsv3_mtp.data.sampler import sequential_windows
from dsv3_mtp.data.shards import verify_folder
from dsv3_mtp.data.source import open_source
from dsv3_mtp.data.tokenizer import load_encoder, train_tokenizer
from tests.conftest import TINY_CONFIG

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = {
    "messages": [
        {"role": "user", "content": "say <|end|> twice"},
        {"role": "assistant", "content": "end end"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "no"},
    ]
}


@pytest.fixture
def tokenizer(tmp_path):
    """tokenizer.json with a chat template beside it."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    content = json.loads(train_tokenizer(["plain text"], 260))
    for number, name in enumerate(["<|user|>", "<|assistant|>", "<|end|>"], start=260):
        content["added_tokens"].append(
            content["added_tokens"][0] | {"id": number, "content": name, "special": True}
        )
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = {"bos_token": {"content": "<|endoftext|>"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer.json"


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_targets_of_a_chat_are_what_the_assistant_says_and_the_end_of_its_turn(tokenizer):
    encoder = load_encoder(tokenizer)
    assert {"<|user|>", "<|end|>"} <= encoder.specials
    template = read_template(tokenizer)
    pieces = record_pieces(CHAT, template, specials=encoder.specials, place="here")
    scored = [piece.text for piece in pieces if piece.scored]
    assert scored == ["end end", "<|end|>", "no", "<|end|>"]
    whole = "".join(piece.text for piece in pieces)
    import jinja2  # the template's own meaning, by the library that it is written for

    assert whole == jinja2.Template(TEMPLATE).render(**CHAT, bos_token="<|endoftext|>")
    ids, flags = encoder.encode_pieces(pieces)
    # what the user wrote is no special token, what the template wrote is one
    end = encoder.tokenizer.token_to_id("<|end|>")
    assert list(ids).count(end) == 2 and all(flags[ids == end])
    assert encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == (
        whole + "<|endoftext|>"
    )
    assert flags[-1]  # the end of text follows an answer


def test_a_document_that_ends_with_the_end_of_text_has_it_once(tokenizer):
    encoder = load_encoder(tokenizer)
    ids, scored = encoder.encode_pieces(
        (Piece("a", True), Piece("<|endoftext|>", False, special=True))
    )
    assert ids.tolist()[1:] == [encoder.eos_id] and scored.tolist() == [True, False]


def test_prompts_are_unscored_in_shards_windows_and_after_an_interruption(tmp_path, monkeypatch):
    records = [{"prompt": f"{n}+{n}=", "completion": f" {2 * n}"} for n in range(60)]
    source = lines(tmp_path / "sums.jsonl", *records)
    arguments = Arguments(inputs=(source,), vocab_size=260, mask="prompts", shard_tokens=150)
    index = prepare(tmp_path / "whole", arguments)
    assert index["version"] == 2
    verify_folder(tmp_path / "whole")

    import dsv3_mtp.data.tokenise as tokenise

    monkeypatch.setattr(tokenise, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(tokenise, "SAVE_SECONDS", 0.0)
    real, left = tokenise.Tokenising._write, iter([True, True, True, True])

    def killed(self, *args):
        if not next(left, None):
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(tokenise.Tokenising, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "parts", arguments)
    monkeypatch.setattr(tokenise.Tokenising, "_write", real)
    prepare(tmp_path / "parts", arguments)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name

    train = open_source(tmp_path / "whole", "train")
    encoder = load_encoder(tmp_path / "whole/tokenizer.json")
    text, kept = "", ""
    for token, flag in zip(
        train.read(0, train.tokens), train.read_scored(0, train.tokens), strict=True
    ):
        piece = encoder.tokenizer.decode([token], skip_special_tokens=False)
        text, kept = text + piece, kept + piece * bool(flag)
    answers = [document.split("=")[1] for document in text.split("<|endoftext|>")[:-1]]
    assert kept == "".join(answer + "<|endoftext|>" for answer in answers)
    assert train.targets == len(kept) - len(answers) * (len("<|endoftext|>") - 1)
    assert train.bytes == sum(map(len, answers))
    for window in sequential_windows(train, seq_len=16, lookahead=2, count=5):
        tokens, documents, scored = window
        assert scored.dtype == np.bool_ and scored.shape == tokens.shape == documents.shape


def config(train, val, mask, **data) -> Config:
    sections = {name: dict(values) for name, values in TINY_CONFIG.items()}
    sections["model"]["vocab_size"] = 300
    sections["data"] |= {"train": train, "val": val, "mask": mask} | data
    return Config.model_validate(sections)


def test_a_mixture_masks_chats_and_scores_all_of_the_text(tmp_path):
    sums = [{"prompt": f"{n}+{n}=", "completion": f" {2 * n}"} for n in range(60)]
    source = lines(tmp_path / "sums.jsonl", *sums)
    prepare(tmp_path / "sums", Arguments(inputs=(source,), vocab_size=260, mask="prompts"))
    source = lines(tmp_path / "text.jsonl", *({"text": f"text number {n}"} for n in range(60)))
    tokens = str(tmp_path / "sums/tokenizer.json")
    prepare(tmp_path / "text", Arguments(inputs=(source,), tokenizer=tokens))
    sums, text = str(tmp_path / "sums"), str(tmp_path / "text")
    mixture = [{"path": path, "weight": 1} for path in (sums, text)]
    sampler, _ = open_sources(config(mixture, text, "prompts"))
    [(rows, _, scored)] = sampler.next_batch(8)
    assert rows.shape == scored.shape
    shares = scored.mean(1)  # a row of each source in turn
    assert all(shares[1::2] == 1) and all(shares[::2] < 0.7) and all(shares[::2] > 0.2)
    for mask, train, message in (
        ("prompts", text, "was not prepared with --mask prompts"),
        ("none", sums, "set data.mask: prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            open_sources(config(train, train, mask))
    with pytest.raises(ValueError, match=r"data.mask none: stages pass on tokens"):
        Config.model_validate(
            config(sums, sums, "prompts").to_dict() | {"parallel": {"pipeline_stages": 2}}
        )


def test_a_scored_file_of_another_length_is_one_sentence(tmp_path):
    sums = [{"prompt": f"{n}=", "completion": f" {n}"} for n in range(40)]
    source = lines(tmp_path / "sums.jsonl", *sums)
    prepare(tmp_path / "sums", Arguments(inputs=(source,), vocab_size=260, mask="prompts"))
    path = tmp_path / "sums/train-00000.scored"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"train-00000.scored: \d+ bytes, one for each of \d+"):
        open_source(tmp_path / "sums", "train")
    path.unlink()
    with pytest.raises(ValueError, match=r"train-00000.scored: 0 bytes"):
        open_source(tmp_path / "sums", "train")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "has only .'text'.; --mask prompts reads the keys prompt and completion"),
        ({"prompt": "a", "completion": ""}, "holds no answer"),
        ({"prompt": "a", "completion": 3}, "'completion' is int, must be a string"),
        ({"messages": [{"role": "user", "content": "a"}]}, "holds no answer"),
        ({"messages": []}, "must be a list of messages"),
        ({"messages": [{"content": "a"}]}, "message 0 has no role"),
    ],
)
def test_records_without_answers_are_refused_with_file_and_line(
    tmp_path, tokenizer, record, message
):
    source = lines(tmp_path / "bad.jsonl", CHAT, record)
    arguments = Arguments(inputs=(source,), tokenizer=str(tokenizer), mask="prompts")
    with pytest.raises(ValueError, match=f"bad.jsonl, line 2: .*{message}"):
        prepare(tmp_path / "out", arguments)


def test_chats_need_a_template_and_templates_that_drop_messages_are_refused(tmp_path, tokenizer):
    source = lines(tmp_path / "chat.jsonl", CHAT)
    arguments = Arguments(inputs=(source,), vocab_size=260, mask="prompts")
    with pytest.raises(ValueError, match=r"line 1: has messages, but no chat template stands"):
        prepare(tmp_path / "out", arguments)
    tokenizer.with_name("chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    arguments = Arguments(inputs=(source,), tokenizer=str(tokenizer), mask="prompts")
    with pytest.raises(ValueError, match="each must stand in the text once and in order"):
        prepare(tmp_path / "out2", arguments)
