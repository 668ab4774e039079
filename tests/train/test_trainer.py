"""The whole training step and run, in real processes: ranks agree, resume is bitwise, kills are
survived.
"""

import json
import os
import re
import resource
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from dsv3_mtp.config import Config, schedules
from dsv3_mtp.data.ngrams import NGrams
from dsv3_mtp.data.opening import open_sources
from dsv3_mtp.data.sampler import sequential_windows
from dsv3_mtp.files.fragments import shard_name
from dsv3_mtp.files.run_folder import newest_checkpoint, newest_weights
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.report.metrics import read_metrics
from dsv3_mtp.runs.model import load_model
from dsv3_mtp.train import checkpoint
from dsv3_mtp.train.floors import text_floors, trained_on
from dsv3_mtp.train.process import own_process
from dsv3_mtp.train.record import NonFiniteError
from tests.conftest import contents, short_run
from tests.made_runs import read_newest, read_state_dict
from tests.plain_training import plain_steps
from tests.ranks import folder_of, timeless, train_to_end, train_until, write_markov
from tests.ranks import trained as train

pytestmark = pytest.mark.dist
STEPS = 12
BFLOAT16 = {"train__dtype": "bfloat16", "train__total_tokens": 8 * 16}  # of one step
LONG = {"optim__lr": 0.01, "train__total_tokens": 20 * 8 * 16}


@pytest.fixture(scope="module")
def make_in(tmp_path_factory):
    """A function from a folder and overrides to the config of a 12-step run on Markov data."""
    data = write_markov(tmp_path_factory.mktemp("data") / "markov", tokens=3000, documents=40)

    def make(folder: Path, name="run", **overrides) -> Config:
        base = {"train.total_tokens": STEPS * 8 * 16, "train.batch_size": 8}
        base |= {"train.micro_batch_size": 4, "checkpoint.every": 5, "eval.every": 10}
        return short_run(folder, name, data, base, overrides)

    return make


@pytest.fixture
def make_run(make_in, tmp_path):
    return partial(make_in, tmp_path)


@pytest.fixture(scope="module")
def origin(make_in, tmp_path_factory) -> Path:
    config = make_in(tmp_path_factory.mktemp("finished"))
    train(config)
    return folder_of(config)


@pytest.fixture(scope="module")
def learned(make_in, tmp_path_factory) -> Config:
    """A run of LONG in float32, trained to its end."""
    config = make_in(tmp_path_factory.mktemp("learned"), **LONG)
    train(config)
    return config


@pytest.fixture
def finished(make_run, origin) -> Config:
    """A run that one rank trained to its end."""
    config = make_run()
    shutil.copytree(origin, folder_of(config))
    return config


def weights_of(config: Config) -> dict[str, torch.Tensor]:
    return read_newest(folder_of(config))


def averages_of(config: Config) -> dict[str, torch.Tensor]:
    stored, _ = newest_weights(folder_of(config), ema=True)
    return {name: stored.read(name).view(shape) for name, shape in stored.shapes.items()}


def assert_same_weights(a: Config, b: Config, of=weights_of, **tolerance) -> None:
    first, second = of(a), of(b)
    assert first.keys() == second.keys()
    for key, value in first.items():
        if tolerance:
            torch.testing.assert_close(
                value, second[key], msg=lambda m, key=key: f"{key}: {m}", **tolerance
            )
        else:
            assert torch.equal(value, second[key]), key


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), (2, 1)])
def test_resume_after_sigterm_equals_an_uninterrupted_run_bitwise(make_run, world_size, zero_stage):
    settings = {"parallel__zero_stage": zero_stage, "mtp__num_nextn_predict_layers": 2}
    settings |= {"optim__moments": "bfloat16", "train__ema_decay": 0.9, "log__every": 3}
    settings |= {"mtp__objective": {"ce": 0.5, "lk_hybrid": 1.0}}
    settings |= {"train__total_tokens": 8 * 8 * 16}
    whole, parts = make_run("whole", **settings), make_run("parts", **settings)
    expected = train(whole, world_size=world_size)
    train(parts, train_until, 4, world_size=world_size)
    assert newest_checkpoint(folder_of(parts) / "checkpoints").name == "global_step4"
    got = train(parts, world_size=world_size)
    assert timeless(got) == timeless(expected)
    assert_same_weights(whole, parts)
    assert_same_weights(whole, parts, averages_of)
    starts = json.loads((folder_of(parts) / "manifest.json").read_text())["starts"]
    assert len(starts) == 2 and starts[0]["data"] == starts[1]["data"]


