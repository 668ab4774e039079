"""An MTP module for a model that exists already, from its folder to a folder that engines serve:
the journey of docs/posthoc.md with a tiny model; and what a frozen trunk costs.
"""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from dsv3_mtp.config import load_config, schedules
from dsv3_mtp.config.run import Config
from dsv3_mtp.data.prepare import Arguments, prepare
from dsv3_mtp.hf import export_hf, import_hf, load_hf
from dsv3_mtp.hf.files import INDEX
from dsv3_mtp.hf.splice import SHARD
from dsv3_mtp.model.causal_lm import DeepseekV3MTP, meta_model
from dsv3_mtp.model.size import require_memory
from dsv3_mtp.ops.compute import Compute, building
from dsv3_mtp.parallel.build import build_model
from dsv3_mtp.parallel.launch import World
from dsv3_mtp.plan.memory import layout, plan
from dsv3_mtp.report.metrics import read_metrics
from dsv3_mtp.runs.model import load_model
from dsv3_mtp.train.answers import AnswerArguments, write_answers
from dsv3_mtp.train.optim import build_optimizer
from tests.conftest import contents
from tests.ranks import run_ranks, run_tool, train_to_end

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    "train.total_tokens=384",
    "train.batch_size=8",
    "train.micro_batch_size=4",
    "train.threads=1",
    "data.seq_len=16",
    "data.build=null",
    "eval.batches=1",
    "log.tensorboard=false",
    "optim.lr=0.003",
]


@pytest.fixture
def questions(tmp_path):
    """Prepared questions and answers, of 260 tokens."""
    lines = [{"prompt": f"{n}+{n}=", "completion": f" {2 * n}"} for n in range(80)]
    source = tmp_path / "sums.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = Arguments(inputs=(str(source),), vocab_size=260, mask="prompts")
    prepare(tmp_path / "sums", arguments)
    return tmp_path / "sums"


@pytest.fixture
def trunk(make_run, tmp_path, questions):
    """A function from a dtype to the folder of a model without MTP, in several files, with a
    tokenizer and a file of its maker's own.
    """

    def make(dtype="bf16", **overrides):
        sizes = {"model__vocab_size": 260, "model__max_position_embeddings": 32}
        run, _ = make_run("base", mtp__mode="none", **sizes, **overrides)
        export_hf(run, tmp_path / "trunk", dtype=dtype, shard_bytes=60_000)
        (tmp_path / "trunk/LICENSE").write_text("theirs")
        for name in ("tokenizer.json",):
            (tmp_path / "trunk" / name).write_bytes((questions / name).read_bytes())
        path = tmp_path / "trunk/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"made_by": "someone"}))
        return tmp_path / "trunk"

    return make


def train(run, tmp_path, world_size=1):
    config, log = load_config(run / "config.yaml"), tmp_path / f"{run.name}.log"
    codes = run_ranks(train_to_end, config, world_size=world_size, log=log)
    text = Path(f"{log}.rank0").read_text()
    assert codes == [0] * world_size, text
    return text


