"""A pipeline trains what a plain torch loop trains; its stages are the cheapest cut; a stage does
not outlive another.

pytest tests/parallel/test_pipeline.py -s        prints the table of the largest differences
"""

import itertools
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3_mtp.config import Config, load_config
from dsv3_mtp.config.layout import rank_problems, uncut
from dsv3_mtp.data.source import open_source
from dsv3_mtp.hf import export_hf
from dsv3_mtp.hf.load import load_weights
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.size import layer_flops, model_size
from dsv3_mtp.parallel.build import build_model
from dsv3_mtp.parallel.engine import deepspeed_config
from dsv3_mtp.parallel.launch import World
from dsv3_mtp.parallel.pipeline import balanced, stage_layers
from dsv3_mtp.train.process import own_process
from dsv3_mtp.train.validation import evaluate, metric_means, metric_sums, validate
from tests.conftest import tiny
from tests.made_runs import randomise, write_run
from tests.plain_training import plain_steps
from tests.ranks import _child, chosen, free_port, rows, run_ranks, write_markov

STEPS = 3
ROOT = Path(__file__).parents[2]
EXPERTS = ".mlp.experts."

D2 = {"mtp.num_nextn_predict_layers": 2, "data.mask_documents": True}
RECYCLED = {"mtp.share_weights": True, "mtp.chain": "trunk", "mtp.trunk_hidden": "pre_norm"}
MODELS: dict[str, dict[str, Any]] = {
    "no MTP": {"mtp.mode": "none"},
    "D=1": {"train.batch_size": 12},  # six micro-batches
    "D=2, masked": D2,
    "D=2, masked, recycled": D2 | RECYCLED,
    "parallel D=2": {"mtp.mode": "parallel", "mtp.num_nextn_predict_layers": 2},
    "parallel_linear D=2": {"mtp.mode": "parallel_linear", "mtp.num_nextn_predict_layers": 2},
    "dense": {
        "model.first_k_dense_replace": 3,
        **D2,
    },  # no router before the last stage, or anywhere
    "recomputed": {"train.activation_checkpointing": "full", **D2},
    "objectives": D2 | {"mtp.objective": {"ce": 0.5, "kl": 1.0, "lk": 0.2}},
    "batch ramp": {"train.batch_size_ramp": {"start": 4, "until": 0.1}},
}
# model, ranks, stages, ranks that share the experts
LAYOUTS: dict[str, tuple[str, int, int, int]] = {
    **{f"PP=2, {model}": (model, 2, 2, 1) for model in MODELS if model != "D=2, masked"},
    "PP=3, D=2, masked": ("D=2, masked", 3, 3, 1),
    "PP=2 x DP=2, D=2, masked": ("D=2, masked", 4, 2, 1),
    "PP=2 x SP=2, D=2, masked": ("D=2, masked", 4, 2, 1),
    "PP=2 x SP=2, objectives": ("objectives", 4, 2, 1),
    "PP=2 x EP=2, D=2, masked": ("D=2, masked", 4, 2, 2),
}
# One of each kind; the others are slow.
QUICK = {
    "PP=2, D=1",
    "PP=2, parallel D=2",
    "PP=2, dense",
    "PP=3, D=2, masked",
    "PP=2 x SP=2, objectives",
    "PP=2 x EP=2, D=2, masked",
}


def make_config(folder: Path, data: str, overrides: dict[str, Any]) -> Config:
    base = {
        "run.dir": str(folder),
        "data.train": data,
        "data.val": data,
        "optim.grad_clip": 0.3,  # far below the norm: every step is clipped
        # Adam divides by the gradient: with less, it makes whole steps of rounding errors
        "optim.eps": 1e-5,
        "train.dtype": "float32",
        "train.total_tokens": 20 * 8 * 16,
        "train.batch_size": 8,
        "train.micro_batch_size": 2,
        "train.balance_loss_weight": 0.01,
        "eval.batches": 3,  # not a multiple of the ranks
    }
    return tiny(base | overrides)


def plain(config: Config) -> dict[str, Any]:
    """The run without DeepSpeed and stages."""
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(config.run.seed)
    seen: dict[str, Any] = {
        "start": {n: p.clone() for n, p in model.state_dict().items()},
        "records": [],
    }
    for step in plain_steps(model, config, STEPS):
        seen.setdefault("grads", step.grads)
        sums = metric_sums(step.out).tolist()
        means = metric_means(sums, config.mtp.depths, config.mtp.term_names)
        record = {f"train/{k}": v for k, v in means.items()}
        record |= {"train/loss": step.out.loss.item(), "optim/grad_norm": step.norm}
        balance = config.train.balance_loss_weight * step.out.balance.item() / step.size
        seen["records"].append(record | {"train/balance_loss": balance})
    val = open_source(config.data.val, "val")
    seen["val"] = validate(
        model, val, config, batches=config.eval.batches, device=torch.device("cpu")
    )
    seen["answers"] = model.evaluate([answers(model, config)]).nll_sum
    return seen | {"state": model.state_dict()}


