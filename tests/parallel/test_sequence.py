"""Rows in slices compute what whole rows compute: the model in float64, without DeepSpeed. With it:
test_layouts.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench.meter import Meter
from dsv3_mtp.config import Config
from dsv3_mtp.config.layout import describe, rank_problems
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.output import LossSettings
from dsv3_mtp.ops.compute import Compute, Shard, building
from dsv3_mtp.parallel.engine import deepspeed_config
from dsv3_mtp.parallel.launch import World, start
from dsv3_mtp.parallel.sequence import shard_of
from dsv3_mtp.plan.dryrun import dry_run
from dsv3_mtp.plan.memory import communication, layout, plan
from tests.conftest import tiny
from tests.ranks import run_ranks

RANKS, ROWS, LENGTH, DOCUMENTS = 4, 4, 16, torch.tensor([0] * 3 + [1] * 8 + [2] * 20)
SETTINGS: dict[
    str, dict[str, Any]
] = {  # S = 4: slices of 4 slots, so that depth 5 reaches over a whole slice
    "S=2, D=2, masked, selective": {
        "mtp.num_nextn_predict_layers": 2,
        "masked": True,
        "mode": "selective",
        "slices": 2,
    },
    "S=4, D=5, recycled, masked": {
        "mtp.num_nextn_predict_layers": 5,
        "mtp.share_weights": True,
        "masked": True,
    },
    "S=4, parallel D=2, full": {
        "mtp.mode": "parallel",
        "mtp.num_nextn_predict_layers": 2,
        "mode": "full",
    },
    "S=4, frozen trunk": {"mtp.detach": "trunk", "freeze": True},
    "S=4, no MTP, dense, no query latent": {
        "mtp.mode": "none",
        "model.first_k_dense_replace": 3,
        "model.q_lora_rank": None,
    },
}


def configure(settings: dict[str, Any]) -> Config:
    slices = settings.get("slices", 4)
    base = {
        "model.num_attention_heads": 4,
        "parallel.sequence_parallel_size": slices,
        "train.micro_batch_size": slices,
    }
    base["train.activation_checkpointing"] = settings.get("mode", "none")
    return tiny(base | {key: value for key, value in settings.items() if "." in key})


def make(settings: dict[str, Any], shard: Shard | None = None) -> DeepseekV3MTP:
    config, shard = configure(settings), shard or Shard()
    mode = config.train.activation_checkpointing
    with building(Compute(core=shard.attention(None), shard=shard, recompute=mode)):
        model = DeepseekV3MTP(config.model, config.mtp).double()
    model.init_weights(0)
    if settings.get("freeze"):
        model.freeze_trunk()
    return model


def learn(
    model: DeepseekV3MTP, inputs: list[Any], counts: torch.Tensor
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model returns, and its gradients."""
    weights = tuple(0.3 + depth for depth in range(model.depths))
    out = model(*inputs, settings=LossSettings(weights, 0.5, counts, overlap=True))
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return vars(replace(out, loss=out.loss.detach())), grads


def compare(folder: Path) -> None:
    """Writes what this rank got of whole rows and, summed over ranks, of slices; and what it sees
    of other tokens.
    """
    found, process = {}, start(threads=1, timeout_s=60)
    for name, settings in SETTINGS.items():
        model, slices = make(settings), settings.get("slices", 4)
        world = replace(process, slices=slices)
        torch.manual_seed(1)
        ahead = 1 + model.depths
        tokens = torch.randint(0, 64, (ROWS, LENGTH + ahead))
        documents = DOCUMENTS[: LENGTH + ahead].expand(ROWS, -1) if settings.get("masked") else None
        counts = model.loss.counts(tokens, documents)
        want = learn(model, [tokens, documents], counts) if world.is_main else None

        model = make(settings, shard_of(world))
        # of 4 rows, S on each group of S ranks
        mine = slice(world.data_rank * slices, (world.data_rank + 1) * slices)
        inputs = [
            None if x is None else model.shard.cut(x[mine], ahead) for x in (tokens, documents)
        ]
        with Meter() as meter:
            out, grads = learn(model, inputs, counts / world.replicas)
        values = [*out.values(), *grads.values()]
        total = torch.cat([value.double().flatten() for value in values])
        dist.all_reduce(total)
        for value, part in zip(
            values, total.split([value.numel() for value in values]), strict=True
        ):
            value.copy_(part.view_as(value))
        for value in (out["loss"], *grads.values()):  # what DeepSpeed averages
            value /= world.replicas
        found[name] = want, (out, grads) if world.is_main else None
        found["sent", name] = meter.sent["all_to_all"]
        if name == "S=4, D=5, recycled, masked":
            found["seen"] = changes(model, tokens[0])
    torch.save(found, folder / os.environ["RANK"])


