"""Every layout of the ranks computes what one rank computes: losses, gradients, weights, in real
processes.

pytest tests/parallel/test_layouts.py -s        prints the largest differences
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_mtp.config import Config
from dsv3_mtp.config.layout import rank_problems
from dsv3_mtp.hf import export_hf
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.objectives import registry
from dsv3_mtp.ops.compute import Compute
from dsv3_mtp.parallel.build import build_model
from dsv3_mtp.parallel.launch import World
from dsv3_mtp.train.process import own_process
from dsv3_mtp.train.trainer import Trainer
from dsv3_mtp.train.validation import evaluate
from tests.conftest import tiny
from tests.made_runs import randomise, write_run
from tests.ranks import chosen, rows, run_ranks, write_markov

pytestmark = pytest.mark.dist
STEPS = 2
EXPERTS = ".mlp.experts."

# Models and data: what is trained. One rank trains each of them once; then every layout below is
# compared with it.
D1: dict[str, Any] = {}
D2 = {
    "mtp.num_nextn_predict_layers": 2,
    "data.mask_documents": True,
    "train.activation_checkpointing": "full",
}
NONE = {"mtp.mode": "none"}
PARALLEL = {"mtp.mode": "parallel", "mtp.num_nextn_predict_layers": 2}
BF16 = {
    "train.dtype": "bfloat16",
    "optim.eps": 0.01,
}  # with a tiny eps, Adam makes whole steps of rounding errors
# `skew` sends every token of one router to rank 0's experts, and none of another's to two of its
# experts.
SKEWED = {"mtp.num_nextn_predict_layers": 2, "mtp.share_weights": True}
FROZEN = {"train.init_from": "hf", "train.freeze": "trunk", "mtp.detach": "trunk"}
# Adam divides by the gradient: with less, it makes a whole step of a gradient of -4e-9 that is
# +3e-10 in another order of the sums.
EPS = {"optim.eps": 1e-5}
DRAFTS = D2 | EPS | {"mtp.objective": {"ce": 0.1, "kl": 0.5, "tv": 0.4, "lk_hybrid": 0.3}}
# Heads with weights of their own beside the main head's, which is their teacher: under ZeRO-3 both
# have to be whole at once.
LINEAR = EPS | {
    "mtp.mode": "parallel_linear",
    "mtp.num_nextn_predict_layers": 2,
    "mtp.objective": {"kl": 1.0},
}
MODELS = {
    "D1": D1,
    "D2": D2,
    "none": NONE,
    "parallel": PARALLEL,
    "bf16": BF16,
    "skewed": SKEWED,
    "frozen": FROZEN,
    "drafts": DRAFTS,
    "linear": LINEAR,
    "frozen, lk": FROZEN | {"mtp.objective": {"lk": 1.0}},
    "bf16, tv": BF16 | {"mtp.objective": {"ce": 0.1, "tv": 1.8}},
}

# Layouts: model, ranks, ranks that share the experts, ZeRO stage, offload. ZeRO-3 last: it replaces
# F.linear for good.
LAYOUTS: dict[str, tuple[str, int, int, int, bool]] = {
    "ZeRO-0": ("D1", 2, 1, 0, False),
    "ZeRO-1": ("D1", 2, 1, 1, False),
    "ZeRO-2, D=2, masked, full": ("D2", 2, 1, 2, False),
    "ZeRO-2, no MTP": ("none", 2, 1, 2, False),
    "EP=2, ZeRO-1": ("D1", 2, 2, 1, False),
    "EP=2, ZeRO-2, D=2, masked, full": ("D2", 2, 2, 2, False),
    "EP=2, ZeRO-1, no MTP": ("none", 2, 2, 1, False),
    "EP=2, ZeRO-1, parallel D=2, selective": ("parallel", 2, 2, 1, False),
    "EP=2, ZeRO-1, offload": ("D1", 2, 2, 1, True),
    "EP=2, ZeRO-1, bf16": ("bf16", 2, 2, 1, False),
    "EP=2, ZeRO-2, idle rank and expert": ("skewed", 2, 2, 2, False),
    "EP=2, ZeRO-1, frozen trunk": ("frozen", 2, 2, 1, False),
    "ZeRO-2, drafts": ("drafts", 2, 1, 2, False),
    "EP=2, ZeRO-1, drafts": ("drafts", 2, 2, 1, False),
    "EP=2, ZeRO-1, bf16, tv": ("bf16, tv", 2, 2, 1, False),
    "SP=2, ZeRO-1, drafts": ("drafts", 2, 1, 1, False),
    "SP=2, ZeRO-3, linear": ("linear", 2, 1, 3, False),
    "ZeRO-3, linear": ("linear", 2, 1, 3, False),
    "ZeRO-3, frozen trunk, lk": ("frozen, lk", 2, 1, 3, False),
    "SP=2, ZeRO-3, selective": ("D1", 2, 1, 3, False),
    "ZeRO-3, D=2, masked, full, offload": ("D2", 2, 1, 3, True),
    "ZeRO-3, bf16": ("bf16", 2, 1, 3, False),
    "ZeRO-3, frozen trunk": ("frozen", 2, 1, 3, False),
    "SP=2 x 2, EP=2 x 2 copies, ZeRO-1": ("D1", 4, 2, 1, False),
}
# One of each kind; the others are slow. ZeRO-0 on two ranks: tests/train/test_checkpoint.py.
QUICK = {
    "ZeRO-2, D=2, masked, full",
    "EP=2, ZeRO-1, parallel D=2, selective",
    "EP=2, ZeRO-1, offload",
    "EP=2, ZeRO-1, bf16",
    "EP=2, ZeRO-2, idle rank and expert",
    "SP=2, ZeRO-1, drafts",
    "SP=2, ZeRO-3, linear",
    "ZeRO-3, D=2, masked, full, offload",
    "ZeRO-3, frozen trunk, lk",
    "SP=2 x 2, EP=2 x 2 copies, ZeRO-1",
}
# Settings of some of them beyond these.
MORE: dict[str, dict[str, Any]] = {
    **{
        name: {"train.activation_checkpointing": "selective"}
        for name in LAYOUTS
        if "selective" in name
    },
    **{name: {"parallel.sequence_parallel_size": 2} for name in LAYOUTS if "SP=2" in name},
}


def make_config(
    folder: Path,
    data: str,
    model: str,
    *,
    experts: int = 1,
    stage: int = 0,
    offload: bool = False,
    more: dict[str, Any] | None = None,
) -> Config:
    settings = {
        "run.name": "run",
        "run.dir": str(folder),
        "data.train": data,
        "data.val": data,
        "optim.grad_clip": 0.3,  # far below the norm: every step is clipped
        "train.dtype": "float32",
        "train.total_tokens": 20 * 8 * 16,
        "train.batch_size": 8,
        "train.micro_batch_size": 2,
        "eval.batches": 3,  # not a multiple of the ranks
        "parallel.zero_stage": stage,
        "parallel.offload_optimizer": offload,
        "parallel.expert_parallel_size": experts,
    }
    settings |= MODELS[model] | (more or {})
    if "train.init_from" in settings:
        settings["train.init_from"] = str(folder.parent / "hf")
    return tiny(settings)


def skew(trainer: Trainer) -> None:
    """Of 8 experts, the first router takes only 0..3, which are rank 0's, and the second never
    takes 4 and 5.
    """
    first, second = [gate.e_score_correction_bias for gate in trainer.model.gates()[:2]]
    first[:4] += 10
    second[4:6] -= 10


def train(jobs: list[tuple[str, Config, str]]) -> None:
    """Trains each job a few steps and writes what this rank saw of it to FILE.rank."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    for model, config, file in jobs:
        trainer = own_process(config, command=["test"])
        sharded = config.parallel.zero_stage > 0
        if model == "skewed":
            skew(trainer)
        named, grads, loads = (
            {n: p for n, p in trainer.model.named_parameters() if p.requires_grad},
            {},
            [],
        )
        step, update = trainer.engine.step, trainer.model.update_router_bias

        def step_and_look(lr, *, sides, step=step, named=named, grads=grads, sharded=sharded):
            if not grads:
                grads |= {
                    n: (safe_get_full_grad(p) if sharded else p.grad).clone()
                    for n, p in named.items()
                }
            return step(lr, sides=sides)

        def update_and_look(load, speed, *, update=update, loads=loads):
            loads.append(load)
            update(load, speed)

        trainer.engine.step, trainer.model.update_router_bias = step_and_look, update_and_look
        records = [trainer.optimizer_step()[0] for _ in range(STEPS)]
        values = {
            n: safe_get_full_fp32_param(p) if sharded else p.detach().float()
            for n, p in named.items()
        }
        biases = [gate.e_score_correction_bias for gate in trainer.model.gates()]
        seen = {
            "records": records,
            "val": evaluate(trainer.engine, trainer.val, config),
            "grads": grads,
        }
        seen |= {
            "params": {n: value.clone() for n, value in values.items()},
            "biases": biases,
            "loads": loads,
        }
        torch.save(seen, f"{file}.{os.environ['RANK']}")


