"""tools/evaluate.py: the numbers of training again, of a run and of its export; tasks of
lm-evaluation-harness.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dsv3_mtp.cli import command
from dsv3_mtp.config import ConfigError, load_config
from dsv3_mtp.data.opening import open_sources
from dsv3_mtp.data.prepare import Arguments, prepare
from dsv3_mtp.data.source import open_source
from dsv3_mtp.decode import generation
from dsv3_mtp.decode.generate import generate
from dsv3_mtp.hf import export_hf, import_hf
from dsv3_mtp.runs.model import load_model
from dsv3_mtp.train import validation
from dsv3_mtp.train.validation import open_model, validate

CPU = torch.device("cpu")
VOCAB = 300


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A prepared folder of a few hundred lines of code."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [f"def f{i}(x):\n    return x * {i} + {i % 7}\n\n" for i in range(400)]
    for number in range(20):
        (folder / f"{number}.txt").write_text("".join(lines[number * 20 : number * 20 + 20]))
    prepare(
        folder / "data",
        Arguments(inputs=(str(folder / "*.txt"),), vocab_size=VOCAB, val_fraction=0.3),
    )
    return folder / "data"


@pytest.fixture
def run(make_run, corpus) -> Path:
    sizes = {"model__vocab_size": VOCAB, "model__max_position_embeddings": 64}
    return make_run(
        data__train=str(corpus), data__val=str(corpus), mtp__num_nextn_predict_layers=2, **sizes
    )[0]


def call(monkeypatch, capsys, *arguments: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments, "--json"])
    code = command.run("evaluate")
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def test_a_run_and_its_float32_export_have_the_same_losses(
    run, corpus, tmp_path, monkeypatch, capsys
):
    export_hf(run, tmp_path / "hf", dtype="fp32")
    sizes = ("--batches", "3", "--prompts", "0", "--micro-batch-size", "2")
    (of_run,) = call(monkeypatch, capsys, "--run", str(run), *sizes).values()
    # what a run is validated on, and evaluated by default
    assert load_config(run / "config.yaml").eval.batches == 2
    default, two = (
        call(monkeypatch, capsys, "--run", str(run), *n, *sizes[2:])
        for n in ([], ["--batches", "2"])
    )
    assert default == two != {str(corpus): of_run}
    data = ("--data", str(corpus), "--seq-len", "16")
    (of_export,) = call(monkeypatch, capsys, "--hf", str(tmp_path / "hf"), *data, *sizes).values()
    assert of_run == of_export
    names = [
        "main_loss",
        "mtp_loss/1",
        "mtp_loss/2",
        "top1/0",
        "top1/1",
        "top1/2",
        "agreement/1",
        "agreement/2",
    ]
    overlaps = ["overlap/1", "overlap/2", "overlap/tokens_per_step"]
    ends = ("1", "2", "tokens_per_step")
    kinds = ("constant", "table")
    floors = {f"val/floor/overlap/{kind}/{end}" for kind in kinds for end in ends}
    names += [*overlaps, "bits_per_byte"]
    assert set(of_run) == {f"val/{name}" for name in names} | floors
    assert of_run["val/main_loss"] == pytest.approx(5.7, abs=0.3)  # ln 300: random weights
    source = open_source(corpus, "val")
    bits = of_run["val/main_loss"] / 0.6931471805599453 * source.tokens / source.bytes
    assert of_run["val/bits_per_byte"] == pytest.approx(bits)


def test_data_of_another_tokenizer_is_refused(run, corpus, tmp_path, monkeypatch, capsys):
    shutil.copytree(corpus, tmp_path / "other")
    index = json.loads((corpus / "index.json").read_text()) | {"tokenizer_sha256": "0"}
    (tmp_path / "other/index.json").write_text(json.dumps(index))
    export_hf(run, tmp_path / "hf")
    for model in (("--run", str(run)), ("--hf", str(tmp_path / "hf"), "--seq-len", "16")):
        monkeypatch.setattr(
            sys, "argv", ["evaluate.py", *model, "--data", str(corpus), str(tmp_path / "other")]
        )
        assert command.run("evaluate") == 2
        assert (
            f"{model[1]} and {tmp_path / 'other'} have different tokenizers"
            in capsys.readouterr().err
        )


def test_a_run_is_not_trained_on_data_of_another_tokenizer_than_it_is_validated_on(
    corpus, tmp_path, make_tiny_config
):
    shutil.copytree(corpus, tmp_path / "other")
    index = json.loads((corpus / "index.json").read_text()) | {"tokenizer_sha256": "0"}
    (tmp_path / "other/index.json").write_text(json.dumps(index))
    keys = {"model.vocab_size": VOCAB, "data.val": str(corpus)}
    assert open_sources(make_tiny_config(keys | {"data.train": str(corpus)}))
    with pytest.raises(ValueError, match="have different tokenizers"):
        open_sources(make_tiny_config(keys | {"data.train": str(tmp_path / "other")}))
    (tmp_path / "other/tokenizer.json").write_text("{}")
    keys |= {"data.train": str(corpus), "train.init_from": str(tmp_path / "other")}
    with pytest.raises(
        ValueError, match=f"{corpus} and {tmp_path / 'other'} have different tokenizers"
    ):
        open_sources(make_tiny_config(keys))


def test_validation_is_that_of_the_trainer_in_any_number_of_shares(run, corpus):
    model, config = open_model(run=str(run), hf=None, seq_len=None, micro_batch_size=2)
    source = open_source(corpus, "val")
    alone = validate(model, source, config, batches=4, device=CPU)
    parts: list[torch.Tensor] = []
    for rank in range(2):
        validate(
            model,
            source,
            config,
            batches=4,
            device=CPU,
            rank=rank,
            world_size=2,
            all_reduce=lambda sums: parts.append(sums) or sums,
        )
    both = validate(
        model,
        source,
        config,
        batches=4,
        device=CPU,
        rank=0,
        world_size=2,
        all_reduce=lambda _: parts[0] + parts[1],
    )
    assert both == pytest.approx(alone)


def test_an_imported_run_is_evaluated_before_it_is_trained(
    run, corpus, tmp_path, monkeypatch, capsys
):
    export_hf(run, tmp_path / "hf", dtype="fp32")
    fresh = [
        "mtp.mode=sequential",
        "mtp.num_nextn_predict_layers=1",
        "mtp.detach=trunk",
        "train.freeze=trunk",
    ]
    import_hf(
        tmp_path / "hf", tmp_path / "runs" / "head", data=str(corpus), sets=fresh, trunk_only=True
    )
    sizes = ("--batches", "2", "--prompts", "0", "--seq-len", "16", "--micro-batch-size", "2")
    (fresh_head,) = call(
        monkeypatch, capsys, "--run", str(tmp_path / "runs" / "head"), *sizes
    ).values()
    (whole,) = call(monkeypatch, capsys, "--run", str(run), *sizes).values()
    assert fresh_head["val/main_loss"] == pytest.approx(whole["val/main_loss"], abs=1e-6)
    assert "val/mtp_loss/1" in fresh_head and "val/mtp_loss/2" not in fresh_head


def test_acceptance_is_measured_by_decoding(run, monkeypatch, capsys):
    arguments = ("--run", str(run), "--batches", "1", "--prompts", "2", "--new-tokens", "8")
    (metrics,) = call(monkeypatch, capsys, *arguments).values()
    assert 0 <= metrics["val/acceptance/2"] <= metrics["val/acceptance/1"] <= 1
    assert 1 <= metrics["val/tokens_per_step"] <= 3


def test_text_that_repeats_itself_is_no_evidence_to_generate_and_to_evaluate(
    run, monkeypatch, capsys
):
    generated = ("generate", "--run", str(run), "--prompt", "def")
    evaluated = ("evaluate", "--run", str(run), "--batches", "1", "--prompts", "2")
    words = []
    for limit in (0.0, 1.1):
        monkeypatch.setattr(generation, "REPEATS", limit)
        for arguments in (generated, evaluated):
            assert command.run(arguments[0], arguments[1:]) == 0
            words.append(re.findall("the generated text repeats.*", capsys.readouterr().err))
    assert words[:2] == [[], []] and len(words[2]) == 1
    assert re.search(r"share of distinct tokens \d\.\d\d, below 1\.1", words[2][0])
    assert [re.sub(r"\d\.\d\d", "X", word) for word in words[2] + words[3]] == [
        re.sub(r"\d\.\d\d", "X", words[2][0])
    ] * 2


def test_acceptance_has_a_seed_and_sets_of_prompts_that_share_none(run, corpus, monkeypatch):
    model = load_model(run).model
    texts: list[list[list[int]]] = []

    def generate_and_note(model, prompts, settings):
        texts.append(list(prompts))
        return generate(model, prompts, settings)

    monkeypatch.setattr(validation, "generate", generate_and_note)
    source = open_source(corpus, "val")
    sizes = {"depth": 2, "seq_len": 32, "new_tokens": 12, "temperature": 1.0}

    def drawn(seed: int, first: int, step: int = 3) -> dict[str, float]:
        chosen = {"prompts": 12, "seed": seed, "part": (first, step)}
        return validation.acceptance(model, source, **sizes, **chosen)

    assert drawn(1, 0) == drawn(1, 0) != drawn(2, 0)
    drawn(1, 1), drawn(1, 2), drawn(1, 0, 1)
    first, _, _, second, third, all_of_them = texts
    assert sorted(first + second + third) == sorted(all_of_them)
    assert len({tuple(text) for text in all_of_them}) == 12


def test_statistics_of_drafts_are_those_of_the_validation(run, monkeypatch, capsys):
    sizes = ("--run", str(run), "--batches", "2", "--prompts", "0", "--drafts")
    (plain,) = call(monkeypatch, capsys, *sizes).values()
    for depth in (1, 2):
        overlap = plain[f"val/overlap/{depth}"]
        assert plain[f"drafts/overlap/{depth}"] == pytest.approx(overlap, abs=1e-6)
        assert plain[f"drafts/accepted_0.0/{depth}"] == pytest.approx(overlap, abs=1e-6)
    (warm,) = call(monkeypatch, capsys, *sizes, "--temperature", "2").values()
    assert warm["val/overlap/1"] == plain["val/overlap/1"]
    assert warm["drafts/overlap/1"] > plain["drafts/overlap/1"]  # both are flatter


def test_drafts_beyond_d_have_an_overlap_along_the_text(run, monkeypatch, capsys):
    sizes = ("--run", str(run), "--batches", "2", "--prompts", "0", "--drafts", "--draft-depth")
    found = []
    for recycle in ("last", "cycle"):
        (metrics,) = call(monkeypatch, capsys, *sizes, "4", "--recycle", recycle).values()
        overlaps = {key: value for key, value in metrics.items() if "drafts/overlap/" in key}
        assert list(overlaps) == [f"drafts/overlap/{k}" for k in (1, 2, 3, 4)]
        assert 0 < overlaps["drafts/overlap/4"] < 1
        found.append(overlaps)
    assert found[0]["drafts/overlap/2"] == found[1]["drafts/overlap/2"]  # the heads' own
    assert found[0]["drafts/overlap/3"] != found[1]["drafts/overlap/3"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *sizes, "2"])
    assert command.run("evaluate") == 2 and "--draft-depth 2: no effect" in capsys.readouterr().err


def test_acceptance_of_a_short_model_is_measured_without_being_told_how(
    make_run, corpus, monkeypatch, capsys
):
    # 16 positions
    short, _ = make_run(data__train=str(corpus), data__val=str(corpus), model__vocab_size=VOCAB)
    (metrics,) = call(monkeypatch, capsys, "--run", str(short), "--batches", "1").values()
    assert "val/acceptance/1" in metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seq-len", "65"), "must be 2 .. model.max_position_embeddings = 64"),
        (("--new-tokens", "64"), "--new-tokens 64: must be < model.max_position_embeddings = 64"),
        (("--draft-vocab", "301"), "--draft-vocab 301: a draft vocabulary has 1 .."),
        (("--data", "nowhere"), "nowhere: neither a prepared folder nor a Megatron prefix"),
    ],
)
def test_user_errors_have_exit_code_2(run, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--run", str(run), *arguments])
    assert command.run("evaluate") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--new-tokens", "2"), "must be at least 3"),
        (("--new-tokens", "8", "--prompts", "0"), "no effect"),
        (("--draft-threshold", "0.5", "--prompts", "0"), "--draft-threshold: no effect"),
        (("--draft-threshold", "1.5"), "1.5: must be in [0, 1]"),
        (("--draft-vocab", "9", "--prompts", "0"), "--draft-vocab: no effect"),
    ],
)
def test_options_that_would_measure_no_acceptance_are_refused(
    monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--run", "run", *arguments])
    with pytest.raises(SystemExit, match="2"):
        command.run("evaluate")
    assert message in capsys.readouterr().err


def test_drafts_of_a_part_of_the_vocabulary_overlap_less_and_may_end_early(
    run, corpus, monkeypatch, capsys
):
    sizes = ("--batches", "1", "--prompts", "2", "--new-tokens", "8", "--drafts")
    whole, part = (
        call(monkeypatch, capsys, "--run", str(run), *sizes, *more)[str(corpus)]
        for more in ((), ("--draft-vocab", "60", "--draft-threshold", "1"))
    )
    assert (run / "token_counts.json").is_file()
    # 60 of 300 nearly equally likely tokens (random weights): q is five times p there
    assert part["drafts/overlap/1"] == pytest.approx(0.2, abs=0.05) != whole["drafts/overlap/1"]
    assert "drafts/kl/1" in whole and "drafts/kl/1" not in part
    assert part["val/tokens_per_step"] == 1 and part["val/drafts_per_step"] == 0
    assert "val/acceptance/1" not in part and "val/drafts_per_step" not in whole


def test_how_a_run_was_trained_sets_no_bounds_to_the_windows(make_run):
    sizes = {
        "train__total_tokens": 4 * 16,
        "parallel__sequence_parallel_size": 2,
        "model__max_position_embeddings": 64,
    }
    run, _ = make_run(**sizes)
    _, config = open_model(run=str(run), hf=None, seq_len=63, micro_batch_size=None)
    assert (config.data.seq_len, config.train.micro_batch_size) == (63, 4)


def test_windows_that_hold_no_example_of_a_task_are_refused_in_a_sentence(make_run):
    data = {
        "data__task": {"type": "suffix_sum", "terms": 5},
        "data__train": None,
        "data__val": None,
    }
    run, _ = make_run(**data)
    with pytest.raises(
        ConfigError, match=r"evaluation of .*: 1 problem\n  data.seq_len: must be >= 10"
    ):
        open_model(run=str(run), hf=None, seq_len=4, micro_batch_size=None)


def test_a_number_of_new_tokens_is_refused_where_a_task_gives_the_answers(
    make_run, monkeypatch, capsys
):
    data = {
        "data__task": {"type": "suffix_sum", "terms": 5},
        "data__train": None,
        "data__val": None,
    }
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", "--run", str(make_run(**data)[0]), "--new-tokens", "8"]
    )
    assert (
        command.run("evaluate") == 2
        and "--new-tokens: no effect on data.task suffix_sum" in capsys.readouterr().err
    )


TASK = """
task: code_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture
def task(tmp_path, monkeypatch) -> Path:
    """A folder with a multiple-choice task on a local file: needs no network."""
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "task"
    folder.mkdir()
    documents = [
        {"text": f"def f{i}(x):\n    return", "choices": [" x", " y"], "label": i % 2}
        for i in range(6)
    ]
    (folder / "documents.jsonl").write_text(
        "".join(json.dumps(document) + "\n" for document in documents)
    )
    (folder / "code_choice.yaml").write_text(TASK.replace("FILE", str(folder / "documents.jsonl")))
    return folder


def test_tasks_of_lm_evaluation_harness_run_on_a_run_and_on_its_export(
    run, tmp_path, task, monkeypatch, capsys
):
    from dsv3_mtp.train.lm_eval import lm_eval

    export_hf(run, tmp_path / "hf", dtype="fp32")
    where = ("--lm-eval", "code_choice", "--lm-eval-include", str(task))
    of_export = call(monkeypatch, capsys, "--hf", str(tmp_path / "hf"), *where)["lm-eval"]
    assert set(of_export) == {"code_choice/acc"} and of_export["code_choice/acc"] in (
        0.5,
        1 / 6,
        2 / 6,
        4 / 6,
        5 / 6,
    )
    assert lm_eval(["code_choice"], run=str(run), hf=None, include=str(task)) == of_export
