"""A study file is checked as a whole, and stands for exactly the runs that it should."""

import datetime
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import BaseModel

from dsv3_mtp.config import ConfigError, schedules
from dsv3_mtp.config.reader import key_paths
from dsv3_mtp.heads import registry
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.model.size import model_size
from dsv3_mtp.study.dryrun import dry_run
from dsv3_mtp.study.expand import expand, shared_steps, steps_of, training_flops
from dsv3_mtp.study.load import load_study
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.metric_names import describe_metric, not_measured
from dsv3_mtp.tasks.base import ExampleTask
from tests.study.toy import STEPS, load_toy, write_toy

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs" / "studies").glob("*.yaml"))


def test_the_matrix_is_every_arm_with_every_seed(tmp_path):
    runs = expand(load_toy(tmp_path), budgets={})
    assert [run.name for run in runs] == [
        f"{arm}-seed{seed}" for seed in (1, 2) for arm in ("constant", "step", "none")
    ]
    for run in runs:
        assert run.config.run.seed == run.seed
        assert run.config.run.dir == str(tmp_path / "runs" / "toy")
    assert {run.config.mtp.depths for run in runs if run.arm == "none"} == {0}


def test_in_wandb_the_runs_of_a_study_are_a_group(tmp_path):
    path = write_toy(tmp_path)
    for project, group in (("{project: x}", "toy"), ("{project: x, group: own}", "own")):
        loaded = load_study(path, [f"log.wandb={project}"])
        runs = expand(loaded, budgets={})
        assert {run.config.log.wandb.group for run in runs} == {group}


def test_arms_differ_from_the_base_in_their_own_settings_only(tmp_path):
    loaded = load_toy(tmp_path)
    constant, none = loaded.configs["constant"], loaded.configs["none"]
    assert (
        constant.model == none.model and constant.optim == none.optim and constant.data == none.data
    )
    assert none.mtp.mode == "none" and constant.mtp.loss_weight.value == 0.3


def test_an_override_of_a_run_reaches_every_arm_and_one_of_the_study_the_study(tmp_path):
    loaded = load_study(write_toy(tmp_path), ["optim.lr=1e-5", "seeds=[7]", "run.name=other"])
    assert {config.optim.lr for config in loaded.configs.values()} == {1e-5}
    assert loaded.study.seeds == (7,) and loaded.study.folder.name == "other"


def test_all_problems_are_reported_at_once(tmp_path):
    def break_it(tree):
        tree["seeds"] = [1, 1]
        tree["scale"] = "huge"
        tree["arms"]["none"]["set"]["run.seed"] = 3
        tree["arms"]["late"] = {"about": "x", "match": {"arm": "nobody", "by": "flops"}}
        tree["comparisons"]["heads"]["arms"] = ["constant", "missing", "none"]
        tree["primary"]["comparison"] = "head"
        tree["colour"] = "red"

    with pytest.raises(ConfigError) as error:
        load_toy(tmp_path, break_it)
    text = str(error.value)
    for part in ("colour: unknown key",):
        assert part in text
    with pytest.raises(ConfigError) as error:
        load_toy(tmp_path, lambda tree: (break_it(tree), tree.pop("colour")))
    text = str(error.value)
    assert "6 problems" in text or "7 problems" in text
    for part in (
        "scale: must be one of cpu",
        "seeds: must differ",
        "primary.comparison: must be one of heads, schedule",
        "arms.none.set.run.seed: is given by the study",
        "arms.late.match.arm: must be an arm above it (got 'nobody')",
        "comparisons.heads: there is no arm 'missing'",
        "comparisons.heads: compares 'none' with itself",
    ):
        assert part in text