def test_the_average_of_the_weights_is_the_sum_written_out_and_two_ranks_have_the_one_of_one(
    make_run,
):
    settings = {
        "checkpoint__every": 1,
        "checkpoint__keep": 100,
        "train__total_tokens": 4 * 8 * 16,
        "eval__every": 0,
    }
    one = make_run("one", train__ema_decay=0.7, optim__eps=1e-3, **settings)
    two = make_run("two", train__ema_decay=0.7, optim__eps=1e-3, **settings)
    train(one)
    train(two, world_size=2)
    start = DeepseekV3MTP(one.model, one.mtp)
    start.init_weights(one.run.seed)
    root = folder_of(one) / "checkpoints"
    weights = [
        start.state_dict(),
        *(read_state_dict(root / f"global_step{step}") for step in range(1, 5)),
    ]
    found = averages_of(one)
    for name, average in found.items():
        terms = [0.3 * 0.7 ** (4 - step) * weights[step][name].double() for step in range(1, 5)]
        closed_form = sum(terms, 0.7**4 * weights[0][name].double())
        torch.testing.assert_close(average.double(), closed_form, rtol=1e-5, atol=1e-7)
    assert_same_weights(one, two, averages_of, rtol=0, atol=1e-5)
    loaded = load_model(folder_of(one), ema=True).model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in found.items())


def test_moments_and_average_may_be_switched_on_resume(make_run):
    first = {
        "train__dtype": "bfloat16",
        "parallel__zero_stage": 1,
        "train__total_tokens": 3 * 8 * 16,
    }
    config = make_run(**first)
    train(config)
    with pytest.raises(ValueError, match="no average of the weights there"):
        load_model(folder_of(config), ema=True)
    first["train__total_tokens"] = 5 * 8 * 16
    changed = make_run(optim__moments="bfloat16", train__ema_decay=0.5, **first)
    train(changed)
    text = Path(f"{folder_of(config).parents[1]}/run.log.rank0").read_text()
    for line in (
        "optim.moments: float32 -> bfloat16",
        "the checkpoint has no average; it begins here",
    ):
        assert line in text
    stored, _ = newest_weights(folder_of(changed), ema=True)
    assert {stored.read(n, state="exp_avg").dtype for n in stored.shapes if "bias" not in n} == {
        torch.bfloat16
    }


def test_a_finished_run_trains_no_further(finished):
    first = read_metrics(folder_of(finished) / "metrics.jsonl")
    assert train(finished) == first and first[-1]["step"] == STEPS


def test_kill_9_of_a_rank_while_it_saves_leaves_a_loadable_latest(make_run):
    short = {"train__total_tokens": 5 * 8 * 16, "checkpoint__every": 2}
    whole = make_run("whole", **short)
    expected = timeless(train(whole, world_size=2))
    for victim in (0, 1):
        parts = make_run(f"victim{victim}", **short)
        train(parts, killed_in_save, victim, 4, world_size=2, expect=None)
        root = folder_of(parts) / "checkpoints"
        assert (root / "global_step4").exists()  # begun
        assert newest_checkpoint(root).name == "global_step2" == (root / "latest").read_text()
        assert timeless(train(parts, world_size=2)) == expected
        assert_same_weights(whole, parts)


def killed_in_save(config: Config, victim: int, step: int) -> None:
    original = checkpoint.write_fragments

    def write_fragments(folder, rank, fragments):
        if folder.name == f"global_step{step}" and rank == victim:
            (folder / shard_name(rank)).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(folder, rank, fragments)

    checkpoint.write_fragments = write_fragments
    train_to_end(config)