@pytest.fixture(scope="module")
def seen(tmp_path_factory, request) -> dict[str, list[dict[str, Any]]]:
    """What every rank saw of every layout that is asked for and, under the names of MODELS, of one
    rank without any.
    """
    folder = tmp_path_factory.mktemp("layouts")
    data = write_markov(folder / "data" / "markov", tokens=3000, documents=40)
    trunk = make_config(folder, data, "none")
    run = write_run(folder / "trunk", trunk, randomise(DeepseekV3MTP(trunk.model, trunk.mtp)))
    export_hf(run, folder / "hf", dtype="fp32")
    jobs: dict[int, list[tuple[str, str, Config]]] = {1: [], 2: [], 4: []}
    layouts = chosen(request, "layout")
    for model in dict.fromkeys(LAYOUTS[name][0] for name in layouts):
        stage = int("bf16" in model)  # ZeRO-0 would compute the norm in bfloat16
        jobs[1].append((model, model, make_config(folder / model, data, model, stage=stage)))
    for number, name in enumerate(layouts):
        model, ranks, experts, stage, offload = LAYOUTS[name]
        parallel = {"experts": experts, "stage": stage, "offload": offload, "more": MORE.get(name)}
        config = make_config(folder / str(number), data, model, **parallel)  # type: ignore[arg-type]
        jobs[ranks].append((name, model, config))
    found = {}
    for ranks, work in ((ranks, work) for ranks, work in jobs.items() if work):
        calls = [(model, config, f"{config.run.dir}/seen") for _, model, config in work]
        codes = run_ranks(train, calls, world_size=ranks, log=folder / f"{ranks}.log", timeout=280)
        assert codes == [0] * ranks, (folder / f"{ranks}.log.rank0").read_text()
        for name, _, config in work:
            files = [f"{config.run.dir}/seen.{rank}" for rank in range(ranks)]
            found[name] = [torch.load(file, weights_only=False) for file in files]
    return found