def test_what_would_not_be_measured_or_not_be_heeded_is_refused_before_the_runs(tmp_path):
    def break_it(tree):
        tree["seeds"] = [1, 2**63]
        tree["primary"]["metric"] = "val/main_los"
        tree["metrics"] = ["val/top1/0", "acceptance/T1/joint/1", "task/solved"]
        tree["acceptance"] = None
        tree["arms"]["none"]["set"] |= {"run": {"seed": 3}, "optim": {"lr": 1e-3}}
        tree["comparisons"]["heads"]["arms"] = ["constant", "constant"]

    with pytest.raises(ConfigError) as error:
        load_toy(tmp_path, break_it)
    assert f"seeds[1]: must be < {2**63} (got {2**63})" in str(error.value)
    with pytest.raises(ConfigError) as error:
        load_toy(tmp_path, lambda tree: (break_it(tree), tree.update(seeds=[1])))
    for part in (
        "6 problems",
        (
            "arms.none.set.optim: is a whole section, whose other "
            "keys would no longer be the base's; give dotted keys"
        ),
        (
            "primary.metric: no run is measured by it (got "
            "'val/main_los'); did you mean 'val/main_loss'?"
        ),
        "metrics[1]: is measured only with acceptance; set that too",
        "metrics[2]: is measured only with solve_threshold",
        "arms.none.set.run: is given by the study",
        "comparisons.heads.arms: must differ (got ['constant', 'constant'])",
    ):
        assert part in str(error.value)


def test_a_study_asks_for_what_heads_objectives_and_tasks_of_its_own_log(tmp_path):
    own = {
        "mtp.mode": "tests.example_heads:ConfidenceHead",
        "mtp.objective": {"ce": 1.0, "examples.reverse_kl:ReverseKL": 1.0},
    }
    names = ["val/mtp_term/confidence", "val/reverse_kl/1"]

    def ask(tree, metrics):
        tree["arms"]["constant"]["set"] = own
        tree["metrics"] = metrics

    assert load_toy(tmp_path, lambda tree: ask(tree, names)).study.metrics == tuple(names)
    for wrong in ("val/mtp_term/confidenc", "val/reverse_kll/1", "task/no_such"):
        with pytest.raises(ConfigError, match=r"metrics\[0\]: no run is measured by it"):
            load_toy(tmp_path, lambda tree, wrong=wrong: ask(tree, [wrong]))

    class Fifth(ExampleTask):
        METRICS: ClassVar = {"task/fifth": ("fifth token", "higher")}

    assert not_measured("task/fifth") is None
    assert describe_metric("task/fifth") == ("fifth token", "higher")


def test_what_the_arms_models_and_data_do_not_allow_to_measure_is_refused(tmp_path):
    def ask(tree):
        tree["acceptance"] |= {"prefix_tokens": 13}
        tree["solve_threshold"] = 0.5
        tree["set"] = {"train.micro_batch_size": 1, "parallel.zero_stage": 1}
        tree["arms"]["step"]["set"]["parallel.pipeline_stages"] = 2
        # what YAML reads 2024-01-01 as
        tree["arms"]["none"]["set"]["mtp.mode"] = datetime.date(2024, 1, 1)

    with pytest.raises(ConfigError) as error:
        load_toy(tmp_path, ask)
    for part in (
        (
            "acceptance: prefix_tokens + new_tokens must be <= "
            "model.max_position_embeddings = 16 of arms.step (got 17)"
        ),
        "solve_threshold: needs a data.task with answers, which arms.constant, step have not",
        # a run is one process
        "arms.step: parallel.pipeline_stages: must divide the number of ranks, 1 (got 2)",
        f"arms.none: mtp.mode: must be one of none, {', '.join(registry())} (got '2024-01-01')",
    ):
        assert part in str(error.value)


def test_a_base_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: 1 problem\n  file: cannot be read"):
        load_toy(tmp_path, lambda tree: tree["scales"]["cpu"].update(base="nowhere.yaml"))


def test_problems_of_the_arms_configs_name_the_arms(tmp_path):
    def break_it(tree):
        tree["set"] = {"optim.lrr": 1}
        tree["arms"]["step"]["set"]["mtp.num_nextn_predict_layers"] = 0

    with pytest.raises(ConfigError) as error:
        load_toy(tmp_path, break_it)
    assert "every arm: optim.lrr: unknown key; did you mean 'optim.lr'?" in str(error.value)
    assert "arms.step: mtp.num_nextn_predict_layers: must be >= 1" in str(error.value)