@pytest.mark.dist
@pytest.mark.parametrize(
    ("dtype", "world_size", "layout_of_ranks"),
    [("bf16", 1, []), ("fp8", 2, ["parallel.zero_stage=3"])],
)
def test_the_whole_journey(tmp_path, trunk, questions, dtype, world_size, layout_of_ranks):
    source = trunk(dtype)
    run = tmp_path / "runs" / "posthoc"
    recipe = ROOT / "configs/posthoc_tiny.yaml"
    sets = [*SHORT, *layout_of_ranks, "data.mask=prompts"]
    notes = import_hf(source, run, base=recipe, sets=sets, data=str(questions), frozen=True)
    assert any("not used: made_by" in note for note in notes)
    log = train(run, tmp_path, world_size)
    assert f"weights from {source}" in log and "at their start: MTP module(s) 1..1" in log
    assert "no n-gram floors: they are of whole texts" in log

    notes = export_hf(run, tmp_path / "hf")
    assert notes[0].endswith(f"stored as the trunk is: {dtype}")
    before, after = contents(source), contents(tmp_path / "hf")
    edited = {INDEX, "config.json"}
    assert after.keys() - before.keys() == {SHARD, "README_MTP.md"}
    assert notes[-1] == "README.md is the trunk's own and was kept; the card is README_MTP.md"
    card = after["README_MTP.md"].decode()
    assert "the MTP modules: " in card and "overlap of depth 1 | 0." in card
    assert {name for name in before if before[name] != after[name]} == edited
    old, new = (json.loads(files["config.json"]) for files in (before, after))
    assert new == old | {"num_nextn_predict_layers": 1} and old["num_nextn_predict_layers"] == 0
    old, new = (json.loads(files[INDEX]) for files in (before, after))
    assert old["weight_map"].items() < new["weight_map"].items()
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"] + sum(
        size for size in tensor_sizes(tmp_path / "hf" / SHARD)
    )
    mine, _ = load_hf(tmp_path / "hf")
    theirs, _ = load_hf(source)
    assert mine.depths == 1
    for name, value in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[name], value), name
    fresh = DeepseekV3MTP(mine.config, mine.mtp_config)
    fresh.init_weights(load_config(run / "config.yaml").run.seed)
    moved = mine.mtp.layers[0].eh_proj.weight.float() - fresh.mtp.layers[0].eh_proj.weight
    assert moved.abs().max() > 1e-3  # it has learned
    if dtype == "bf16" and world_size == 1:
        transformers_reads_the_same_trunk(source, tmp_path / "hf")


@pytest.mark.dist
def test_losses_of_answers_are_those_of_one_process_in_every_layout(tmp_path, trunk, questions):
    source, first = trunk("fp32"), {}
    layouts = {
        "one": [],
        "zero2": ["parallel.zero_stage=2"],
        "experts": ["parallel.expert_parallel_size=2"],
        "slots": ["parallel.sequence_parallel_size=2"],
    }
    for name, sets in layouts.items():
        run = tmp_path / "runs" / name
        sets = [*SHORT, "train.total_tokens=128", *sets, "data.mask=prompts"]  # one step
        sets += ["mtp.num_nextn_predict_layers=2"]
        recipe = ROOT / "configs/posthoc_tiny.yaml"
        import_hf(source, run, base=recipe, sets=sets, data=str(questions), frozen=True)
        train(run, tmp_path, 1 if name == "one" else 2)
        lines = read_metrics(run / "metrics.jsonl")
        keys = ("train/main_loss", "train/mtp_loss/1", "train/mtp_loss/2")
        assert all(key in lines[0] for key in keys)
        found = [lines[0][key] for key in keys] + [lines[-1]["val/main_loss"]]
        assert found == pytest.approx(first.setdefault("one", found), rel=2e-6), name


def tensor_sizes(path):
    import safetensors

    with safetensors.safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            yield tensor.numel() * tensor.itemsize


def transformers_reads_the_same_trunk(before, after):
    transformers = pytest.importorskip("transformers")
    tokens = torch.randint(0, 260, (2, 12))
    logits = []
    for folder in (before, after):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        layer = model.config.num_hidden_layers
        assert model.config.num_nextn_predict_layers == (0 if folder == before else 1)
        assert not any(f"layers.{layer}." in name for name in model.state_dict())
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert torch.equal(*logits)


@pytest.mark.dist
def test_heads_learn_from_what_the_trunk_writes_itself(tmp_path, trunk):
    """FastMTP's preset, from the trunk's own answers to an export of its one module."""
    run = tmp_path / "runs" / "own"
    recipe = ROOT / "configs/heads/fastmtp.yaml"
    sets = [*SHORT, "data.mask=prompts"]
    import_hf(trunk(), run, base=recipe, sets=sets, data=str(tmp_path / "own"), frozen=True)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{n}+{n}=\n" for n in range(24)))
    settings = {"max_new_tokens": 12, "batch": 12, "val_fraction": 0.3}
    write_answers(tmp_path / "own", AnswerArguments(run=str(run), prompts=str(prompts), **settings))
    train(run, tmp_path)
    notes = export_hf(run, tmp_path / "hf")
    assert any(
        "one MTP module is written: this run recycles it for its 3 depths" in n for n in notes
    )
    assert load_hf(tmp_path / "hf")[0].depths == 1


