"""Every message of the configuration report, and the files in configs/."""

import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_mtp.config import Config, ConfigError, ModelConfig, StepWeight, load_config
from dsv3_mtp.config.reader import did_you_mean, key_paths
from dsv3_mtp.config.synonyms import OURS, SYNONYMS
from dsv3_mtp.config.tree import read_tree
from dsv3_mtp.heads import registry

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "v3_tiny.yaml"
CONFIGS = sorted(
    path for folder in ("configs", "configs/heads") for path in (ROOT / folder).glob("*.yaml")
)


def problems(*sets: str, path: Path = TINY) -> list[str]:
    """The lines of the report, without the first and without indentation."""
    with pytest.raises(ConfigError) as error:
        load_config(path, sets)
    first, *lines = str(error.value).splitlines()
    assert first == f"{path}: {len(lines)} problem" + "s" * (len(lines) != 1)
    return [line.removeprefix("  ") for line in lines]


MISTAKES = [
    # unknown keys: a near miss, a key of another section, a section, nothing like it
    (
        "mtp.num_nextn_predict_layer=1",
        "mtp.num_nextn_predict_layer: unknown key; did you mean 'mtp.num_nextn_predict_layers'?",
    ),
    ("mtp.lr=1", "mtp.lr: unknown key; did you mean 'optim.lr'?"),
    ("lr=1", "lr: unknown key; did you mean 'optim.lr'?"),
    ("optm.lr=1", "optm: unknown key; did you mean 'optim'?"),
    ("zzz=1", "zzz: unknown key"),
    # what others call our keys
    *(
        (f"{name}=1", f"{name}: unknown key; did you mean '{key}'?")
        for name, key in [
            ("mtp.depth", "mtp.num_nextn_predict_layers"),
            ("mtp.num_heads", "mtp.num_nextn_predict_layers"),
            ("mtp.n_future_tokens", "mtp.num_nextn_predict_layers"),
            ("mtp.lambda", "mtp.loss_weight"),
            ("train.lr", "optim.lr"),
            ("optim.learning_rate", "optim.lr"),
            ("optim.batch_size", "train.batch_size"),
            ("train.max_steps", "train.total_tokens"),
            ("model.num_layers", "model.num_hidden_layers"),
            ("train.num_heads", "model.num_attention_heads"),
            ("max_steps", "train.total_tokens"),
        ]
    ),
    (
        "optim.schedule.warm_up=0",
        "optim.schedule.warm_up: unknown key; did you mean 'optim.schedule.warmup'?",
    ),
    # types
    ("train.batch_size=many", "train.batch_size: must be an integer (got 'many')"),
    ("train.batch_size=1.5", "train.batch_size: must be an integer (got 1.5)"),
    ("train.batch_size=null", "train.batch_size: must be an integer (got null)"),
    ("train.batch_size=true", "train.batch_size: must be a number (got true)"),
    ("optim.lr=fast", "optim.lr: must be a number (got 'fast')"),
    ("optim.lr=.inf", "optim.lr: must be finite (got inf)"),
    ("mtp.embed=maybe", "mtp.embed: must be true or false (got 'maybe')"),
    ("run.name=3", "run.name: must be text; put it in quotes (got 3)"),
    ("run.name=''", "run.name: must not be empty"),
    ("run=3", "run: must be a mapping (got 3)"),
    ("optim.betas=0.9", "optim.betas: must be a list (got 0.9)"),
    ("optim.betas=[0.9]", "optim.betas[1]: missing; it has no default"),
    ("optim.betas=[0.9, 0.95, 0.99]", "optim.betas: must hold 2 values (got [0.9, 0.95, 0.99])"),
    ("deepspeed=[]", "deepspeed: must be a mapping (got [])"),
    # bounds
    ("train.micro_batch_size=0", "train.micro_batch_size: must be >= 1 (got 0)"),
    ("optim.lr=0", "optim.lr: must be > 0 (got 0)"),
    ("optim.betas=[0.9, 1]", "optim.betas[1]: must be < 1 (got 1)"),
    (
        (
            "model.rope_scaling={type: yarn, factor: 4, "
            "original_max_position_embeddings: 64, beta_fast: 1, beta_slow: 32}"
        ),
        "model.rope_scaling.beta_fast: must be >= beta_slow = 32.0 (got 1.0)",
    ),
    ("train.bias_update_until=1.1", "train.bias_update_until: must be <= 1 (got 1.1)"),
    ("run.seed=-1", "run.seed: must be >= 0 (got -1)"),
    ("eval.batches=0", "eval.batches: must be >= 1 (got 0)"),
    ("checkpoint.keep=0", "checkpoint.keep: must be >= 1 (got 0)"),
    # enumerations
    (
        "mtp.mode=sequental",
        f"mtp.mode: must be one of none, {', '.join(registry())} (got 'sequental'); "
        "did you mean 'sequential'?",
    ),
    (
        "train.dtype=float16",
        "train.dtype: must be one of float32, bfloat16 (got 'float16'); did you mean 'bfloat16'?",
    ),
    ("parallel.zero_stage=4", "parallel.zero_stage: must be one of 0, 1, 2, 3 (got 4)"),
    # missing
    ("log.wandb={}", "log.wandb.project: missing; it has no default"),
    ("data.train=[{path: a}]", "data.train[0].weight: missing; it has no default"),
    ("mtp.stride=3", "mtp.stride: has no effect with mode sequential; remove it or set 2 (got 3)"),
    (
        "mtp.mode=hsm",
        "mtp.num_nextn_predict_layers: must be >= 2 with mode hsm: module 1 has the trunk's state "
        "alone to read (got 1)",
    ),
    # MTP loss weights
    ("mtp.loss_weight=-0.1", "mtp.loss_weight: must be >= 0 (got -0.1)"),
    ("mtp.loss_weight=.nan", "mtp.loss_weight: must be finite (got nan)"),
    (
        "mtp.loss_weight={type: stp}",
        "mtp.loss_weight: type must be one of constant, cosine, "
        "exponential, linear, piecewise, step, warmup (got 'stp'); "
        "did you mean 'step'?",
    ),
    (
        "mtp.loss_weight={value: 1}",
        "mtp.loss_weight: must be a mapping with a 'type' (got {'value': 1})",
    ),
    (
        "mtp.loss_weight={type: step, values: [1], at: [0.5]}",
        "mtp.loss_weight.values: must hold one number more than 'at' (got 1 and 1)",
    ),
    (
        "mtp.loss_weight={type: step, values: [1, 2, 3], at: [0.5, 0.4]}",
        "mtp.loss_weight.at: must increase (got [0.5, 0.4])",
    ),
    (
        "mtp.loss_weight={type: linear, start: 1, end: 0, begin: 0.5, until: 0.5}",
        "mtp.loss_weight.until: must be > 'begin' = 0.5 (got 0.5)",
    ),
    (
        "mtp.loss_weight={type: piecewise, points: [[0.5, 1], [0.5, 2]]}",
        "mtp.loss_weight.points: must be in order of progress, none twice (got [0.5, 0.5])",
    ),
    # rules between keys
    ("run.name=a/b", "run.name: must be a plain folder name; put folders into run.dir (got 'a/b')"),
    (
        r'run.name="a\0b"',
        "run.name: must be a plain folder name; put folders into run.dir (got 'a\\x00b')",
    ),
    (
        "model.n_routed_experts=18",
        "model.n_routed_experts: must be a multiple of model.n_group = 4 (got 18)",
    ),
    ("model.topk_group=5", "model.topk_group: must be <= model.n_group = 4 (got 5)"),
    (
        "model.num_experts_per_tok=9",
        (
            "model.num_experts_per_tok: must be <= 8, the "
            "experts in 2 groups (model.topk_group) (got 9)"
        ),
    ),
    (
        "train.total_tokens=010000",
        "--set train.total_tokens=010000: the value is invalid "
        "YAML: 010000 is octal or sexagesimal here; write the "
        "number in decimal, or put text in quotes",
    ),
    (
        "optim.lr=1:30",
        "--set optim.lr=1:30: the value is invalid YAML: 1:30 "
        "is octal or sexagesimal here; write the number in "
        "decimal, or put text in quotes",
    ),
    (
        "model={<<: *x}",
        "--set model={<<: *x}: the value is invalid YAML: found undefined alias 'x'",
    ),
    (
        "model.first_k_dense_replace=5",
        "model.first_k_dense_replace: must be <= model.num_hidden_layers = 4 (got 5)",
    ),
    (
        "model.qk_rope_head_dim=15",
        "model.qk_rope_head_dim: must be even, rotary embedding turns pairs (got 15)",
    ),
    ("data.seq_len=512", "data.seq_len: must be <= model.max_position_embeddings = 256 (got 512)"),
    (
        "data.train=[{path: a, weight: 1}]",
        "data.build: needs one folder in data.train, not a list; set null (got 'pystdlib')",
    ),
    (
        "train.batch_size=6",
        "train.batch_size: must be a multiple of train.micro_batch_size = 4 (got 6)",
    ),
    (
        "train.total_tokens=2047",
        (
            "train.total_tokens: must be >= one step, "
            "train.batch_size * data.seq_len = 2048 (got 2047)"
        ),
    ),
    (
        "train.batch_size_ramp={start: 32, until: 0.1}",
        "train.batch_size_ramp.start: must be <= train.batch_size = 8 (got 32)",
    ),
    (
        "train.batch_size_ramp={start: 6, until: 0.1}",
        "train.batch_size_ramp.start: must be a multiple of train.micro_batch_size = 4 (got 6)",
    ),
    (
        "optim.schedule.warmup=0.7",
        "optim.schedule.decay_start: must be >= warmup = 0.7 (got 0.6757)",
    ),
    (
        "mtp.depth_weights=[1, 2]",
        "mtp.depth_weights: must hold num_nextn_predict_layers = 1 numbers (got 2)",
    ),
    (
        "mtp.num_nextn_predict_layers=0",
        (
            "mtp.num_nextn_predict_layers: must be >= 1 with mode "
            "sequential (got 0); mtp.mode=none turns the heads off"
        ),
    ),
    # layouts
    (
        "parallel={zero_stage: 0, offload_optimizer: true}",
        (
            "parallel.offload_optimizer: needs parallel.zero_stage "
            ">= 1: ZeRO-0 has no optimizer shard to move"
        ),
    ),
    (
        "parallel={zero_stage: 0, expert_parallel_size: 2}",
        "parallel.expert_parallel_size: needs parallel.zero_stage "
        "1 or 2: DeepSpeed's ZeRO-0 clips by each rank's own "
        "gradient norm (got 0)",
    ),
    (
        "parallel={zero_stage: 3, expert_parallel_size: 2}",
        "parallel.expert_parallel_size: needs parallel.zero_stage "
        "1 or 2: DeepSpeed's ZeRO-3 takes no expert-parallel "
        "groups (got 3)",
    ),
    (
        "parallel.expert_parallel_size=32",
        "parallel.expert_parallel_size: must divide model.n_routed_experts = 16 (got 32)",
    ),
    (
        "parallel={zero_stage: 0, pipeline_stages: 2}",
        "parallel.pipeline_stages: needs parallel.zero_stage 1: "
        "DeepSpeed's ZeRO-0 clips by each stage's own gradient "
        "norm (got 0)",
    ),
    (
        "parallel={zero_stage: 2, pipeline_stages: 2}",
        "parallel.pipeline_stages: needs parallel.zero_stage 1: "
        "DeepSpeed's pipeline reduces gradients once per step, "
        "ZeRO-2 and 3 in every backward (got 2)",
    ),
    (
        "parallel.pipeline_stages=6",
        (
            "parallel.pipeline_stages: must be <= 5, the pieces "
            "that layers and heads can be cut into (got 6)"
        ),
    ),
    ("train.ema_decay=1", "train.ema_decay: must be < 1 (got 1)"),
    (
        "optim.moments=float16",
        "optim.moments: must be one of float32, bfloat16 (got 'float16'); did you mean 'bfloat16'?",
    ),
    # DeepSpeed
    (
        "deepspeed.zero_optimization.offload_optimizer={}",
        "deepspeed.zero_optimization.offload_optimizer: set parallel.offload_optimizer instead",
    ),
    (
        "deepspeed.zero_optimization.cpu_offload=true",
        "deepspeed.zero_optimization.cpu_offload: set parallel.offload_optimizer instead",
    ),
    (
        "deepspeed.zero_optimization.compute_grad_norm=false",
        "deepspeed.zero_optimization.compute_grad_norm: is not "
        "supported: optim/grad_norm is logged, and has to be "
        "finite",
    ),
    (
        "deepspeed.zero_optimization={offload_param: {device: nvme}}",
        "deepspeed.zero_optimization.offload_param: is not "
        "supported: checkpoints read weights and optimizer states "
        "from DeepSpeed's memory",
    ),
    (
        "deepspeed.checkpoint={}",
        (
            "deepspeed.checkpoint: would have no effect: "
            "checkpoints are not DeepSpeed's; set checkpoint instead"
        ),
    ),
    (
        "deepspeed.data_types={keep_in_fp32_modules: []}",
        "deepspeed.data_types: only grad_accum_dtype can be set; train.dtype owns the others",
    ),
    ("deepspeed.train_batch_size=3", "deepspeed.train_batch_size: set train.batch_size instead"),
    (
        "deepspeed.zero_optimization.stage=2",
        "deepspeed.zero_optimization.stage: set parallel.zero_stage instead",
    ),
    (
        "deepspeed.zero_optimizatoin={}",
        (
            "deepspeed.zero_optimizatoin: unknown to DeepSpeed "
            "0.19.8; did you mean 'deepspeed.zero_optimization'?"
        ),
    ),
    # overrides that are none
    ("mtp.mode", "--set mtp.mode: must be KEY=VALUE, for example --set mtp.mode=parallel"),
    ("=3", "--set =3: must be KEY=VALUE, for example --set mtp.mode=parallel"),
    (
        "mtp.mode.x=1",
        "--set mtp.mode.x=1: mtp.mode is 'sequential', not a mapping; set mtp.mode as a whole",
    ),
]