def answers(
    model: DeepseekV3MTP, config: Config
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """A micro-batch in which not every token is a target. No source that a pipeline may read makes
    one yet.
    """
    numbers = torch.Generator().manual_seed(3)
    tokens = torch.randint(64, (2, 16 + model.lookahead), generator=numbers)
    documents = torch.zeros_like(tokens) if config.data.mask_documents else None
    return tokens, documents, torch.rand(tokens.shape, generator=numbers) < 0.4


def train(jobs: list[tuple[Config, str]]) -> None:
    """Trains each job a few steps and writes what this rank saw and held to FILE.rank."""
    for config, file in jobs:
        trainer = own_process(config, command=["test"])
        own = {n: t for n, t in trainer.model.state_dict().items() if not t.is_meta}
        parameters = {n: p for n, p in trainer.model.named_parameters() if n in own}
        seen: dict[str, Any] = {
            "start": {n: t.clone() for n, t in own.items()},
            "stage": trainer.world.stage,
        }
        reduce = trainer.engine.reduce

        def look_and_reduce(seen=seen, parameters=parameters, reduce=reduce):
            # of what is detached on this stage: none
            zeros = {n: torch.zeros_like(p) for n, p in parameters.items()}
            seen.setdefault(
                "grads",
                {n: zeros[n] if p.grad is None else p.grad.clone() for n, p in parameters.items()},
            )
            reduce()

        trainer.engine.reduce = look_and_reduce
        seen["records"] = [trainer.optimizer_step()[0] for _ in range(STEPS)]
        seen["val"] = evaluate(trainer.engine, trainer.val, config)
        seen["answers"] = trainer.engine.evaluate(
            [answers(trainer.model, config)], blanks=0
        ).nll_sum
        first = {
            n: getattr(trainer.model.get_submodule(n.rpartition(".")[0]), "first", 0) for n in own
        }
        torch.save(seen | {"state": own, "first": first}, f"{file}.{os.environ['RANK']}")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_markov(tmp_path_factory.mktemp("data") / "markov", tokens=3000, documents=40)


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory, request) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("plain")
    models = {LAYOUTS[name][0] for name in chosen(request, "name")}
    return {model: plain(make_config(folder, data, MODELS[model])) for model in sorted(models)}


@pytest.fixture(scope="module")
def found(data, tmp_path_factory, request) -> dict[str, list[dict[str, Any]]]:
    """What every rank saw of every layout asked for: one process start per number of ranks."""
    folder, found = tmp_path_factory.mktemp("pipeline"), {}
    for ranks in (2, 3, 4):
        jobs = {}
        for number, name in enumerate(chosen(request, "name")):
            model, size, stages, experts = LAYOUTS[name]
            layout = {"parallel.pipeline_stages": stages, "parallel.expert_parallel_size": experts}
            layout["parallel.sequence_parallel_size"] = 2 if "SP=2" in name else 1
            if size == ranks:
                config = make_config(folder / str(number), data, MODELS[model] | layout)
                jobs[name] = config, str(folder / f"seen{number}")
        if not jobs:
            continue
        log = folder / f"{ranks}.log"
        codes = run_ranks(train, list(jobs.values()), world_size=ranks, log=log, timeout=280)
        text = "".join(Path(f"{log}.rank{rank}").read_text() for rank in range(ranks))
        assert codes == [0] * ranks, text
        assert text == "", "DeepSpeed was heard"
        for name, (_, file) in jobs.items():
            found[name] = [torch.load(f"{file}.{rank}") for rank in range(ranks)]
    return found


def assembled(
    ranks: list[dict[str, Any]], what: str, like: dict[str, torch.Tensor], *, add: bool
) -> dict[str, Any]:
    """The tensors of all ranks in their places: copies are added up, or have to be the same
    bits.
    """
    whole = {}
    for name, shape in ((name, tensor.shape) for name, tensor in like.items()):
        for rank in ranks:
            if name not in rank[what]:
                continue
            part, first = rank[what][name], rank["first"][name]
            into = whole.setdefault(name, torch.full(shape, float("nan"), dtype=part.dtype))[
                first : first + len(part)
            ]
            fresh = into.isnan()
            assert add or bool((fresh | (into == part)).all()), f"{what} {name}: copies differ"
            into.copy_(torch.where(fresh, part, into + part if add else part))
    return whole