def test_fastmtps_weights_are_those_of_its_formula():
    mtp = load_config(ROOT / "configs/heads/fastmtp.yaml").mtp
    powers = [0.6**k for k in range(3)]
    weights = schedules.depth_loss_weights(mtp, 0.5)  # lambda w_k / D, lambda 1
    assert weights == pytest.approx([power / sum(powers) for power in powers], rel=1e-14)
    assert [round(w, 2) for w in weights] == [0.51, 0.31, 0.18] and mtp.share_weights


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_trunk_that_is_another_by_now_is_not_spliced(tmp_path, trunk, make_run, dtype):
    from safetensors.torch import load_file, save_file

    source = trunk(dtype)
    run, model = make_run(
        "head",
        **{"model__vocab_size": 260, "model__max_position_embeddings": 32},
        train__freeze="trunk",
        train__init_from=str(source),
        mtp__detach="all",
    )
    with torch.no_grad():  # the trunk as it is stored
        for name, value in load_hf(source)[0].state_dict().items():
            model.state_dict()[name].copy_(value)
    from tests.made_runs import write_checkpoint

    write_checkpoint(run, model, step=9)
    export_hf(run, tmp_path / "good")
    file = sorted(source.glob("*.safetensors"))[0]
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][3, 3] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors are not those .* model.embed_tokens.weight"):
        export_hf(run, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    export_hf(run, tmp_path / "anew", dtype="fp32")  # the remedy that it names
    with pytest.raises(ValueError, match="holds MTP modules already"):
        export_hf(changed(run, str(tmp_path / "good")), tmp_path / "twice")


def changed(run, init_from):
    config = load_config(run / "config.yaml").to_dict()
    config["train"]["init_from"] = init_from
    (run / "config.yaml").write_text(Config.model_validate(config).to_yaml())
    return run


@pytest.mark.parametrize("freeze", ["trunk", "none"])
def test_a_frozen_trunk_is_made_in_the_type_it_computes_in(make_tiny_config, monkeypatch, freeze):
    """And not in float32 first, which would need twice the memory when a run starts."""
    frozen = freeze == "trunk"
    settings = {"train.dtype": "bfloat16", "train.freeze": freeze, "train.init_from": "x"}
    config = make_tiny_config(settings | ({"mtp.detach": "all"} if frozen else {}))
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    model = build_model(config, {}, world, Compute())
    wide = DeepseekV3MTP(config.model, config.mtp)
    wide.init_weights(config.run.seed)
    for (name, ours), theirs in zip(model.named_parameters(), wide.parameters(), strict=True):
        narrow = frozen and not name.startswith("mtp.")
        assert ours.dtype == (torch.bfloat16 if narrow else torch.float32), name
        assert torch.equal(ours, theirs.to(ours.dtype)), name  # as DeepSpeed rounds it
    trunk, heads = (sum(p.numel() for p in part.parameters()) for part in (wide, wide.mtp))
    needed = 2 * (trunk - heads) + 12 * heads if frozen else 12 * trunk
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for there in (needed - 1, needed):
        monkeypatch.setattr("os.sysconf", lambda name, n=there: n if "PAGES" in name else 1)
        with nullcontext() if there == needed else pytest.raises(ValueError, match="parameters"):
            require_memory(
                meta_model(config.model, config.mtp, freeze=freeze), bytes_per_value=12, frozen=2
            )


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("detach", ["trunk", "all"])
def test_a_frozen_trunk_keeps_nothing_and_has_no_gradient(make_tiny_config, recompute, detach):
    config = make_tiny_config({"mtp.detach": detach})
    with building(Compute(recompute=recompute)):
        model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(0)
    tokens = torch.randint(0, config.model.vocab_size, (2, 18))
    joint = model(tokens).loss
    model.freeze_trunk()
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    calls = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: calls.append((len(kept), torch.is_grad_enabled())))
    with hooks:
        out = model(tokens)
    assert calls == [(0, False)] * config.model.num_hidden_layers and kept
    assert torch.equal(out.loss.detach(), joint.detach())
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("mtp."), name
    held = [
        p for group in build_optimizer(model, config.optim).param_groups for p in group["params"]
    ]
    assert {id(p) for p in held} == {id(p) for p in model.mtp.parameters()}


