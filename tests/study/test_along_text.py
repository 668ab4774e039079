"""What a study measures of a trained run along the text, beside its last validation."""

import json
from pathlib import Path

import pytest
import torch

from dsv3_mtp.config import Config
from dsv3_mtp.data.shards import FORMAT, VERSION
from dsv3_mtp.data.source import open_source
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.runs.model import load_model
from dsv3_mtp.study.expand import Run
from dsv3_mtp.study.measure import above_table, along_text
from dsv3_mtp.train.validation import validate
from tests.made_runs import randomise, write_run
from tests.ranks import write_markov

FLOORS = {f"val/floor/overlap/{kind}/{end}" for kind in ("constant", "table")
          for end in ("1", "2", "tokens_per_step")}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, make_tiny_config) -> tuple[Path, Run]:
    data = write_markov(tmp_path / "data/markov", tokens=3000, documents=40)
    keys = {"data.train": data, "data.val": data, "mtp.num_nextn_predict_layers": 2}
    config = make_tiny_config(keys | {"train.dtype": "float32", "eval.batches": 2})
    folder = tmp_path / "run"
    write_run(folder, config, randomise(DeepseekV3MTP(config.model, config.mtp)))
    return folder, Run("arm", 1, config)


def test_a_run_has_the_floors_of_its_drafts(run: tuple[Path, Run]):
    metrics = along_text(*run)
    assert metrics.keys() == FLOORS
    assert all(0 <= value <= 3 for value in metrics.values())
    above = above_table(metrics | {"val/overlap/1": 0.75})
    assert above == {"val/overlap_above_table/1": 0.75 - metrics["val/floor/overlap/table/1"]}


def test_packages_held_out_whole_are_a_validation_of_their_own(run: tuple[Path, Run]):
    folder, plan = run
    corpus = Path(str(plan.config.data.val)).with_name("corpus")  # a prepared folder of that text
    corpus.mkdir()
    splits = {}
    for split, seed in (("train", 1), ("val", 2), ("shift", 3)):
        write_markov(corpus / f"{split}-00000", tokens=3000, documents=40, seed=seed)
        shard = {"file": f"{split}-00000", "tokens": 3000, "documents": 40}
        shard["sha256"] = {"bin": "0" * 64, "idx": "0" * 64}
        splits[split] = {"tokens": 3000, "documents": 40, "bytes": 6000, "shards": [shard]}
    index = {"format": FORMAT, "version": VERSION, "manifest_hash": "0", "splits": splits}
    index |= {"vocab_size": plan.config.model.vocab_size, "eos_id": 0, "arguments": {}}
    index |= {"tokenizer_sha256": "0" * 64}
    (corpus / "index.json").write_text(json.dumps(index))
    tree = plan.config.to_dict()
    tree["data"] |= {"train": str(corpus), "val": str(corpus)}
    config = Config.model_validate(tree)
    metrics = along_text(folder, Run("arm", 1, config))
    model, cpu = load_model(folder).model, torch.device("cpu")
    expected = validate(model, open_source(corpus, "shift"), config, batches=2, device=cpu)
    shifted = {key.removeprefix("shift/"): metrics[key] for key in metrics.keys() - FLOORS}
    assert shifted == {key.removeprefix("val/"): value for key, value in expected.items()}
    assert {"main_loss", "bits_per_byte", "mtp_loss/1", "overlap/tokens_per_step"} <= set(shifted)