def test_two_ranks_and_many_micro_batches_log_what_one_rank_logs_on_the_whole_batch(make_run):
    """Every number of metrics.jsonl; tests/parallel/test_layouts.py compares losses and weights of
    every layout.

    The counts of valid targets differ between the micro-batches.
    """
    settings = {"mtp__num_nextn_predict_layers": 2, "data__mask_documents": True}
    settings |= {"train__total_tokens": 5 * 8 * 16, "eval__every": 3}
    whole = make_run("whole", train__micro_batch_size=8, **settings)
    expected = timeless(train(whole))
    for ranks in (1, 2):
        parts = make_run(f"on{ranks}", train__micro_batch_size=2, eval__batches=8, **settings)
        for a, b in zip(expected, timeless(train(parts, world_size=ranks)), strict=True):
            assert a.keys() == b.keys()
            for key in a:
                # argmax and routing counts may flip on a tie of the last bit; everything else is
                # float32 rounding
                flips = key.startswith(
                    ("moe/", "train/top1", "train/agreement", "val/top1", "val/agree")
                )
                tolerance = 5e-3 if flips else 2e-5
                assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (
                    a["step"],
                    key,
                )
        assert_same_weights(whole, parts, rtol=1e-4, atol=2e-5)


def test_the_batch_size_ramp_trains_on_the_batches_it_reports(make_run):
    config = make_run(train__batch_size_ramp={"start": 4, "until": 0.5})
    records = [r for r in train(config) if "train/loss" in r]
    sizes = [r["train/batch_size"] for r in records]
    assert sizes[0] == 4 and sizes[-1] == 8 and sizes == sorted(sizes)
    assert [r["tokens"] for r in records] == [16 * sum(sizes[: i + 1]) for i in range(len(sizes))]
    assert len(sizes) == schedules.total_steps(config.train, 16, 4)
    # the same optimizer steps by hand: plain torch on the same batches
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(config.run.seed)
    for record, step in zip(records, plain_steps(model, config, len(sizes)), strict=True):
        assert record["train/batch_size"] == step.size
        assert record["train/loss"] == pytest.approx(step.out.loss.item(), rel=2e-5)
        assert record["optim/grad_norm"] == pytest.approx(step.norm, rel=2e-4)


def test_training_lowers_the_loss_and_moves_every_router(learned):
    config, records = learned, read_metrics(folder_of(learned) / "metrics.jsonl")
    main = [r["train/main_loss"] for r in records if "train/main_loss" in r]
    assert main[-1] < main[0] - 0.3
    biases = {k: v for k, v in weights_of(config).items() if k.endswith("e_score_correction_bias")}
    assert len(biases) == 3 and any(k.startswith("mtp.") for k in biases)
    assert all(bias.abs().sum() > 0 and bias.dtype == torch.float32 for bias in biases.values())
    files = {path.name for path in folder_of(config).iterdir()}
    assert files == {
        ".lock",
        "config.yaml",
        "ds_config.json",
        "manifest.json",
        "metrics.jsonl",
        "curves.png",
        "checkpoints",
    }
    kept = {path.name for path in (folder_of(config) / "checkpoints").glob("global_step*")}
    assert kept == {"global_step15", "global_step20"}