def test_the_plan_of_a_frozen_trunk_has_its_weights_and_nothing_else_of_it(make_tiny_config):
    config = make_tiny_config(
        {"mtp.detach": "all", "train.init_from": "hf", "parallel.zero_stage": 1}
        | {"model.vocab_size": 4096}  # the loss takes more than a block's backward
    )
    frozen = config.model_copy(
        update={"train": config.train.model_copy(update={"freeze": "trunk"})}
    )
    [joint], [own] = (
        plan(c, meta_model(c.model, c.mtp, freeze=c.train.freeze), layout(c, 1))
        for c in (config, frozen)
    )
    heads = sum(p.numel() for p in meta_model(config.model, config.mtp).mtp.parameters())
    assert own.weights == joint.weights
    assert own.gradients * (joint.dense + joint.experts) == pytest.approx(joint.gradients * heads)
    assert own.states * (joint.dense + joint.experts) == pytest.approx(joint.states * heads)
    assert own.activations < 0.5 * joint.activations  # one block of four, and no embedding
    head = config.model.vocab_size * config.model.hidden_size
    assert joint.buffers - own.buffers == 4 * head  # no gradient of the output head


def test_the_commands_say_what_comes_next_and_refuse_in_one_line(tmp_path, trunk):
    source, run = trunk(), str(tmp_path / "runs/head")

    def command(tool, *arguments):
        log = tmp_path / "command.log"
        log.unlink(missing_ok=True)
        return run_tool(ROOT / f"tools/{tool}.py", *arguments, log=log, cwd=tmp_path)

    code, output = command("import_hf", "--from", str(source), "--out", run, "--frozen")
    assert code == 0 and " on one device at" in output and "steps of 2,048 tokens" in output
    assert f"next: dsv3 train --config {run}/config.yaml" in output
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "two.txt").write_text("1+1=\n2+2=\n")
    own = ["--out", str(tmp_path / "own"), "--from-run", run]
    for arguments, message in (
        (["--prompts", "missing.txt"], "missing.txt: no such file"),
        (["--prompts", "empty.txt"], "empty.txt: holds no prompt"),
        ([], "--from-run needs --prompts FILE"),
        (["--prompts", "two.txt", "--corpus", "pystdlib"], "drop --corpus"),
        (["--prompts", "two.txt", "--temperature", "-1"], "temperature must be 0"),
    ):
        code, output = command("prepare_data", *own, *arguments)
        assert code == 2 and message in output and "Traceback" not in output, output
    code, output = command("prepare_data", *own, "--prompts", "two.txt", "--max-new-tokens", "4")
    assert code == 0 and "2 of 2 prompts" in output and "set data.train and data.val" in output


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["hsm", "hydra", "leap", "medusa"])
def test_the_presets_for_a_frozen_trunk_learn_on_one(tmp_path, trunk, questions, preset):
    source, run = trunk(), tmp_path / "runs" / preset
    recipe = ROOT / f"configs/heads/{preset}.yaml"
    sets = [*SHORT, "train.total_tokens=3072", "data.mask=prompts", "eval.every=1", "log.every=1"]
    import_hf(source, run, base=recipe, sets=sets, data=str(questions), frozen=True)
    log = train(run, tmp_path)
    assert f"not in {source}, at their start" in log
    losses = [
        m["val/mtp_loss/1"] for m in read_metrics(run / "metrics.jsonl") if "val/mtp_loss/1" in m
    ]
    assert losses[-1] < losses[0] - 0.1
    theirs, mine = load_hf(source)[0].state_dict(), load_model(run).model.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