def changes(model: DeepseekV3MTP, tokens: torch.Tensor) -> torch.Tensor:
    """(places, 1+D) bool: does any state of this slice, at that depth, change with the token at
    that place?
    """
    rows = torch.stack([tokens, *(tokens + torch.eye(len(tokens), dtype=torch.int64))]) % 64
    with torch.no_grad():
        found = model.head_rows(model.shard.cut(rows, model.lookahead)).rows
        states = [one.inputs[0] for one in found]
    moved = [(state[1:] - state[:1]).abs().amax((1, 2)) > 1e-9 for state in states]
    return torch.stack(moved, dim=1)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sequence")
    codes = run_ranks(compare, folder, world_size=RANKS, log=folder / "log")
    assert codes == [0] * RANKS, (folder / "log.rank0").read_text()
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(RANKS)]


@pytest.mark.dist
@pytest.mark.parametrize("name", SETTINGS)
def test_slices_of_rows_add_up_to_whole_rows(found, name):
    (want, want_grads), (got, grads) = found[0][name]
    assert got.keys() == want.keys()
    for field, value in want.items():
        torch.testing.assert_close(
            got[field], value, rtol=1e-12, atol=1e-12, msg=lambda m, f=field: f"{f}: {m}"
        )
    assert grads.keys() == want_grads.keys() and any(grad.any() for grad in grads.values())
    for key, grad in want_grads.items():
        torch.testing.assert_close(
            grads[key], grad, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.dist
@pytest.mark.parametrize(
    "name", [name for name, settings in SETTINGS.items() if "freeze" not in settings]
)
def test_the_plan_knows_what_a_slice_sends(found, name):
    config = configure(SETTINGS[name])
    with torch.device("meta"):
        model = DeepseekV3MTP(config.model, config.mtp)
    shape = layout(config, RANKS)
    planned = communication(config, plan(config, model, shape), shape)[
        "slices of rows, all-to-all around attention"
    ]
    assert found[0]["sent", name] == 4 * planned, "the model is float64, its config bfloat16"


@pytest.mark.dist
def test_a_slice_sees_all_that_is_before_it_and_nothing_that_is_not(found):
    for rank in range(RANKS):
        last = (rank + 1) * LENGTH // RANKS - 1  # slot, of which depth k reads up to token last + k
        for place, seen in enumerate(found[rank]["seen"].tolist()):
            assert seen == [place <= last + k for k in range(1 + 5)], (rank, place)


@pytest.mark.parametrize(
    ("overrides", "ranks", "problem"),
    [
        (
            {"parallel.sequence_parallel_size": 4},
            None,
            "must divide model.num_attention_heads = 2: attention is divided",
        ),
        (
            {"data.seq_len": 15},
            None,
            "must divide data.seq_len = 15: slices of a row are equal (got 2)",
        ),
        ({}, 3, "must divide the number of ranks, 3 (got 2)"),
        ({"parallel.pipeline_stages": 2}, 2, "must divide the ranks of a stage, 1 (got 2)"),
    ],
)
def test_rows_that_cannot_be_sliced_are_refused(make_tiny_config, overrides, ranks, problem):
    config = make_tiny_config()
    settings = {"parallel.sequence_parallel_size": 2} | overrides
    # a Config would refuse by itself what needs no number of ranks
    for key, value in settings.items():
        section, _, name = key.partition(".")
        config = config.model_copy(
            update={section: getattr(config, section).model_copy(update={name: value})}
        )
    assert any(
        text.startswith(f"parallel.sequence_parallel_size: {problem}")
        for text in rank_problems(config, ranks)
    )


def test_deepspeed_and_the_sampler_are_told_their_own_numbers_of_ranks(make_tiny_config):
    config = make_tiny_config({"parallel.sequence_parallel_size": 2, "train.micro_batch_size": 1})
    given = deepspeed_config(config, 8)  # 4 groups of 2 ranks: 4 sequences, and 8 halves of one
    assert (given["train_batch_size"], given["train_micro_batch_size_per_gpu"]) == (8, 1)
    assert given["gradient_accumulation_steps"] == 1
    (problem,) = rank_problems(config, 16)
    assert problem.endswith(
        "do not divide into micro-batches of 1 on 8 groups of 2 ranks; use a multiple of 8"
    )
    worlds = [World(rank, 8, rank, torch.device("cpu"), stages=2, slices=2) for rank in range(8)]
    assert [world.stage for world in worlds] == [0] * 4 + [1] * 4
    assert [world.data_rank for world in worlds] == [0, 0, 1, 1] * 2 and worlds[0].data_size == 2
    assert describe(config, 8).endswith("ZeRO-1, SP 2")
    report = dry_run(config, world_size=8, plot=False)
    assert "rows over 2 ranks" in report and "slices of rows, all-to-all around attention" in report
    shape = layout(config, 8)
    assert (shape.data, shape.micro_batches, shape.tokens) == (8, 1, 8)