def test_shared_prefix_ends_with_the_first_step_whose_schedule_differs(tmp_path):
    loaded = load_toy(tmp_path)
    constant, step = loaded.configs["constant"], loaded.configs["step"]
    weights = [schedules.mtp_loss_weight(step.mtp.loss_weight, n / STEPS) for n in range(STEPS)]
    assert shared_steps(constant, step) == weights.index(0.0) == 5
    assert shared_steps(constant, loaded.configs["none"]) == 0
    forked = [run for run in expand(loaded, budgets={}) if run.parent]
    assert [(run.name, run.parent, run.fork_step) for run in forked] == [
        ("step-seed1", "constant-seed1", 4),  # the last checkpoint within the five steps
        ("step-seed2", "constant-seed2", 4),
    ]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("optim.weight_decay", 0.0),
        ("train.balance_loss_weight", 0.01),
        ("mtp.detach", "trunk"),
        ("data.seq_len", 8),
    ]
    + [
        ("train.micro_batch_size", 2),
        ("eval.batches", 3),
    ],  # other roundings, other validation windows
)
def test_arms_that_differ_in_more_than_a_schedule_share_nothing(tmp_path, setting, value):
    loaded = load_toy(tmp_path, lambda tree: tree["arms"]["step"]["set"].update({setting: value}))
    assert shared_steps(loaded.configs["constant"], loaded.configs["step"]) == 0
    assert all(run.parent is None for run in expand(loaded, budgets={}))


def test_matched_flops_give_the_plain_model_more_tokens(tmp_path):
    def add(tree):
        tree["arms"]["none_flops"] = {
            "about": "x",
            "set": {"mtp.mode": "none"},
            "match": {"arm": "constant", "by": "flops"},
        }

    loaded = load_toy(tmp_path, add)
    runs = {run.arm: run.config for run in expand(loaded, budgets={})}
    one_step = training_flops(runs["none"]) / steps_of(runs["none"])
    assert training_flops(runs["none_flops"]) == pytest.approx(
        training_flops(runs["constant"]), abs=one_step / 2
    )
    size = model_size(DeepseekV3MTP(runs["none"].model, runs["none"].mtp), 16)
    assert training_flops(runs["none"]) == size.flops_per_token * STEPS * 4 * 16


def test_a_frozen_trunk_costs_what_the_trainer_counts(tmp_path):
    def freeze(tree):
        tree["arms"]["step"]["set"] |= {
            "train.init_from": "x",
            "train.freeze": "trunk",
            "mtp.detach": "trunk",
        }

    configs = load_toy(tmp_path, freeze).configs
    model = DeepseekV3MTP(configs["step"].model, configs["step"].mtp)
    model.freeze_trunk()
    expected = model_size(model, configs["step"].data.seq_len).flops_per_token * 512
    assert training_flops(configs["step"]) == expected < 0.7 * training_flops(configs["constant"])


def test_an_arm_with_a_measured_time_waits_for_the_measurement(tmp_path):
    match = {"arm": "constant", "by": "cpu_time", "pace": "none"}
    arm = {"about": "x", "set": {"mtp.mode": "none"}, "match": match}
    loaded = load_toy(tmp_path, lambda tree: tree["arms"].update(timed=arm))
    assert "timed" not in {run.arm for run in expand(loaded, budgets={})}
    (timed,) = {
        run.config.train.total_tokens
        for run in expand(loaded, budgets={"timed": 640})
        if run.arm == "timed"
    }
    assert timed == 640


