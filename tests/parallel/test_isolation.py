"""With `mtp.detach: all` the trunk is that of `mtp.mode: none`, clipping included."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_mtp.report.metrics import read_metrics
from dsv3_mtp.runs.model import load_model
from tests.conftest import tiny
from tests.ranks import chosen, rows, run_ranks, train_to_end, write_markov

pytestmark = pytest.mark.dist
STEPS = 3
LIMIT = 0.3  # far below the norms: every step is clipped

# Layouts: ranks, settings, and whether the trunk is that of `none` in every bit.
LAYOUTS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "ZeRO-0": (1, {"parallel.zero_stage": 0}, True),
    "ZeRO-1": (1, {"parallel.zero_stage": 1}, True),
    "ZeRO-2": (1, {"parallel.zero_stage": 2}, True),
    "bfloat16": (1, {"parallel.zero_stage": 1, "train.dtype": "bfloat16"}, True),
    "2 ranks, ZeRO-0": (2, {"parallel.zero_stage": 0}, True),
    "2 ranks, ZeRO-1": (2, {"parallel.zero_stage": 1}, True),
    "2 ranks, ZeRO-2": (2, {"parallel.zero_stage": 2}, True),
    "2 ranks, ZeRO-3": (2, {"parallel.zero_stage": 3}, False),
    "offload": (2, {"parallel.zero_stage": 1, "parallel.offload_optimizer": True}, False),
    "EP=2": (2, {"parallel.expert_parallel_size": 2}, False),
    "SP=2": (2, {"parallel.sequence_parallel_size": 2}, False),
}
QUICK = {"bfloat16", "2 ranks, ZeRO-1", "2 ranks, ZeRO-2", "2 ranks, ZeRO-3", "EP=2"}
# The others are slow.
HEADS = {"mtp.mode": "sequential", "mtp.num_nextn_predict_layers": 2, "mtp.detach": "all"}


def settings(folder: Path, data: str, name: str, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "run.name": name,
        "run.dir": str(folder),
        "data.train": data,
        "data.val": data,
        "optim.grad_clip": LIMIT,
        "optim.eps": 1e-5,  # with less, Adam makes whole steps of rounding errors
        "train.dtype": "float32",
        "train.total_tokens": STEPS * 4 * 16,
        "train.batch_size": 4,
        "train.micro_batch_size": 2,
        "checkpoint.every": STEPS,
        "eval.every": 0,
        "parallel.zero_stage": 1,
    } | more


def train_all(configs: list[Any]) -> None:
    for config in configs:
        train_to_end(config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request) -> Path:
    folder = tmp_path_factory.mktemp("isolation")
    data = write_markov(folder / "data" / "markov", tokens=3000, documents=40)
    for ranks in (1, 2):
        jobs = []
        for name in chosen(request, "layout"):
            count, more, _ = LAYOUTS[name]
            if count == ranks:
                for kind, heads in (("none", {"mtp.mode": "none"}), ("heads", HEADS)):
                    # ZeRO-3 replaces F.linear for good, so it comes last.
                    jobs.append(tiny(settings(folder, data, f"{name}, {kind}", more | heads)))
        jobs.sort(key=lambda config: config.parallel.zero_stage == 3)
        if not jobs:
            continue
        log = folder / f"{ranks}.log"
        codes = run_ranks(train_all, jobs, world_size=ranks, log=log, timeout=600)
        assert codes == [0] * ranks, Path(f"{log}.rank0").read_text()[-3000:]
    return folder


@pytest.mark.parametrize("layout", rows(LAYOUTS, QUICK))
def test_heads_cut_off_leave_the_trunk_as_without_heads(layout: str, runs: Path):
    bitwise = LAYOUTS[layout][2]
    alone = load_model(runs / f"{layout}, none").model.state_dict()
    beside = load_model(runs / f"{layout}, heads").model.state_dict()
    assert set(alone) == {name for name in beside if not name.startswith("mtp.")}
    for name, weight in alone.items():
        if bitwise:
            assert torch.equal(weight, beside[name]), name
        else:
            torch.testing.assert_close(weight, beside[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("layout", rows(LAYOUTS, QUICK))
def test_trunk_and_heads_are_clipped_apart(layout: str, runs: Path):
    last = read_metrics(runs / f"{layout}, heads" / "metrics.jsonl")
    record = next(r for r in reversed(last) if "optim/grad_norm" in r)
    trunk, heads = (record[f"optim/grad_norm/{side}"] for side in ("trunk", "mtp"))
    assert record["optim/grad_norm"] == pytest.approx((trunk**2 + heads**2) ** 0.5, rel=1e-2)
    assert record["optim/clipped/trunk"] == float(trunk > LIMIT)
    assert record["optim/clipped/mtp"] == float(heads > LIMIT)
    alone = read_metrics(runs / f"{layout}, none" / "metrics.jsonl")
    same_step = next(r for r in alone if r.get("step") == record["step"] and "optim/lr" in r)
    assert trunk == pytest.approx(same_step["optim/grad_norm"], rel=1e-2)


def test_pipeline_stages_are_refused_with_the_remedy():
    with pytest.raises(Exception, match=r"mtp.detach.*pipeline_stages 1.*optim.grad_clip 0"):
        tiny(settings(Path("x"), "x", "run", HEADS | {"parallel.pipeline_stages": 2}))


def test_freezing_leaves_the_clip_to_the_heads(tmp_path):
    base = settings(tmp_path, "x", "run", HEADS)
    assert tiny(base).clips_apart
    assert not tiny(base | {"train.freeze": "trunk", "train.init_from": "x"}).clips_apart
    assert not tiny(base | {"optim.grad_clip": 0.0}).clips_apart
    assert not tiny(base | {"mtp.detach": "trunk"}).clips_apart