@pytest.mark.dist
@pytest.mark.parametrize("name", rows(LAYOUTS, QUICK))
def test_a_pipeline_is_the_plain_training_loop(name: str, expected, found):
    model, size, stages, _ = LAYOUTS[name]
    want, ranks = expected[model], found[name]
    assert {rank["stage"] for rank in ranks} == set(range(stages))
    start = assembled(ranks, "start", want["start"], add=False)
    assert all(torch.equal(start[key], value) for key, value in want["start"].items())

    # DeepSpeed averages over the data-parallel ranks; a tied weight's gradient is the sum over its
    # stages.
    grads = assembled(ranks, "grads", want["grads"], add=True)
    # copies of the embedding too: the same bits
    state = assembled(ranks, "state", want["state"], add=False)
    worst = {"loss": 0.0, "norm": 0.0, "grad": 0.0, "weight": 0.0}
    for key, value in want["grads"].items():
        got = grads[key] / (size // stages)
        torch.testing.assert_close(
            got, value, rtol=1e-4, atol=2e-7, msg=lambda m, key=key: f"grad {key}: {m}"
        )
        worst["grad"] = max(worst["grad"], (got - value).abs().max().item())
    for key, value in want["state"].items():
        torch.testing.assert_close(
            state[key], value, rtol=1e-4, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}"
        )
        worst["weight"] = max(worst["weight"], (state[key] - value).abs().max().item())
    assert all(
        rank["records"] == ranks[0]["records"] and rank["val"] == ranks[0]["val"] for rank in ranks
    )
    for got, record in zip(ranks[0]["records"], want["records"], strict=True):
        assert {key: got[key] for key in record} == pytest.approx(record, rel=2e-5, abs=1e-7)
        worst["loss"] = max(worst["loss"], abs(got["train/loss"] - record["train/loss"]))
        worst["norm"] = max(worst["norm"], abs(got["optim/grad_norm"] - record["optim/grad_norm"]))
    assert ranks[0]["val"] == pytest.approx(want["val"], rel=2e-5)
    # every group of stages has computed the same micro-batch
    scored = sum(rank["answers"] for rank in ranks) / (1 if "SP" in name else size // stages)
    assert scored.tolist() == pytest.approx(want["answers"].tolist(), rel=2e-4)
    print(f"\n| {name:32} |" + "|".join(f" {value:.1e} " for value in worst.values()) + "|")


def test_stages_are_the_cheapest_cut():
    """Against all cuts: the dearest stage first, then the sum of squares."""
    numbers = random.Random(0)
    for _ in range(300):
        costs = [numbers.choice([0.0, 1.0, 2.0, 2.5, 7.0]) for _ in range(numbers.randint(1, 9))]
        parts = numbers.randint(1, min(4, len(costs)))
        cuts = [
            [0, *cut, len(costs)] for cut in itertools.combinations(range(1, len(costs)), parts - 1)
        ]

        def weight(bounds: list[int], costs=costs) -> tuple[float, float]:
            sums = [sum(costs[a:b]) for a, b in itertools.pairwise(bounds)]
            return max(sums), sum(cost**2 for cost in sums)

        assert weight(balanced(costs, parts)) == pytest.approx(
            min(weight(bounds) for bounds in cuts)
        )


def test_layers_cost_what_the_model_costs():
    config = load_config(ROOT / "configs" / "v3_671b.yaml")
    with torch.device("meta"):
        model = DeepseekV3MTP(config.model, config.mtp)
    *trunk, tail = layer_flops(model, 4096)
    assert sum(trunk) + tail == pytest.approx(model_size(model, 4096).flops_per_token)
    dense, moe = trunk[:3], trunk[3:]
    assert len(set(dense)) == len(set(moe)) == 1 and len(moe) == 58
    # One more MoE layer, its 2C x C projection, the output head twice, four norms.
    width, vocab = config.model.hidden_size, config.model.vocab_size
    assert tail == pytest.approx(moe[0] + 6 * (2 * width * width + 2 * width * vocab + 4 * width))


@pytest.mark.parametrize(("experts", "stages"), [(1, 16), (64, 16)])
def test_v3_in_16_stages_is_cut_evenly(experts: int, stages: int):
    sets = [f"parallel.pipeline_stages={stages}", f"parallel.expert_parallel_size={experts}"]
    config = load_config(ROOT / "configs" / "v3_671b.yaml", sets)
    layers = stage_layers(config)
    assert [layer for part in layers for layer in part] == list(range(61)) and len(layers) == 16
    # as Megatron lays it out: 4 x 15, then 1
    assert {len(part) for part in layers[:-1]} == {4} and len(layers[-1]) == 1


def test_what_may_not_be_cut_apart_is_on_one_stage(make_tiny_config):
    shared = {
        "model.num_hidden_layers": 6,
        "model.first_k_dense_replace": 3,
        "parallel.pipeline_stages": 3,
    }
    config = make_tiny_config(shared | {"parallel.expert_parallel_size": 2, "mtp.mode": "none"})
    assert uncut(config) == (4, 2) and stage_layers(config) == [
        range(0, 4),
        range(4, 5),
        range(5, 6),
    ]
    config = make_tiny_config(
        {"mtp.mode": "parallel", "mtp.num_nextn_predict_layers": 4, "parallel.pipeline_stages": 3}
    )
    assert uncut(config) == (1, 2) and stage_layers(config) == [
        range(0, 1),
        range(1, 2),
        range(2, 3),
    ]


def test_a_stage_holds_only_its_part_and_loads_only_that(data, tmp_path, make_tiny_config):
    config = make_config(tmp_path, data, {"parallel.pipeline_stages": 2})
    whole = randomise(DeepseekV3MTP(config.model, config.mtp))
    run = write_run(tmp_path / "run", make_config(tmp_path, data, {}), whole)
    export_hf(run, tmp_path / "hf", dtype="fp32")
    held = []
    for rank in range(2):
        world = World(rank, 2, rank, torch.device("cpu"), stages=2)
        model = build_model(config, deepspeed_config(config, 2), world)
        load_weights(model, tmp_path / "hf")
        own = {name: value for name, value in model.state_dict().items() if not value.is_meta}
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in own.items())
        held.append(set(own))
    assert held[0] | held[1] == set(whole.state_dict())
    assert held[0] & held[1] == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("ranks", "overrides", "problem"),
    [
        (3, {}, "parallel.pipeline_stages: must divide the number of ranks, 3 (got 2)"),
        (
            8,
            {},
            (
                "train.batch_size: 6 sequences do not divide into "
                "micro-batches of 2 on 4 data-parallel ranks; use a "
            ),
        ),
        (
            4,
            {"parallel.expert_parallel_size": 4},
            "parallel.expert_parallel_size: must divide the ranks of a stage, 2 (got 4)",
        ),
    ],
)
def test_what_does_not_fit_the_number_of_ranks_is_said(data, tmp_path, ranks, overrides, problem):
    settings = {"parallel.pipeline_stages": 2, "train.batch_size": 6, **overrides}
    assert any(
        text.startswith(problem)
        for text in rank_problems(make_config(tmp_path, data, settings), ranks)
    )