def whole(ranks: list[dict[str, Any]], what: str, layout: str) -> dict[str, torch.Tensor]:
    """The full tensors: experts put together from the ranks of the first group, all others from
    rank 0.
    """
    experts = LAYOUTS[layout][2]
    parts = [rank[what] for rank in ranks[:experts]]
    return {
        n: torch.cat([part[n] for part in parts]) if EXPERTS in n else value
        for n, value in parts[0].items()
    }


def differences(seen: dict[str, list[dict[str, Any]]], layout: str) -> dict[str, float]:
    """Largest absolute difference from one rank: losses and norms of every step, gradients of the
    first, weights.
    """
    one, ranks = seen[LAYOUTS[layout][0]][0], seen[layout]
    found = {}
    for what, key in (("loss", "train/loss"), ("norm", "optim/grad_norm")):
        pairs = zip(one["records"], ranks[0]["records"], strict=True)
        found[what] = max(abs(a[key] - b[key]) for a, b in pairs)
    losses = [key for key in one["val"] if "loss" in key or "overlap" in key]
    losses += [key for key in one["val"] if key.split("/")[1] in registry()]
    assert (
        one["val"].keys() == ranks[0]["val"].keys()
        and one["records"][0].keys() == ranks[0]["records"][0].keys()
    )
    found["validation"] = max(abs(one["val"][key] - ranks[0]["val"][key]) for key in losses)
    for what in ("grads", "params"):
        other = whole(ranks, what, layout)
        assert other.keys() == one[what].keys()
        found[what] = max(
            (other[n] - value.float()).abs().max().item() for n, value in one[what].items()
        )
    return found


