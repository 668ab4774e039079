"""README.md of an export says what the run says, and how each reader loads the folder."""

import json
import re
from pathlib import Path

import pytest
import yaml

from dsv3_mtp.data.tokenizer import train_tokenizer
from dsv3_mtp.hf import export_hf, import_hf
from dsv3_mtp.hf.readers import commands, findings
from dsv3_mtp.runs.verify import verify

DOCS = Path(__file__).parents[2] / "docs"
RECORD = {"step": 7, "tokens": 1024, "val/main_loss": 3.21, "val/bits_per_byte": 1.5}
RECORD |= {"val/overlap/1": 0.777, "val/floor/overlap/table/1": 0.555}
FLOORS = {"val/floor/unigram": 5.0, "val/floor/bigram": 4.0, "val/floor/trigram": 3.0}


@pytest.fixture
def card(make_run, tmp_path):
    """card(records, ...) -> the card of a run that logged these records."""

    def make(*records, dtype="bf16", **overrides):
        run, _ = make_run(**overrides)
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
        export_hf(run, tmp_path / "hf", dtype=dtype)
        return (tmp_path / "hf/README.md").read_text()

    return make


def test_the_card_has_the_numbers_of_the_checkpoint_beside_their_floors(card, tmp_path):
    other = {"step": 6, "tokens": 512, "val/main_loss": 9.87}
    text = card(other, RECORD | FLOORS)
    front = yaml.safe_load(text.split("---")[1])
    assert "license" not in front and "multi-token-prediction" in front["tags"]
    assert (
        "| main loss, nats per token | 3.210 | unigram 5.000, bigram 4.000, trigram 3.000 |" in text
    )
    assert "| overlap of depth 1 | 0.777 | table drafter 0.555 |" in text and "9.87" not in text
    assert "is not below the trigram floor (3.000)" in text
    assert "(7 steps) of tiny |" in text and str(tmp_path) not in text


def test_without_a_validation_of_these_weights_there_are_no_numbers(card):
    assert "The weights of step 7 were not validated." in card(RECORD | {"step": 6})


def test_a_reader_that_does_not_load_it_gets_no_command(card):
    text = card(dtype="fp8", model__q_lora_rank=192, mtp__num_nextn_predict_layers=2)
    assert text.count("use --dtype bf16") == 3 and "```" not in text
    assert "D = 2, sequential" in text


def test_commands_are_those_of_the_page_and_of_what_a_reader_can_do(make_tiny_config):
    page = (DOCS / "huggingface.md").read_text()
    found = findings(make_tiny_config().model, [], 1, "bf16")
    for reader in ("transformers", "vllm", "sglang"):
        mine = [one for one in found if one.reader == reader]
        _, text = commands(reader, 1, mine)
        for line in text.replace("MODEL", "hf/v3_tiny").splitlines():
            assert line in page
        assert "specul" not in commands(reader, 0, mine)[1]
    assert "specul" not in commands("sglang", 2, [])[1]
    assert '"num_speculative_tokens": 2' in commands("vllm", 2, [])[1]


def test_the_lines_for_transformers_run(card, tmp_path):
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    data = tmp_path / "data"
    data.mkdir()
    (data / "tokenizer.json").write_text(train_tokenizer(["plain text"], 260))
    sizes = {"model__vocab_size": 260, "model__max_position_embeddings": 64}
    text = card(RECORD, data__train=str(data), **sizes)
    (code,) = re.findall("```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(code.replace("MODEL", str(tmp_path / "hf")), names)
    assert names["model"].config.num_nextn_predict_layers == 1


def test_the_card_is_the_users_to_edit(card, tmp_path):
    card(RECORD)
    (tmp_path / "hf/README.md").write_text("mine")
    assert verify(tmp_path / "hf") == []
    import_hf(tmp_path / "hf", tmp_path / "run")
    assert not list((tmp_path / "run").rglob("README.md"))
    export_hf(tmp_path / "run", tmp_path / "again")
    text = (tmp_path / "again/README.md").read_text()
    assert "the weights were imported" in text and "No training run of these weights" in text