def test_bfloat16_trains_close_to_float32_and_keeps_router_biases_float32(make_run, learned):
    low = make_run("low", train__dtype="bfloat16", **LONG)
    low_loss, high_loss = (
        [r["train/main_loss"] for r in records if "train/main_loss" in r][-1]
        for records in (train(low), read_metrics(folder_of(learned) / "metrics.jsonl"))
    )
    assert low_loss == pytest.approx(high_loss, rel=0.02)
    bias = weights_of(low)["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32 and bias.abs().sum() > 0


def test_zero_0_and_1_take_the_same_steps_in_bfloat16(make_run):
    """DeepSpeed's optimizer for the first takes a step of zero gradients when it starts."""
    found = []
    for stage in (0, 1):
        config = make_run(
            f"zero{stage}", parallel__zero_stage=stage, **BFLOAT16, optim__weight_decay=10.0
        )
        train(config)
        found.append(
            (
                weights_of(config),
                newest_weights(folder_of(config))[0].index["lm_head.weight"]["scalars"],
            )
        )
    (zero, steps), (one, _) = found
    assert steps == {"step": 1.0}
    for name, value in one.items():
        torch.testing.assert_close(
            zero[name], value, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(("stages", "detach"), [(1, "none"), (2, "none"), (2, "all")])
def test_gradients_accumulated_in_float32_are_those_of_one_micro_batch(make_run, stages, detach):
    """DeepSpeed's optimizer for that adds what p.grad holds after every backward: it must be of
    that one alone.
    """
    common = BFLOAT16 | {"parallel__pipeline_stages": stages, "mtp__detach": detach}
    if detach == "all":
        # stages are refused where trunk and heads are clipped apart
        common["optim__grad_clip"] = 0.0
    norms = [
        train(make_run(f"by{micro}", train__micro_batch_size=micro, **common), world_size=stages)[
            0
        ]["optim/grad_norm"]
        for micro in (8, 1)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def poisoned(config: Config, what: str) -> None:
    trainer = own_process(config, command=["test"])
    backward = trainer.engine.backward

    def poison(loss, *, last):
        if trainer.step == 7 and what == "gradient":
            trainer.model.lm_head.weight.register_hook(lambda grad: grad * float("nan"))
        if trainer.step == 7 and what == "loss":
            trainer.model.lm_head.weight.data.fill_(float("inf"))
        backward(loss, last=last)

    trainer.engine.backward = poison
    try:
        trainer.run()
    except NonFiniteError as error:
        Path(f"{folder_of(config)}.error").write_text(str(error))


@pytest.mark.parametrize(
    ("what", "metric", "step"), [("loss", "train/loss", 8), ("gradient", "optim/grad_norm", 8)]
)
def test_a_non_finite_value_stops_with_the_step_the_metric_and_the_last_checkpoint(
    make_run, what, metric, step
):
    config = make_run(f"bad_{what}", train__micro_batch_size=4)
    train(config, poisoned, what)
    message = Path(f"{folder_of(config)}.error").read_text()
    assert message.startswith(f"step {step} ") and any(
        f"{metric} = {x}" in message for x in ("nan", "inf")
    )
    assert "global_step5" in message
    assert newest_checkpoint(folder_of(config) / "checkpoints").name == "global_step5"


def test_a_last_step_that_ruins_the_weights_is_neither_saved_nor_called_finished(make_run):
    rate = {
        "optim__lr": 1e12,
        "optim__schedule": {"decay_start": 1, "decay_end": 1, "final_start": 1},
    }
    config = make_run("ruined", train__total_tokens=8 * 16, **rate)
    train(config, poisoned, "nothing")
    message = Path(f"{folder_of(config)}.error").read_text()
    assert (
        message.startswith("step 1 (128 tokens): val/main_loss = nan")
        and "there is no checkpoint yet" in message
    )
    assert newest_checkpoint(folder_of(config) / "checkpoints") is None


def count_waits(config: Config) -> None:
    trainer, calls = own_process(config, command=["test"]), []
    get_accelerator().synchronize = lambda *_: calls.append(1)
    for _ in range(5):
        trainer.optimizer_step()
    Path(f"{folder_of(config)}.waits").write_text(str(len(calls)))


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_deepspeed_never_waits_for_the_device(make_run, zero_stage):
    """Its throughput timer would, twice in every micro-batch, from the third step on."""
    config = make_run(train__micro_batch_size=2, parallel__zero_stage=zero_stage)
    train(config, count_waits)
    assert Path(f"{folder_of(config)}.waits").read_text() == "0"


def refused(config: Config) -> None:
    try:
        own_process(config, command=["test"])
    except ValueError as error:
        Path(f"{folder_of(config)}.error").write_text(str(error))


@pytest.mark.usefixtures("finished")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__hidden_size": 64}, "model.hidden_size: 32 -> 64"),
        ({"mtp__num_nextn_predict_layers": 2}, "mtp.num_nextn_predict_layers: 1 -> 2"),
        ({"checkpoint__resume": "never"}, "checkpoint.resume: never, but"),
        ({"train__batch_size": 12, "train__micro_batch_size": 12}, "train.batch_size: 8 -> 12"),
        ({"train__micro_batch_size": 8}, None),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_name_and_harmless_changes_are_not(
    make_run, change, message
):
    config = make_run(**change)
    error = Path(f"{folder_of(config)}.error")
    train(config, refused)
    assert (message in error.read_text()) if message else not error.exists()


def test_pruning_keeps_the_newest_complete_checkpoints_and_removes_incomplete_ones(
    make_run, finished
):
    root = folder_of(finished) / "checkpoints"
    assert {path.name for path in root.glob("global_step*")} == {"global_step10", "global_step12"}
    (root / "global_step12" / "COMPLETE.json").unlink()  # as a kill in the last save leaves it
    config = make_run(checkpoint__keep=1, checkpoint__every=2, train__total_tokens=14 * 8 * 16)
    train(config)
    assert {path.name for path in root.glob("global_step*")} == {"global_step14"}
    assert newest_checkpoint(root).name == "global_step14" == (root / "latest").read_text()
    assert (
        "global_step12 is incomplete"
        in Path(f"{folder_of(config).parents[1]}/run.log.rank0").read_text()
    )


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_not_begun_anew(finished):
    folder = folder_of(finished)
    before = (folder / "metrics.jsonl").read_text()
    for complete in folder.glob("checkpoints/*/COMPLETE.json"):
        complete.write_text("{}")
    train(finished, refused)
    assert "no checkpoint in it is complete" in Path(f"{folder}.error").read_text()
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("name", [shard_name(0), "index.json", "state.json"])
def test_a_flipped_bit_is_named_and_training_goes_on_from_the_checkpoint_before(finished, name):
    root = folder_of(finished) / "checkpoints"
    expected = timeless(read_metrics(folder_of(finished) / "metrics.jsonl"))
    before = contents(root / "global_step12")
    content = bytearray(before[name])
    content[len(content) // 2] ^= 1
    (root / "global_step12" / name).write_bytes(content)
    assert timeless(train(finished)) == expected
    again = contents(root / "global_step12")
    assert again[shard_name(0)] == before[shard_name(0)]
    assert contents(root / "global_step12.damaged")[name] == bytes(content)
    log = Path(f"{root.parents[2]}/run.log.rank0").read_text()
    assert f"global_step12: damaged ({name}: is not what was written" in log
    assert "resumed at step 10" in log


def test_where_no_checkpoint_is_sound_all_are_named_and_left_as_they_are(finished):
    root = folder_of(finished) / "checkpoints"
    for folder in root.glob("global_step*"):
        file = folder / shard_name(0)
        file.write_bytes(b"x" * file.stat().st_size)
    before = contents(root)
    train(finished, refused)
    error = Path(f"{folder_of(finished)}.error").read_text()
    assert "global_step12: damaged" in error and "global_step10: damaged" in error
    assert "no other checkpoint is left" in error and contents(root) == before


def test_what_one_rank_cannot_read_every_rank_names(make_run):
    config = make_run()
    train(config, train_until, 3, world_size=2)
    folder = folder_of(config) / "checkpoints" / "global_step3"
    for name in (shard_name(1), "state.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(b"x" * len(content))
        train(config, refused_by_rank, world_size=2)
        assert all("global_step3: damaged" in error for error in errors_of(config)), name
        (folder / name).write_bytes(content)


def test_a_full_disk_of_one_rank_is_said_by_all_and_leaves_the_checkpoint_before(make_run):
    config = make_run()
    train(config, full_disk, world_size=2)
    assert all(
        re.search("File too large: .*global_step10/shard_rank1", error)
        for error in errors_of(config)
    )
    assert newest_checkpoint(folder_of(config) / "checkpoints").name == "global_step5"


def full_disk(config: Config) -> None:
    original = checkpoint.write_fragments

    def write_fragments(folder, rank, fragments):
        if (folder.name, rank) == ("global_step10", 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        return original(folder, rank, fragments)

    checkpoint.write_fragments = write_fragments
    refused_by_rank(config, run=True)


@pytest.mark.usefixtures("finished")
def test_optimizer_settings_changed_on_resume_are_those_in_use(make_run):
    changed = {"optim__weight_decay": 0.7, "optim__betas": [0.5, 0.6], "optim__eps": 0.1}
    changed["train__total_tokens"] = 8192  # a run that is to go on: a finished one refuses them
    config = make_run(**changed)
    train(config, hyperparameters)
    groups = json.loads(Path(f"{folder_of(config)}.groups").read_text())
    assert groups == [[0.7, [0.5, 0.6], 0.1], [0.0, [0.5, 0.6], 0.1]]


def hyperparameters(config: Config) -> None:
    trainer = own_process(config, command=["test"])
    # the AdamW inside DeepSpeed's ZeRO optimizer
    inner = trainer.engine.optimizer.optimizer.param_groups
    groups = [[group["weight_decay"], group["betas"], group["eps"]] for group in inner]
    Path(f"{folder_of(config)}.groups").write_text(json.dumps(groups))


def test_two_processes_never_train_in_one_run_folder(make_run):
    from dsv3_mtp.runs.folder import lock_folder, run_folder

    config = make_run()
    lock_folder(run_folder(config))  # this process holds it
    train(config, refused)
    assert "another process works in this folder" in Path(f"{folder_of(config)}.error").read_text()


def test_an_error_that_only_rank_0_meets_is_raised_on_every_rank(make_run):
    config = make_run()
    folder_of(config).parent.write_text("a file where the folder of runs should be")
    train(config, refused_by_rank, world_size=2)
    errors = errors_of(config)
    assert errors[0] == errors[1] and "runs" in errors[0]


def errors_of(config: Config) -> list[str]:
    return [Path(f"{folder_of(config).parent}.error{rank}").read_text() for rank in (0, 1)]


def refused_by_rank(config: Config, run: bool = False) -> None:
    try:
        trainer = own_process(config, command=["test"])
        if run:
            trainer.run()
    except ValueError as error:
        Path(f"{folder_of(config).parent}.error{os.environ['RANK']}").write_text(str(error))


def test_what_deepspeed_says_against_the_deepspeed_section_names_the_section(make_run):
    config = make_run(**{"deepspeed.zero_optimization": {"overlap_com": True}})
    train(config, refused)
    assert "deepspeed: DeepSpeed refuses" in (
        error := Path(f"{folder_of(config)}.error").read_text()
    )
    assert "overlap_com" in error


def test_a_depth_without_valid_targets_is_left_out_of_the_metrics(make_run, tmp_path):
    data = write_markov(tmp_path / "short", tokens=3000, documents=1500)  # 2 tokens each on average
    config = make_run(
        data__train=data,
        data__val=data,
        data__mask_documents=True,
        mtp__num_nextn_predict_layers=2,
        mtp__loss_weight=0.1,
    )
    records = train(config)
    assert all(record.get("train/mtp_loss/2", 1.0) > 0 for record in records)
    assert all("val/main_loss" in record or "train/main_loss" in record for record in records)


def test_the_last_validation_has_the_floors_of_the_tokens_that_were_trained_on(finished):
    records = read_metrics(folder_of(finished) / "metrics.jsonl")
    with_floors = [record for record in records if "val/floor/trigram" in record]
    assert [record["step"] for record in with_floors] == [STEPS]
    sampler, val = open_sources(finished)
    rows = np.concatenate([sampler.next_batch(8)[0][0] for _ in range(STEPS)])
    length = finished.data.seq_len
    tables = NGrams(rows[:, : length + 1], None, vocab_size=finished.model.vocab_size)
    count = finished.eval.batches * finished.train.micro_batch_size
    [(windows, _)] = sequential_windows(val, seq_len=length, lookahead=1, count=count)
    losses = tables.losses(windows, None)
    for name, loss in losses.items():
        assert with_floors[0][f"val/floor/{name}"] == loss
    # A table of the same tokens, made by the run folder alone.
    again = trained_on(folder_of(finished))
    assert again is not None
    assert (
        text_floors(again, val, finished, batches=finished.eval.batches)[0]["val/floor/bigram"]
        == (losses["bigram"])
    )