def test_every_name_of_elsewhere_suggests_a_key_that_exists():
    paths = key_paths(Config)
    assert set(SYNONYMS) <= set(paths)
    assert not OURS.keys() & set(paths), "such a name is a key of ours"
    names = [name for line in SYNONYMS.values() for name in line.split()]
    assert len(names) == len(set(names)) == len(OURS)
    for name, key in OURS.items():
        asked = name if "." in name else f"{key.rpartition('.')[0]}.{name}"
        assert did_you_mean(asked, paths) == f"; did you mean '{key}'?", asked


@pytest.mark.parametrize(("override", "line"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_a_mistake_has_one_line_that_says_what_to_do(override, line):
    assert problems(override) == [line]


def test_a_group_of_one_expert_has_no_second_score():
    sets = ["model.n_group=16", "model.topk_group=4"]
    assert problems(*sets) == [
        "model.n_group: must be <= 8 or 1, a group is scored by its top 2 experts (got 16)"
    ]


@pytest.mark.parametrize(
    ("mode", "override", "default"),
    [
        ("parallel", "trunk_hidden=pre_norm", "'post_norm'"),
        ("parallel", "chain=trunk", "'hidden'"),
        ("parallel_linear", "embed=false", "true"),
        ("parallel_linear", "share_weights=true", "false"),
        ("none", "chain=trunk", "'hidden'"),
        ("none", "depth_weights=[2.0]", "null"),
        ("none", "curriculum=forward", "'none'"),
        ("none", "detach=all", "'none'"),
    ],
)
def test_a_setting_without_effect_is_an_error(mode, override, default):
    (line,) = problems(f"mtp.mode={mode}", f"mtp.{override}")
    key = override.partition("=")[0]
    assert line.startswith(
        f"mtp.{key}: has no effect with mode {mode}; remove it or set {default} (got "
    )


FROZEN = ("train.freeze=trunk", "train.init_from=hf/base", "mtp.detach=trunk")


def test_a_frozen_trunk_needs_weights_heads_and_a_detached_loss():
    assert load_config(TINY, FROZEN).train.freeze == "trunk"
    assert problems("train.freeze=trunk") == [
        "train.freeze: trunk needs mtp.detach: trunk or all (got none)",
        "train.freeze: trunk needs train.init_from: a trunk at random weights teaches nothing",
    ]
    assert problems("train.freeze=trunk", "train.init_from=hf/base", "mtp.mode=none") == [
        "train.freeze: trunk leaves nothing to train without MTP heads; set none, or mtp.mode"
    ]
    assert problems(*FROZEN, "mtp.mode=same_logits") == [
        "train.freeze: trunk leaves nothing to train: mode same_logits has no weights of its own; "
        "set none, or another mtp.mode"
    ]
    assert load_config(TINY, [*FROZEN, "mtp.mode=top", "mtp.loss_weight=0"]).mtp.mode == "top"
    assert problems("train.freeze=all") == ["train.freeze: must be one of none, trunk (got 'all')"]


def test_what_heads_need_of_the_trunk_and_of_the_rows_is_there():
    assert problems("mtp.mode=dspark", "mtp.target_layer_ids=[1, 4, 9]") == [
        "mtp.mode: its heads read the output of trunk layer 4, 9; "
        "model.num_hidden_layers = 4 gives 0..3"
    ]
    deep = ("mtp.num_nextn_predict_layers=3", "data.seq_len=3", "mtp.objective={tv: 1.0}")
    assert problems(*deep) == [
        "mtp.objective: tv compares depth 3 with the main head 3 slots later, and data.seq_len = 3 "
        "has no such slot"
    ]
    assert problems("mtp.mode=none", "mtp.objective={kl: 1.0}") == [
        "mtp.objective: has no effect with mode none; remove it or set "
        "{'ce': 1.0} (got {'kl': 1.0})"
    ]


def test_all_problems_come_at_once_even_between_sections_that_parsed():
    lines = problems(
        "mtp.num_nextn_predict_layer=1", "train.micro_batch_size=0", "data.seq_len=512", "oops"
    )
    assert lines == [
        "--set oops: must be KEY=VALUE, for example --set mtp.mode=parallel",
        "mtp.num_nextn_predict_layer: unknown key; did you mean 'mtp.num_nextn_predict_layers'?",
        "train.micro_batch_size: must be >= 1 (got 0)",
        "data.seq_len: must be <= model.max_position_embeddings = 256 (got 512)",
    ]


def test_missing_sections_and_keys_are_listed(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text(
        "data: {train: a, seq_len: 8}\ntrain: {total_tokens: "
        "64, batch_size: 8, micro_batch_size: 8}\n"
    )
    assert problems(path=path) == [
        "model: missing; it has no default",
        "data.val: missing; name prepared data here, or set data.task",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "run:\n  name: a: b\n",
            "line 2, column 10: invalid YAML: mapping values are not allowed here",
        ),
        ("run: &run {<<: *run}\n", "file: invalid YAML: an anchor contains itself"),
        ("- 1\n", "file: must hold a mapping of sections (got [1])"),
        ("", "file: must hold a mapping of sections (got null)"),
    ],
)
def test_text_that_is_no_configuration(tmp_path, text, line):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert problems(path=path) == [line]


def test_a_key_given_twice_is_reported_with_its_lines(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(TINY.read_text() + "log: {every: 1}\n")
    lines = path.read_text().splitlines()
    first, last = lines.index("log:") + 1, len(lines)
    assert problems(path=path) == [f"log: given twice, on lines {first} and {last}; keep one"]


def test_files_that_cannot_be_read(tmp_path):
    assert problems(path=tmp_path / "none.yaml") == [
        "file: cannot be read: No such file or directory"
    ]
    assert problems(path=tmp_path) == ["file: cannot be read: Is a directory"]


def test_overrides_are_yaml_values_applied_in_order():
    config = load_config(
        TINY, ["optim.lr=3e-4", "mtp.loss_weight=1e-1", "train.total_tokens=3e6", "run.name=a=b"]
    )
    assert (config.optim.lr, config.mtp.loss_weight.value, config.train.total_tokens) == (
        3e-4,
        0.1,
        3_000_000,
    )
    assert config.run.name == "a=b"
    assert load_config(TINY, ["run.seed=1", "run.seed=2"]).run.seed == 2
    mixture = load_config(TINY, ["data.build=null", "data.train=[{path: a, weight: 2}]"]).data.train
    assert [(entry.path, entry.weight) for entry in mixture] == [("a", 2.0)]


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    sets = ["run.dir=~/runs", "data.train=~/data", "data.val=~/data", "train.init_from=~/weights"]
    config = load_config(TINY, sets)
    paths = (config.run.dir, config.data.train, config.data.val, config.train.init_from)
    assert paths == ("/home/me/runs", "/home/me/data", "/home/me/data", "/home/me/weights")
    mixture = load_config(TINY, ["data.build=null", "data.train=[{path: ~/a, weight: 1}]"])
    assert mixture.data.entries[0].path == "/home/me/a"


def test_an_override_creates_sections_on_its_way():
    sets = ["model.rope_scaling.type=yarn", "model.rope_scaling.factor=40"]
    sets += [
        "model.rope_scaling.original_max_position_embeddings=64",
        "deepspeed.zero_optimization.overlap_comm=true",
    ]
    config = load_config(TINY, sets)
    assert config.model.rope_scaling.factor == 40
    assert config.deepspeed == {"zero_optimization": {"overlap_comm": True}}


def test_an_override_of_one_alias_leaves_the_others_as_they_are(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &one {size: {x: 1}}\nb: *one\n")
    tree, problems = read_tree(tmp_path / "x.yaml", ["b.size.x=2", "b.y=3"])
    assert (tree, problems) == ({"a": {"size": {"x": 1}}, "b": {"size": {"x": 2}, "y": 3}}, [])


def test_mode_none_turns_the_file_into_its_baseline():
    config = load_config(TINY, ["mtp.mode=none"])
    assert (config.mtp.depths, config.mtp.num_nextn_predict_layers) == (0, 1)
    assert load_config(TINY).mtp.depths == 1


@pytest.mark.parametrize(
    "sets",
    [
        [],
        ["mtp.loss_weight=0.1"],
        ["mtp.loss_weight={type: piecewise, points: [[0, 0], [0.5, 0.3]]}", "optim.lr=1e-6"],
        [
            "data.build=null",
            "data.train=[{path: a, weight: 1}, {path: b, weight: 0.5}]",
            "log.wandb.project=x",
        ],
        ["deepspeed={zero_optimization: {reduce_bucket_size: 5e8}}", "run.name='1e5'"],
        [
            "data.train=null",
            "data.val=null",
            "data.build=null",
            "data.task={type: markov, sharpness: 0}",
        ],
    ],
)
def test_to_yaml_reads_back_equal(tmp_path, sets):
    config = load_config(TINY, sets)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert Config.model_validate(config.to_dict()) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_whole_and_its_first_line_names_it(path):
    config = load_config(path)
    assert config.run.name == path.stem
    assert str(path.relative_to(ROOT)) in path.read_text().splitlines()[0]
    assert set(config.to_dict()) == set(Config.model_fields)


@pytest.mark.parametrize("name", ["v3_tiny", "v3_small", "v3_671b"])
def test_recipe_is_v3s_as_fractions_of_the_run(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    schedule, weight, total = config.optim.schedule, config.mtp.loss_weight, 14.8
    assert isinstance(weight, StepWeight) and weight.values == (0.3, 0.1)
    assert weight.at[0] == schedule.decay_start == pytest.approx(10 / total, abs=5e-5)
    assert (
        schedule.decay_end
        == config.train.bias_update_until
        == pytest.approx(14.3 / total, abs=5e-5)
    )
    assert schedule.final_start == pytest.approx(14.633 / total, abs=5e-5)
    assert (schedule.decay_ratio, schedule.final_ratio) == (
        0.1,
        pytest.approx(7.3e-6 / 2.2e-4, abs=5e-5),
    )
    assert (config.optim.betas, config.optim.weight_decay, config.optim.grad_clip) == (
        (0.9, 0.95),
        0.1,
        1.0,
    )
    assert (config.train.bias_update_speed, config.train.balance_loss_weight) == (0.001, 0.0001)
    # v3_tiny scales it with its width
    assert config.model.initializer_range == {"v3_tiny": 0.04}.get(name, 0.006)


def test_a_model_built_by_hand_is_checked_the_same():
    values = load_config(TINY).to_dict()["model"]
    assert ModelConfig(**values) == load_config(TINY).model
    with pytest.raises(ValueError, match=r"topk_group: must be <= model.n_group = 4 \(got 5\)"):
        ModelConfig(**values | {"topk_group": 5})


TASK = ROOT / "configs" / "task_tiny.yaml"
STAR = "data.task={type: star, degree: 2, path_length: 3, nodes: 10}"


@pytest.mark.parametrize(
    ("sets", "line"),
    [
        (
            ["data.task=null", "data.val=a"],
            "data.train: missing; name prepared data here, or set data.task",
        ),
        (["data.train=a"], "data.train: must be null: data.task generates the data (got 'a')"),
        (
            ["data.build=pystdlib"],
            "data.build: must be null: data.task generates the data (got 'pystdlib')",
        ),
        (
            ["data.task.type=sufix_sum"],
            "data.task: type must be one of induction, "
            "markov, polynomial, star, suffix_sum (got 'sufix_sum'); "
            "did you mean 'suffix_sum'?",
        ),
        (
            ["data.task.nodes=9"],
            "data.task.nodes: unknown key of type suffix_sum (loss_on, terms, modulus); nodes is a "
            "key of star: write data.task={type: star, loss_on: answer, nodes: 9}",
        ),
        (["data.task.terms=1"], "data.task.terms: must be >= 2 (got 1)"),
        (
            [STAR],
            (
                "data.seq_len: must be >= 17: an example of star "
                "has 18 tokens, the last is only a target (got 8)"
            ),
        ),
        (
            [STAR.replace("10", "4"), "data.seq_len=17"],
            "data.task.nodes: must be >= 5, the nodes of a graph with 2 paths (got 4)",
        ),
        (
            ["data.seq_len=20"],
            "data.mask_documents: must be true: seq_len = 20 "
            "packs several examples, and none may see another; "
            f"or set data.seq_len to 8 for one (got false), in {TINY}",
        ),
        (
            ["model.vocab_size=4"],
            "model.vocab_size: must be >= 5, the tokens of data.task.type suffix_sum (got 4)",
        ),
        (
            ["model.max_position_embeddings=8"],
            (
                "model.max_position_embeddings: must be >= 9, "
                "the length of an example of data.task (got 8)"
            ),
        ),
        (
            ["data.task={type: induction, mentions: 3, names: 3}", "data.seq_len=47"],
            "data.task.mentions: must be > data.task.names = 3, or no name need come back (got 3)",
        ),
    ],
)
def test_a_task_that_does_not_fit_is_refused_with_the_remedy(sets, line):
    assert line in problems(*sets, path=TASK)


def test_a_task_needs_the_whole_model_on_every_rank():
    needs = (
        "needs parallel.zero_stage <= 2; expert_parallel_size, "
        "pipeline_stages and sequence_parallel_size 1"
    )
    refusal = f"data.task: {needs}: every rank generates by itself"
    assert problems("parallel.zero_stage=3", path=TASK) == [refusal]
    for key in ("expert_parallel_size", "sequence_parallel_size"):
        assert refusal in problems(f"parallel.{key}=2", path=TASK)
    assert load_config(TASK, ["parallel.zero_stage=2"]).data.task.terms == 4


@pytest.mark.parametrize(
    ("task", "vocab_size", "length"),
    [
        ("{type: markov, states: 7}", 7, 2),
        ("{type: star, degree: 5, path_length: 5, nodes: 50}", 54, 68),
        ("{type: induction}", 33, 48),
        ("{type: suffix_sum}", 5, 9),
        ("{type: polynomial}", 13, 41),
    ],
)
def test_every_task_says_what_it_needs(task, vocab_size, length):
    config = load_config(
        TASK, [f"data.task={task}", "data.seq_len=67"] + ["data.mask_documents=true"]
    )
    assert (config.data.task.vocab_size, config.data.task.example_length) == (vocab_size, length)
    assert config.data.entries == ()


def test_sections_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config(TINY).train.batch_size = 3


def test_importing_the_configuration_does_not_import_torch():
    code = (
        "import sys, dsv3_mtp.config, dsv3_mtp.config.schedules; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
