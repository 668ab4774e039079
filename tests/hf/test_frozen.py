"""A frozen trunk that is stored in block-FP8 stays so, and computes what the dequantised one does,
bit for bit: losses, validation, and what the heads learn.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.meter import measure_step
from dsv3_mtp.decode.generate import Settings, generate
from dsv3_mtp.files.fragments import Fragments
from dsv3_mtp.files.run_folder import newest_checkpoint
from dsv3_mtp.hf import export_hf, import_hf
from dsv3_mtp.hf.files import DIGESTS, INDEX
from dsv3_mtp.hf.frozen import stays_fp8
from dsv3_mtp.hf.load import load_weights
from dsv3_mtp.model.causal_lm import DeepseekV3MTP, meta_model
from dsv3_mtp.ops.compute import Compute, building
from dsv3_mtp.parallel.build import build_model
from dsv3_mtp.parallel.launch import World
from dsv3_mtp.plan import memory
from dsv3_mtp.plan.dryrun import dry_run
from dsv3_mtp.precision.stored import SCALE, is_codes, stored
from dsv3_mtp.report.metrics import read_metrics
from dsv3_mtp.runs.model import load_model
from dsv3_mtp.train import trainer
from dsv3_mtp.train.process import own_process
from tests.conftest import contents, tiny
from tests.made_runs import randomise, read_newest, write_run
from tests.ranks import chosen, folder_of, rows, run_ranks, timeless, train_until, write_markov
from tests.ranks import trained as run_to_its_end

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
    "FP8 products": (1, {"zero_stage": 1}),
    "float32": (1, {"zero_stage": 1}),
    "ZeRO-3": (2, {"zero_stage": 3}),
}
QUICK = {"one process", "EP=2"}  # ZeRO-3: tests/hf/test_posthoc.py
MORE = {
    "FP8 products": {"fp8.enabled": True, "fp8.backend": "emulate"},
    "float32": {"train.dtype": "float32"},
}
WIDE = {"FP8 products": "pow2-bf16", "float32": "fp8-fp32"}


def folders(root: Path) -> dict[str, Path]:
    """A trunk in FP8, with scales as DeepSeek's that are no powers of two, and in bfloat16 and
    float32 as importing dequantises it; and one whose scales are powers of two, which FP8 products
    would quantise to the same codes again.
    """
    config = tiny(SIZES | {"run.dir": str(root / "runs"), "mtp.mode": "none"})
    run = write_run(root / "trunk", config, randomise(DeepseekV3MTP(config.model, config.mtp)))
    export_hf(run, root / "fp8", dtype="fp8")
    shutil.copytree(root / "fp8", root / "pow2-fp8")
    (file,) = (root / "fp8").glob("*.safetensors")
    tensors = load_file(file)
    for name, value in tensors.items():
        if name.endswith(SCALE):
            value *= 0.75 + 0.5 * torch.rand_like(value)
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((root / "fp8" / INDEX).read_text())
    del index["metadata"][DIGESTS]
    (root / "fp8" / INDEX).write_text(json.dumps(index))
    found = {"fp8": root / "fp8", "pow2": root / "pow2-fp8"}
    for name, dtype in (("fp8", "bf16"), ("fp8", "fp32"), ("pow2", "bf16")):
        out = root / f"{name}-{dtype}"
        import_hf(found[name], out, data="none", dtype=dtype)
        found[f"{name}-{dtype}"] = out / "weights"
    return found


def make_config(
    root: Path, name: str, source: Path, data: str, parallel: dict, layout: str = "one process"
):
    settings = SIZES | {
        "run.name": name,
        "run.dir": str(root / "runs"),
        "data.train": data,
        "data.val": data,
        "train.dtype": "bfloat16",
        "train.init_from": str(source),
        "train.freeze": "trunk",
        "train.total_tokens": 4 * 8 * 16,
        "train.batch_size": 8,
        "train.micro_batch_size": 2,
        "mtp.detach": "all",
        "optim.schedule": {"warmup": 0.0},
        "optim.lr": 0.01,
        "checkpoint.every": 2,
        "eval.every": 2,
        "train.ema_decay": 0.5,
    }
    settings |= {f"parallel.{key}": value for key, value in parallel.items()}
    if parallel["zero_stage"] == 3:  # the tiny model's parameters would all stay whole
        settings["deepspeed.zero_optimization"] = {"stage3_param_persistence_threshold": 0}
    return tiny(settings | MORE.get(layout, {}))


def train(configs: list) -> None:
    for config in configs:
        run = own_process(config, command=["test"])
        codes = [name for name, p in run.model.named_parameters() if is_codes(p)]
        assert bool(codes) == config.train.init_from.endswith("fp8")
        assert all(name.startswith("model.layers.") for name in codes)
        run.run()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, request):
    """(root, {layout: {"fp8": config, "wide": config}}), all of them trained."""
    root = tmp_path_factory.mktemp("frozen")
    data = write_markov(root / "markov", tokens=3000, documents=40)
    sources, runs = folders(root), {}
    for layout in chosen(request, "layout"):
        _, parallel = LAYOUTS[layout]
        runs[layout] = {
            form: make_config(
                root, f"{layout}-{form}".replace(" ", "-"), source, data, parallel, layout
            )
            for form, source in (
                ("fp8", sources["pow2" if layout == "FP8 products" else "fp8"]),
                ("wide", sources[WIDE.get(layout, "fp8-bf16")]),
            )
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
    narrow, wide = runs[layout]["fp8"], runs[layout]["wide"]
    lines = [timeless(read_metrics(folder_of(c) / "metrics.jsonl")) for c in (narrow, wide)]
    assert len(lines[0]) == 4 + 2 and lines[0] == lines[1]
    log = (root / f"{LAYOUTS[layout][0]}.log.rank0").read_text()
    assert "frozen trunk: held in FP8, as it is stored" in log

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
    assert bits["wide"] - bits["fp8"] == pytest.approx(values - scales, rel=0.01)
    for form, run in forms.items():
        export_hf(run, tmp_path / form)
        export_hf(run, tmp_path / f"{form}-anew", dtype="bf16")
    source = contents(trained[0] / "fp8")
    spliced = contents(tmp_path / "fp8")
    assert all(spliced[name] == source[name] for name in source if name.endswith(".safetensors"))
    anew = [contents(tmp_path / f"{form}-anew") for form in ("fp8", "wide")]
    weights = [{name: files[name] for name in files if "safetensors" in name} for files in anew]
    assert len(weights[0]) > 1 and weights[0] == weights[1]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("sources"))


def frozen_run(root: Path, source: Path, **changes):
    data = write_markov(root / "markov", tokens=3000, documents=40)
    config = make_config(root, "run", source, data, {"zero_stage": 1})
    for key, value in changes.items():
        config = config.replace(key.replace("__", "."), value)
    return config


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_in_codes_computes_and_decodes_as_the_one_that_is_loaded(sources, tmp_path, dtype):
    config = frozen_run(tmp_path, sources["fp8"], train__dtype=dtype)
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    models = []
    for compute in (stored(Compute()), Compute()):
        model = build_model(config, {}, world, compute)
        for parameter in model.mtp.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype))
        load_weights(model, sources["fp8"])
        models.append(model.eval())
    narrow, wide = models
    assert sum(is_codes(p) for p in narrow.parameters()) == 3 * 5 + 3 + 2 * (3 + 2)
    for (name, ours), theirs in zip(
        narrow.mtp.named_parameters(), wide.mtp.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name  # the random start of the heads is the same
    tokens = torch.randint(0, 64, (2, 12))
    with torch.no_grad():
        assert torch.equal(narrow.logits(tokens), wide.logits(tokens))
    settings = Settings(max_new_tokens=8, draft_depth=1)
    texts = [generate(model, [[1, 2, 3], [4, 5, 6, 7]], settings) for model in models]
    assert texts[0].tokens == texts[1].tokens
    assert texts[0].acceptance == texts[1].acceptance


def test_a_folder_that_is_not_wholly_in_blocks_of_128_is_held_in_bfloat16_and_says_so(
    sources, tmp_path
):
    config = frozen_run(tmp_path, sources["fp8"])
    assert stays_fp8(config)[0]
    assert stays_fp8(config.replace("train.freeze", "none")) == (False, [])
    assert stays_fp8(frozen_run(tmp_path, sources["fp8-bf16"])) == (False, [])
    shutil.copytree(sources["fp8"], tmp_path / "mixed")
    (file,) = (tmp_path / "mixed").glob("*.safetensors")
    tensors, name = load_file(file), "model.layers.0.self_attn.q_a_proj.weight"
    del tensors[name + SCALE]
    tensors[name] = tensors[name].to(torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((tmp_path / "mixed" / INDEX).read_text())
    del index["weight_map"][name + SCALE]
    (tmp_path / "mixed" / INDEX).write_text(json.dumps(index))
    kept, (note,) = stays_fp8(frozen_run(tmp_path, tmp_path / "mixed"))
    assert not kept
    where = f"of the 72 projections of {tmp_path}/mixed are FP8"
    assert note == f"frozen trunk: held in bfloat16, because only 71 {where}"


@pytest.mark.parametrize("what", ["code", "scale", "overflow"])
def test_codes_of_no_number_are_refused(sources, tmp_path, what):
    shutil.copytree(sources["fp8"], tmp_path / "bad")
    (file,) = (tmp_path / "bad").glob("*.safetensors")
    tensors, name = load_file(file), "model.layers.2.mlp.experts.3.up_proj.weight"
    if what == "code":
        tensors[name].view(torch.uint8)[7, 5] = 255
    else:
        tensors[name + SCALE][0, 1] = float("nan") if what == "scale" else 3e38
    save_file(tensors, file, metadata={"format": "pt"})
    config = frozen_run(tmp_path, tmp_path / "bad")
    with building(stored(Compute())):
        model = meta_model(config.model, config.mtp, freeze="trunk").to_empty(device="cpu")
    with pytest.raises(ValueError, match=re.escape(f"{name}: holds nan or infinity")):
        load_weights(model, tmp_path / "bad")


@pytest.mark.slow
@pytest.mark.parametrize("before", ["fp8", "an older version"])
def test_a_run_goes_on_bit_for_bit_in_the_form_that_its_checkpoint_has(
    sources, tmp_path, monkeypatch, before
):
    whole = frozen_run(tmp_path, sources["fp8"], run__name="whole")
    parts = whole.replace("run.name", "parts")
    expected = timeless(run_to_its_end(whole))
    with monkeypatch.context() as patch:
        if before != "fp8":
            patch.setattr(trainer, "stays_fp8", lambda config, checkpoint: (False, []))
        run_to_its_end(parts, train_until, 3)
    assert timeless(run_to_its_end(parts)) == expected
    found, wanted = (read_newest(folder_of(config)) for config in (parts, whole))
    if before == "fp8":
        assert found.keys() == wanted.keys()
        assert all(
            torch.equal(value.view(torch.uint8), wanted[name].view(torch.uint8))
            for name, value in found.items()
        )
    assert any(name.endswith(SCALE) for name in found) == (before == "fp8")
    one, other = (load_model(folder_of(config)).model.state_dict() for config in (parts, whole))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_plan_counts_codes_and_scales(sources, tmp_path):
    config = frozen_run(tmp_path, sources["fp8"])
    model = meta_model(config.model, config.mtp, freeze="trunk")
    with building(stored(Compute())):
        coded = meta_model(config.model, config.mtp, freeze="trunk")
    codes = sum(p.numel() for p in coded.parameters() if is_codes(p))
    scales = sum(b.numel() for name, b in coded.named_buffers() if name.endswith(SCALE))
    ((wide,), (narrow,)) = (
        memory.plan(config, one, memory.layout(config, 1)) for one in (model, coded)
    )
    assert wide.weights - narrow.weights == codes - 4 * scales
    assert (wide.gradients, wide.states) == (narrow.gradients, narrow.states)
    there, held, absent = (
        dry_run(frozen_run(tmp_path, source), world_size=1, plot=False)
        for source in (sources["fp8"], sources["fp8-bf16"], tmp_path / "absent")
    )
    assert "held in FP8, as it is stored" in there
    line = f"\ntrain.init_from: {tmp_path}/absent is not there: its trunk is counted in bfloat16"
    assert line in absent and absent.replace(line, "") == held


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8", "fp8-bf16"])
@pytest.mark.parametrize("experts", [1, 2])
def test_a_rank_holds_what_is_planned(sources, tmp_path, form, experts):
    config = frozen_run(tmp_path, sources[form])
    config = config.replace("parallel.expert_parallel_size", experts)
    out = tmp_path / "held"
    codes = run_ranks(write_held, config, out, world_size=2, log=tmp_path / "log")
    assert codes == [0, 0], (tmp_path / "log.rank0").read_text()
    with building(stored(Compute()) if form == "fp8" else Compute()):
        model = meta_model(config.model, config.mtp, freeze="trunk")
    (stage,) = memory.plan(config, model, memory.layout(config, 2))
    planned = stage.weights + stage.gradients + stage.states + stage.host
    for rank in range(2):
        assert float(out.with_suffix(f".{rank}").read_text()) == pytest.approx(planned, rel=0.03)


def write_held(config, out: Path) -> None:
    held, _ = measure_step(config)
    out.with_suffix(f".{os.environ['RANK']}").write_text(str(held))