def test_dry_run_counts_a_forked_prefix_once(tmp_path):
    text = dry_run(load_toy(tmp_path), jobs=2)
    assert "3 arms x 2 seeds = 6 runs" in text
    assert "constant at step 4" in text
    runs = {run.arm: run.config for run in expand(load_toy(tmp_path), budgets={})}
    total = 2 * (1.5 * training_flops(runs["constant"]) + training_flops(runs["none"]))
    assert f"training FLOPs: {total:.3e}" in text


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_study_is_valid_at_every_scale(path):
    text = path.read_text()
    assert f"configs/studies/{path.name}" in text.splitlines()[0]
    loaded = load_study(path)
    assert expand(loaded, budgets={})
    assert loaded.study.run.name == path.stem and len(loaded.study.seeds) >= 5
    for scale in set(loaded.study.scales) - {loaded.study.scale}:
        load_study(path, [f"scale={scale}"])


def test_heads_are_compared_under_every_rule_of_fairness():
    study = load_study(ROOT / "configs" / "studies" / "heads.yaml").study
    rules = {comparison.rule for comparison in study.comparisons.values()}
    assert rules >= {
        "added parameters",
        "matched parameters",
        "matched training FLOPs",
        "matched CPU time",
    }


def gridded(tree) -> None:
    tree["grid"] = {
        "about": "lambda by depth",
        "set": {"mtp.mode": "parallel"},
        "axes": {
            "lambda": {"key": "mtp.loss_weight", "values": [0.1, 0.3]},
            "shape": {"key": "mtp.detach", "values": {"joint": "none", "apart": "trunk"}},
        },
    }
    compared = {"against": "none", "arms": ["lambda*", "constant"], "rule": "added parameters"}
    tree["comparisons"]["heads"] = compared


def test_a_grid_stands_for_every_combination_and_a_pattern_for_the_arms_that_it_fits(tmp_path):
    loaded = load_toy(tmp_path, gridded)
    names = [f"lambda{value}_{shape}" for value in (0.1, 0.3) for shape in ("joint", "apart")]
    assert list(loaded.study.arms) == ["constant", "step", "none", *names]
    assert loaded.study.comparisons["heads"].arms == (*names, "constant")
    config = loaded.configs["lambda0.1_apart"]
    assert (config.mtp.loss_weight.value, config.mtp.detach) == (0.1, "trunk")
    assert config.mtp.mode == "parallel" and loaded.study.arms[names[0]].about == "lambda by depth"


def test_problems_of_a_grid_and_of_what_is_expected_are_named(tmp_path):
    def break_it(tree):
        gridded(tree)
        tree["grid"]["axes"]["shape"]["values"] = []
        tree["learning_rate"] = {"tuned_for": "nobody", "source": "x"}
        tree["comparisons"]["schedule"]["arms"] = ["nothing*"]
        tree["comparisons"]["heads"] |= {"arms": ["constant"]}
        tree["comparisons"]["heads"]["expected"] = {
            "val/top1/0": {"effect": 1.0, "source": "x"},
            "val/main_loss": {"effect": {"step": 1.0}, "source": "x"},
        }
        tree["acceptance"]["draws"] = 3

    with pytest.raises(ConfigError) as error:
        load_toy(tmp_path, break_it)
    text = str(error.value)
    assert "grid.axes.shape.values" in text and "acceptance.draws: must be <= prefixes = 2" in text

    def rest(tree):
        break_it(tree)
        tree.pop("grid")
        tree["acceptance"]["draws"] = 1

    with pytest.raises(ConfigError) as error:
        load_toy(tmp_path, rest)
    for part in (
        "learning_rate.tuned_for: must be an arm, or 'every arm' (got 'nobody')",
        "comparisons.schedule: there is no arm 'nothing*'",
        "comparisons.heads.expected.val/top1/0: is neither primary.metric nor one of `metrics`",
        "comparisons.heads.expected.val/main_loss.effect.step: is no arm of this comparison",
    ):
        assert part in str(error.value), part


def keys_of(section: type[BaseModel], prefix: str = "") -> set[str]:
    return {key.rpartition(".")[2] for key in key_paths(section, prefix)}


def test_the_reference_names_every_key_of_a_study_file():
    text = (ROOT / "docs" / "study.md").read_text()
    missing = {key for key in keys_of(Study) if f"`{key}`" not in text}
    assert not missing
