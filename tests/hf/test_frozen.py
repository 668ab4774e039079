"""A frozen trunk that is stored in block-FP8 stays so, and computes what the dequantised one does,
bit for bit: losses, validation, and what the heads learn.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_mtp.files.fragments import Fragments
from dsv3_mtp.files.run_folder import newest_checkpoint
from dsv3_mtp.hf import export_hf, import_hf
from dsv3_mtp.hf.files import DIGESTS, INDEX
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from dsv3_mtp.precision.stored import SCALE, is_codes
from dsv3_mtp.report.metrics import read_metrics
from dsv3_mtp.runs.model import load_model
from dsv3_mtp.train.process import own_process
from tests.conftest import contents, tiny
from tests.made_runs import randomise, read_newest, write_run
from tests.ranks import chosen, folder_of, rows, run_ranks, timeless, write_markov

pytestmark = pytest.mark.dist

# Several blocks of most matrices, none of them whole at the edges; of gate and up each its own.
SIZES = {
    "model.hidden_size": 160,
    "model.intermediate_size": 200,
    "model.moe_intermediate_size": 136,
}
# Layouts: ranks, parallel section. ZeRO-3 last: it replaces F.linear for good.
LAYOUTS: dict[str, tuple[int, dict]] = {
    "one process": (1, {"zero_stage": 1}),
    "ZeRO-0": (2, {"zero_stage": 0}),
    "ZeRO-1": (2, {"zero_stage": 1}),
    "ZeRO-2": (2, {"zero_stage": 2}),
    "EP=2": (2, {"zero_stage": 1, "expert_parallel_size": 2}),
    "SP=2": (2, {"zero_stage": 1, "sequence_parallel_size": 2}),
    "ZeRO-3": (2, {"zero_stage": 3}),
}
QUICK = {"one process", "EP=2", "ZeRO-3"}


def folders(root: Path) -> dict[str, Path]:
    """The same trunk in FP8, with scales as DeepSeek's that are no powers of two, and in bfloat16
    as importing dequantises it.
    """
    config = tiny(SIZES | {"run.dir": str(root / "runs"), "mtp.mode": "none"})
    run = write_run(root / "trunk", config, randomise(DeepseekV3MTP(config.model, config.mtp)))
    export_hf(run, root / "fp8", dtype="fp8")
    (file,) = (root / "fp8").glob("*.safetensors")
    tensors = load_file(file)
    for name, value in tensors.items():
        if name.endswith(SCALE):
            value *= 0.75 + 0.5 * torch.rand_like(value)
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((root / "fp8" / INDEX).read_text())
    del index["metadata"][DIGESTS]
    (root / "fp8" / INDEX).write_text(json.dumps(index))
    import_hf(root / "fp8", root / "imported", sets=["train.batch_size=4"], data="none")
    return {"fp8": root / "fp8", "bf16": root / "imported/weights"}


def make_config(root: Path, name: str, source: Path, data: str, parallel: dict, **more):
    settings = SIZES | {
        "run.name": name,
        "run.dir": str(root / "runs"),
        "data.train": data,
        "data.val": data,
        "train.dtype": "bfloat16",
        "train.init_from": str(source),
        "train.freeze": "trunk",
        "train.total_tokens": 6 * 8 * 16,
        "train.batch_size": 8,
        "train.micro_batch_size": 2,
        "mtp.detach": "all",
        "optim.schedule": {"warmup": 0.0},
        "optim.lr": 0.01,
        "checkpoint.every": 3,
        "eval.every": 3,
        "train.ema_decay": 0.5,
    }
    settings |= {f"parallel.{key}": value for key, value in parallel.items()}
    if parallel["zero_stage"] == 3:  # the tiny model's parameters would all stay whole
        settings["deepspeed.zero_optimization"] = {"stage3_param_persistence_threshold": 0}
    return tiny(settings | more)


def train(configs: list) -> None:
    for config in configs:
        trainer = own_process(config, command=["test"])
        codes = [name for name, p in trainer.model.named_parameters() if is_codes(p)]
        assert bool(codes) == config.train.init_from.endswith("fp8")
        assert all(name.startswith("model.layers.") for name in codes)
        trainer.run()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, request):
    """(root, {layout: {"fp8": config, "bf16": config}}), all of them trained."""
    root = tmp_path_factory.mktemp("frozen")
    data = write_markov(root / "markov", tokens=3000, documents=40)
    sources, runs = folders(root), {}
    for layout in chosen(request, "layout"):
        _, parallel = LAYOUTS[layout]
        runs[layout] = {
            form: make_config(root, f"{layout} {form}".replace(" ", "-"), source, data, parallel)
            for form, source in sources.items()
        }
    for ranks in (1, 2):
        configs = [
            config
            for layout, forms in runs.items()
            if LAYOUTS[layout][0] == ranks
            for config in forms.values()
        ]
        log = root / f"{ranks}.log"
        codes = run_ranks(train, configs, world_size=ranks, log=log, timeout=280)
        assert codes == [0] * ranks, (root / f"{ranks}.log.rank0").read_text()
    return root, runs


@pytest.mark.parametrize("layout", rows(LAYOUTS, QUICK))
def test_losses_and_heads_are_those_of_the_dequantised_trunk_bit_for_bit(trained, layout):
    root, runs = trained
    narrow, wide = runs[layout]["fp8"], runs[layout]["bf16"]
    lines = [timeless(read_metrics(folder_of(c) / "metrics.jsonl")) for c in (narrow, wide)]
    assert len(lines[0]) == 6 + 2 and lines[0] == lines[1]
    log = (root / f"{LAYOUTS[layout][0]}.log.rank0").read_text()
    assert "frozen trunk: held in FP8, as it is stored, and computed with in bfloat16" in log

    mine, theirs = read_newest(folder_of(narrow)), read_newest(folder_of(wide))
    codes = {name.removesuffix(SCALE) for name in mine if name.endswith(SCALE)}
    assert mine.keys() - theirs.keys() == {name + SCALE for name in codes} and len(codes) > 15
    assert all(mine[name].dtype == torch.float8_e4m3fn for name in codes)
    assert all(
        torch.equal(mine[name], value) for name, value in theirs.items() if name not in codes
    )
    for ema in (False, True):
        one, other = (load_model(folder_of(config), ema=ema).model for config in (narrow, wide))
        for name, value in other.state_dict().items():
            assert torch.equal(one.state_dict()[name], value), name


def test_the_checkpoint_is_smaller_and_the_export_the_same(trained, tmp_path):
    if "one process" not in (runs := trained[1]):
        pytest.skip("not trained")
    forms = {form: folder_of(config) for form, config in runs["one process"].items()}
    newest = {form: newest_checkpoint(run / "checkpoints") for form, run in forms.items()}
    bits = {
        form: sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        for form, folder in newest.items()
    }
    shapes = Fragments(newest["fp8"]).shapes
    values = sum(shape.numel() for name, shape in shapes.items() if name + SCALE in shapes)
    scales = sum(4 * shape.numel() for name, shape in shapes.items() if name.endswith(SCALE))
    assert bits["bf16"] - bits["fp8"] == pytest.approx(values - scales, rel=0.01)
    for form, run in forms.items():
        export_hf(run, tmp_path / form)
        export_hf(run, tmp_path / f"{form}-anew", dtype="bf16")
    source = contents(trained[0] / "fp8")
    spliced = contents(tmp_path / "fp8")
    assert all(spliced[name] == source[name] for name in source if name.endswith(".safetensors"))
    anew = [contents(tmp_path / f"{form}-anew") for form in ("fp8", "bf16")]
    assert anew[0] == anew[1]