def test_deepspeed_is_told_the_data_parallel_batch(data, tmp_path):
    config = make_config(tmp_path, data, {"parallel.pipeline_stages": 2})
    given = deepspeed_config(config, 4)  # 2 stages x 2 data-parallel ranks
    assert (
        given["train_batch_size"]
        == 8
        == given["train_micro_batch_size_per_gpu"] * 2 * given["gradient_accumulation_steps"]
    )


def killed_in_the_middle(config: Config) -> None:
    trainer = own_process(config, command=["test"])
    trainer.optimizer_step()
    if trainer.world.stage == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    trainer.optimizer_step()


@pytest.mark.dist
def test_every_stage_ends_soon_after_another_was_killed(data, tmp_path):
    config = make_config(tmp_path, data, {"parallel.pipeline_stages": 3})
    port, context, begin = free_port(), multiprocessing.get_context("fork"), time.monotonic()
    arguments = [
        (killed_in_the_middle, (config,), rank, 3, port, f"{tmp_path}/log{rank}")
        for rank in range(3)
    ]
    stages = [context.Process(target=_child, args=given) for given in arguments]
    for stage in stages:
        stage.start()
    for stage in stages:
        stage.join(max(0.0, begin + 60 - time.monotonic()))
    codes = [stage.exitcode for stage in stages]
    for stage in stages:
        stage.kill()
    assert codes == [1, -signal.SIGKILL, 1], (tmp_path / "log0").read_text()
    assert "Connection" in (tmp_path / "log0").read_text()
