"""The plan of a layout against the papers' numbers, against brute force, and against what runs
really hold and send.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from bench.meter import Meter, measure_peaks, measure_step
from bench.parallel import composition
from dsv3_mtp.config import Config, load_config
from dsv3_mtp.model.causal_lm import DeepseekV3MTP, meta_model
from dsv3_mtp.model.size import model_size
from dsv3_mtp.ops import experts
from dsv3_mtp.ops.attention import sdpa
from dsv3_mtp.ops.compute import Compute, building
from dsv3_mtp.plan.memory import (
    Layout,
    activation_elements,
    bubbles,
    communication,
    layout,
    parts,
    plan,
)
from dsv3_mtp.plan.states import element_size, state_bytes
from tests.ranks import run_ranks, write_markov

ROOT = Path(__file__).parents[2]
GB = 1e9


@pytest.fixture(scope="module")
def v3() -> tuple[Config, DeepseekV3MTP]:
    config = load_config(ROOT / "configs" / "v3_671b.yaml")
    return config, meta_model(config.model, config.mtp)


@pytest.mark.parametrize(("zero", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_model_states_are_those_of_the_zero_papers_figure_1(zero, gigabytes):
    shape = Layout(stages=1, data=64, experts=1, micro_batches=1, tokens=1)
    total = sum(state_bytes(7_500_000_000, 0, shape, zero_stage=zero, element=2, gradient=2))
    assert total / GB == pytest.approx(gigabytes, abs=0.05)


def test_v3s_parts_are_its_parameters(v3):
    _, model = v3
    embedding, *layers, head = parts(model)
    size = model_size(model, 4096)
    mla = (
        7168 * 1536
        + 1536
        + 1536 * 128 * 192
        + 7168 * 576
        + 512
        + 512 * 128 * 256
        + 128 * 128 * 7168
    )
    expert, norms = 3 * 7168 * 2048, 2 * 7168
    assert [(part.dense, part.experts) for part in layers] == [
        (mla + norms + 3 * 7168 * 18432, 0)
    ] * 3 + [(mla + norms + expert + 256 * 7168, 256 * expert)] * 58
    assert embedding.dense == 129280 * 7168
    # eh_proj; enorm, hnorm, shared_head.norm
    module = layers[-1].dense + 2 * 7168 * 7168 + 3 * 7168
    assert (head.dense, head.experts) == (7168 + 129280 * 7168 + module, 256 * expert)
    whole = [embedding, *layers, head]
    assert sum(part.dense + part.experts for part in whole) == size.total + size.mtp_total


def test_v3_on_2048_gpus_is_planned_stage_by_stage(v3):
    config, model = v3
    shape = layout(config, 2048)
    assert (shape.stages, shape.data, shape.experts, shape.copies, shape.micro_batches) == (
        16,
        128,
        64,
        2,
        120,
    )
    stages = plan(config, model, shape)
    names = [name for stage in stages for name in stage.names]
    assert names == ["embedding", *map(str, range(60)), "embedding", "60", "norm, MTP, head"]
    assert [stage.in_flight for stage in stages] == list(range(16, 0, -1))
    middle, expert = stages[8], 3 * 7168 * 2048
    assert middle.experts == 4 * 256 // 64 * expert
    assert middle.weights == 2 * (middle.dense + middle.experts)
    assert middle.gradients == 3 * middle.weights  # a float32 sum, and a micro-batch's in bfloat16
    # master, moments in bfloat16
    assert middle.states == (4 + 2 + 2) * (middle.dense / 128 + middle.experts / 2)
    assert middle.host == 0
    assert max(stage.total for stage in stages) < 80 * 2**30


def test_bubbles_are_those_of_v3s_table_2():
    shape = Layout(stages=8, data=1, experts=1, micro_batches=20, tokens=1)
    share = list(bubbles(shape, recompute=False).values())
    # In units of F = W = B/2: (PP-1)(F+B) = 21, (PP-1)(F+B-2W) = 7, (PP/2-1)(F&B+B-3W) = 6; the
    # work is 20 (F+B) = 60.
    assert share == pytest.approx([21 / 81, 7 / 67, 6 / 66])
    assert share[0] == pytest.approx(7 / 27)  # (PP-1) / (micro-batches + PP-1)


HEADS = [
    {"mtp.mode": "none"},
    {"mtp.num_nextn_predict_layers": 2},
    {"mtp.num_nextn_predict_layers": 2, "mtp.share_weights": True},
    {"mtp.mode": "parallel", "mtp.num_nextn_predict_layers": 2},
    {"mtp.mode": "parallel_linear"},
]


@pytest.mark.usefixtures("compiled")  # norms and SwiGLU are one function each, as on a GPU
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_activations_are_what_a_forward_leaves_behind(make_tiny_config, heads, mode):
    wide = {
        "model.hidden_size": 64,
        "model.moe_intermediate_size": 64,
        "model.intermediate_size": 128,
    }
    settings = {"train.activation_checkpointing": mode, "train.dtype": "float32"}
    settings["model.v_head_dim"] = 12  # the keys' width: a CPU pads narrower values
    config = make_tiny_config(wide | settings | heads)
    # attention as on a GPU, which keeps no probabilities
    with building(Compute(core=sdpa, recompute=mode)):
        model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(0)
    tokens = torch.randint(0, config.model.vocab_size, (16, 16 + 1 + config.mtp.depths))
    with Meter() as meter:
        out = model(tokens)
    weights = {one.outputs[-1] for one in model.head_rows(tokens).rows}
    kept_by_loss = sum(head.weight.numel() for head in weights) * element_size(config)
    estimate = (
        sum(
            activation_elements(config, part)
            for part in parts(meta_model(config.model, config.mtp))
        )
        * 16
        * 16
    )
    assert meter.held - kept_by_loss == pytest.approx(estimate * element_size(config), rel=0.15)
    assert out.loss.requires_grad


@pytest.mark.parametrize("stage", [1, 3])
def test_a_frozen_trunk_has_weights_and_neither_gradients_nor_states(make_tiny_config, stage):
    config = make_tiny_config(
        {"train.dtype": "bfloat16", "parallel.zero_stage": stage, "train.batch_size": 8}
    )
    model = meta_model(config.model, config.mtp, freeze="trunk")
    shape = layout(config, 2)
    (frozen,) = stages = plan(config, model, shape)
    (whole,) = plan(config, meta_model(config.model, config.mtp), shape)
    learned = model_size(model, 1).mtp_total
    assert frozen.weights == whole.weights
    assert (
        frozen.gradients == 4 * learned / (2 if stage == 3 else 1)
        and frozen.states == 12 * learned / 2
    )
    assert communication(config, stages, shape)["gradients"] == 4 * learned / 2 * (
        1 if stage == 3 else 2
    )


NARROW = {
    "deepspeed.data_types": {"grad_accum_dtype": "bf16"},
    "deepspeed.communication_data_type": "bf16",
}
LAYOUTS: dict[str, dict] = {
    **{f"ZeRO-{stage}": {"parallel.zero_stage": stage} for stage in (0, 1, 3)},
    "EP=2": {"parallel.expert_parallel_size": 2},
    **{f"ZeRO-{stage}, bf16 sums": {"parallel.zero_stage": stage} | NARROW for stage in (1, 2)},
    "ZeRO-2": {"parallel.zero_stage": 2},
}


def measure_layouts(configs: list[Config], out: Path) -> None:
    measured = [measure_step(config) for config in configs]
    out.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(measured))


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_hold_and_send_what_is_planned(make_tiny_config, tmp_path):
    prefix = write_markov(tmp_path / "markov", tokens=4000, documents=20)
    bucket = {"reduce_bucket_size": 5000}
    bucket |= {
        f"stage3_{key}": 0
        for key in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
    }
    common = {
        "data.train": prefix,
        "data.val": prefix,
        "run.dir": str(tmp_path),
        "train.dtype": "bfloat16",
    }
    common |= {
        "train.micro_batch_size": 2,
        "train.batch_size": 8,
        "deepspeed.zero_optimization": bucket,
    }
    common |= {
        "model.hidden_size": 64,
        "model.moe_intermediate_size": 32,
        "model.num_hidden_layers": 2,
    }
    configs = [
        make_tiny_config(common | {"run.name": name} | keys) for name, keys in LAYOUTS.items()
    ]
    assert run_ranks(
        measure_layouts, configs, tmp_path / "out", world_size=2, log=tmp_path / "log"
    ) == [0, 0]
    for rank in range(2):
        for config, (held, sent) in zip(
            configs, json.loads((tmp_path / f"out.{rank}").read_text()), strict=True
        ):
            shape = layout(config, 2)
            (stage,) = stages = plan(config, meta_model(config.model, config.mtp), shape)
            states = stage.weights + stage.gradients + stage.states
            assert held == pytest.approx(states, rel=0.05), config.run.name
            planned = communication(config, stages, shape)
            exchanged = sum(value for name, value in planned.items() if name.startswith("experts"))
            assert sent.get("all_to_all", 0) == pytest.approx(exchanged, rel=0.15), config.run.name
            assert sent.get("all_gather", 0) == pytest.approx(
                planned.get("weights", 0), rel=0.05
            ), config.run.name
            reduced = sent.get("all_reduce", 0) + sent.get("reduce_scatter", 0)
            assert reduced == pytest.approx(planned["gradients"], rel=0.05), config.run.name


PEAKS: dict[str, dict] = {
    f"ZeRO-{stage}, {dtype}{' sums' * narrow}, {moments} moments": {
        "parallel.zero_stage": stage,
        "train.dtype": "bfloat16" if dtype == "bf16" else dtype,
        "optim.moments": moments,
    }
    | (NARROW if narrow else {})
    for stage in range(4)
    for dtype, narrow in (("float32", False), ("bfloat16", False), ("bf16", True))
    for moments in ("float32", "bfloat16")
    if not (narrow and stage == 0)
} | {
    f"ZeRO-{stage}, bfloat16, offload": {
        "parallel.zero_stage": stage,
        "train.dtype": "bfloat16",
        "parallel.offload_optimizer": True,
    }
    for stage in (1, 2, 3)
}


def peaks(configs: list[Config], out: Path) -> None:
    out.with_suffix(f".{os.environ['RANK']}").write_text(
        json.dumps([measure_peaks(config) for config in configs])
    )


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("zero_stage", range(4))
def test_a_steps_peak_is_within_3_percent_of_the_planned_one(
    make_tiny_config, tmp_path, monkeypatch, zero_stage, ranks
):
    """Of a whole step, and of its update alone. Rows of experts are as many as on a GPU."""
    monkeypatch.setattr(experts, "padding", lambda x: 1)
    prefix = write_markov(tmp_path / "markov", tokens=4000, documents=20)
    zero = {"reduce_bucket_size": 400_000, "stage3_param_persistence_threshold": 0}
    zero |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    common = {
        "data.train": prefix,
        "data.val": prefix,
        "run.dir": str(tmp_path),
        "train.micro_batch_size": 2,
        "train.batch_size": 4 * ranks,
        "model.hidden_size": 128,
        "model.moe_intermediate_size": 64,
        "model.intermediate_size": 512,
        "model.num_hidden_layers": 3,
        "model.n_routed_experts": 16,
        "deepspeed.zero_optimization": zero,
    }
    configs = [
        make_tiny_config(common | {"run.name": name} | keys)
        for name, keys in PEAKS.items()
        if keys["parallel.zero_stage"] == zero_stage
    ]
    out, log = tmp_path / "out", tmp_path / "log"
    assert run_ranks(peaks, configs, out, world_size=ranks, log=log, timeout=560) == [0] * ranks
    measured = json.loads((tmp_path / "out.0").read_text())
    rows = []
    for config, (whole, update) in zip(configs, measured, strict=True):
        (stage,) = plan(config, meta_model(config.model, config.mtp), layout(config, ranks))
        rows.append((config.run.name, whole, stage.total + stage.host))
        # up to ZeRO-1 the update is planned with the last reduction; offloaded, it is the host's
        if zero_stage >= 2 and not config.parallel.offload_optimizer:
            planned = stage.weights + stage.states + stage.update
            rows.append((f"{config.run.name}: update", update, planned))
        print(ranks, *(f"{name} {n:,.0f} {m:,.0f};" for name, n, m in rows[-2:]))
    for name, peak, planned in rows:
        assert planned == pytest.approx(peak, rel=0.03), name


def test_the_documented_table_of_what_composes_is_the_one_that_refuses():
    table = composition(load_config(ROOT / "configs" / "v3_tiny.yaml"))
    documented = (ROOT / "docs" / "parallelism.md").read_text().partition("<!-- refusals -->\n")[2]
    remedy = "put the output of `python bench/parallel.py refusals` there"
    assert documented.partition("\n<!-- end -->")[0] == table, remedy
    assert "| ZeRO-1 | - | yes |" in table and "pipeline_stages: needs train.freeze none" in table