@pytest.mark.parametrize("layout", rows(LAYOUTS, QUICK))
def test_a_layout_equals_one_rank(seen, layout):
    found, low = differences(seen, layout), "bf16" in LAYOUTS[layout][0]
    print(f"\n{layout:40}", *(f"{what} {value:8.1e}" for what, value in found.items()))
    limits = {"loss": 2e-6, "norm": 2e-6, "validation": 2e-6, "grads": 2e-7, "params": 4e-5}
    # another order of bfloat16 sums turns a choice of experts now and then: 2^-8 of the values,
    # about 5 and 2
    if low:
        limits = {"loss": 2e-2, "norm": 2e-2, "validation": 2e-2, "grads": 2e-2, "params": 4e-3}
    assert all(found[what] <= limit for what, limit in limits.items()), found
    one, ranks = seen[LAYOUTS[layout][0]][0], seen[layout]
    # the router biases and the balance statistics are those of all tokens, on every rank
    for rank in ranks:
        if not low:
            assert all(torch.equal(a, b) for a, b in zip(one["loads"], rank["loads"], strict=True))
        for a, b in zip(ranks[0]["biases"], rank["biases"], strict=True):
            assert torch.equal(a, b) and a.dtype == torch.float32
    last = ranks[0]["records"][-1]
    assert last["moe/nodes_per_token"] == pytest.approx(
        one["records"][-1]["moe/nodes_per_token"], rel=1e-2 if low else 0
    )
    assert 1 <= last["moe/nodes_per_token"] <= 2  # topk_group


@pytest.mark.parametrize(
    "layout", rows([name for name, (model, *_) in LAYOUTS.items() if model == "skewed"], QUICK)
)
def test_an_idle_rank_and_an_idle_expert_have_zero_gradients(seen, layout):
    grads = whole(seen[layout], "grads", layout)
    first, second = [grads[f"model.layers.{layer}{EXPERTS}down_proj"] for layer in (1, 2)]
    assert first[:4].abs().amax((1, 2)).gt(0).all() and not first[4:].any()
    assert not second[4:6].any() and second[[0, 1, 2, 3, 6, 7]].abs().amax((1, 2)).gt(0).all()


@pytest.mark.parametrize(
    "layout", rows([name for name, (_, _, experts, *_) in LAYOUTS.items() if experts > 1], QUICK)
)
def test_a_rank_holds_only_its_experts_and_copies_stay_equal(seen, layout):
    _, count, experts, *_ = LAYOUTS[layout]
    for rank, found in enumerate(seen[layout]):
        for name, value in found["params"].items():
            if EXPERTS in name:
                assert len(value) == 8 // experts
                assert torch.equal(value, seen[layout][rank % experts]["params"][name])
    assert count % experts == 0


def test_layouts_that_do_not_fit_the_ranks_are_refused_all_at_once(tmp_path):
    config = make_config(tmp_path, "data", "D1", experts=4, stage=1)
    assert rank_problems(config) == rank_problems(config, 4) == []
    first, second = rank_problems(config, 6)
    assert first == "parallel.expert_parallel_size: must divide the number of ranks, 6 (got 4)"
    assert second.startswith(
        "train.batch_size: 8 sequences do not divide into micro-batches of 2 on 6 ranks"
    )
    assert second.endswith("; use a multiple of 12")  # 8 sequences are no share of 6 ranks at all


@pytest.mark.parametrize(("batch", "ranks", "fits"), [(8, 2, 4), (12, 2, 6), (12, 4, 3)])
def test_a_batch_that_does_not_divide_is_kept_by_the_largest_micro_batch_that_fits(
    tmp_path, batch, ranks, fits
):
    config = make_config(tmp_path, "data", "D1")
    train = config.train.model_copy(update={"batch_size": batch, "micro_batch_size": 8})
    (problem,) = rank_problems(config.model_copy(update={"train": train}), ranks)
    assert problem == (
        f"train.batch_size: {batch} sequences do not divide into micro-batches of 8 on {ranks} "
        f"ranks; use a multiple of {8 * ranks}, or train.micro_batch_size: {fits}, the same batch"
    )
    train = train.model_copy(update={"micro_batch_size": fits})
    assert rank_problems(config.model_copy(update={"train": train}), ranks) == []


def test_a_built_model_is_the_plain_model_of_that_seed(tmp_path):
    config = make_config(tmp_path, "data", "D2")
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    built = build_model(config, {}, world, Compute())
    plain = DeepseekV3MTP(config.model, config.mtp)
    plain.init_weights(config.run.seed)
    assert list(dict(built.named_buffers())) == list(dict(plain.named_buffers()))
    for (name, a), (_, b) in zip(
        built.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
