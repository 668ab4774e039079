"""One variant of bench/step.py: builds a model, and runs a step when it is told to (child.py)."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from child import serve
from timing import clock, now, timed
from torch import Tensor, nn

from dsv3_mtp.config import Config
from dsv3_mtp.hf.settings import to_config_json
from dsv3_mtp.model.block import DecoderLayer
from dsv3_mtp.model.causal_lm import DeepseekV3MTP, meta_model
from dsv3_mtp.model.layers import MLP, RMSNorm, rotary_angles
from dsv3_mtp.model.moe import MoE
from dsv3_mtp.model.output import LossSettings
from dsv3_mtp.model.size import model_size
from dsv3_mtp.ops import choice, tuning
from dsv3_mtp.ops.compute import Compute, building
from dsv3_mtp.ops.cross_entropy import linear_cross_entropy
from dsv3_mtp.precision.convert import choose_compute
from dsv3_mtp.train.optim import build_optimizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Step = Callable[[], Tensor]


def build(spec: dict[str, Any]) -> tuple[Step, nn.Module, Any, list[str]]:
    """A step that returns its main loss, the model, the optimizer, and what the model computes in.
    All kinds start from the same weights.
    """
    config = Config.model_validate(spec["config"])
    make = partial(meta_model, config.model, config.mtp, freeze=config.train.freeze)
    compute, notes = Compute(), list[str]()
    if spec["kind"] == "ours":
        compute, notes = choose_compute(config, DEVICE, make)
    with building(replace(compute, recompute=config.train.activation_checkpointing)):
        model = make()
    model.to_empty(device=DEVICE)
    model.init_weights(config.run.seed)
    generator = torch.Generator().manual_seed(config.run.seed)
    shape = (config.train.micro_batch_size, config.data.seq_len + config.mtp.lookahead)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(DEVICE)
    if spec["kind"] == "transformers":
        return *transformers_step(model, tokens, config, tuned=spec["tuned"]), notes
    # In bfloat16 on a CPU both sides keep float32 weights and compute with copies. On a GPU neither
    # does: without them transformers' step of v3_3b fills 80 GB.
    masters = (
        copy.deepcopy(model) if DEVICE.type == "cpu" and config.train.dtype == "bfloat16" else model
    )
    dtype = getattr(torch, config.train.dtype)
    for parameter in model.parameters():  # not the router biases, which stay float32
        parameter.data = parameter.data.to(dtype)
    if spec["compiled"]:
        for module in model.modules():
            if isinstance(module, DecoderLayer):
                module.compile()
    # Its states in the type of the weights that it updates, as transformers'.
    optimizer = build_optimizer(masters, config.optim.model_copy(update={"moments": "float32"}))
    pairs = (
        [] if masters is model else list(zip(masters.parameters(), model.parameters(), strict=True))
    )
    pairs = [(master, parameter) for master, parameter in pairs if parameter.requires_grad]
    alpha = config.train.balance_loss_weight

    def step() -> Tensor:
        model.zero_grad()
        out = model(tokens, settings=LossSettings(balance_loss_weight=alpha))
        out.loss.backward()
        for master, parameter in pairs:
            assert parameter.grad is not None  # for mypy
            master.grad = parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            for master, parameter in pairs:
                parameter.copy_(master)
        return out.nll_sum[0] / out.targets[0]

    return step, model, optimizer, notes


def transformers_step(
    ours: DeepseekV3MTP, tokens: Tensor, config: Config, *, tuned: bool
) -> tuple[Step, Any, Any]:
    """transformers' DeepseekV3ForCausalLM as it comes, or with the settings that were found best
    for it on a CPU:
    its plain attention, fused AdamW, and for bfloat16 autocast over float32 weights.
    """
    import transformers

    content = to_config_json(config.model, 0, dtype="fp32", special_ids={})
    shape = transformers.DeepseekV3Config.from_dict(content | {"use_cache": False})
    if tuned and DEVICE.type == "cpu":
        shape._attn_implementation = "eager"
    with DEVICE:
        model: Any = transformers.DeepseekV3ForCausalLM(shape)
    model.load_state_dict(
        {name: w for name, w in ours.state_dict().items() if not name.startswith("mtp.")},
        strict=True,
    )
    low = config.train.dtype == "bfloat16"
    autocast = low and DEVICE.type == "cpu"
    # not the buffers: frequencies of the rotary embedding, router biases
    for parameter in model.parameters():
        parameter.data = parameter.data.to(
            torch.bfloat16 if low and not autocast else torch.float32
        )
    model.train()
    groups: list[dict[str, Any]] = [  # as in dsv3_mtp/train/optim.py
        {
            "params": [p for p in model.parameters() if p.ndim > 1],
            "weight_decay": config.optim.weight_decay,
        },
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    settings = config.optim.model_dump(include={"lr", "betas", "eps"})
    optimizer = torch.optim.AdamW(groups, **settings, fused=True if tuned else None)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].contiguous()

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = model(input_ids=inputs, labels=targets, shift_labels=targets).loss
        loss.backward()
        optimizer.step()
        return loss

    return step, model, optimizer


def parts(model: Any, optimizer: Any, config: Config) -> dict[str, float]:
    """Seconds per step of each part alone, forward and backward, times the number of times that a
    step runs it.
    """
    batch, length, width = (
        config.train.micro_batch_size,
        config.data.seq_len,
        config.model.hidden_size,
    )
    dtype = model.lm_head.weight.dtype
    x = torch.randn(batch, length, width, device=DEVICE, dtype=dtype, requires_grad=True)
    angles = rotary_angles(config.model, torch.arange(length, device=DEVICE))
    heads = 1 + config.mtp.depths
    rows = x.detach().flatten(0, 1).repeat(heads, 1).requires_grad_()
    targets = torch.randint(config.model.vocab_size, (len(rows),), device=DEVICE)
    row_weight = torch.full((len(rows),), 1 / len(rows), device=DEVICE)

    def median(forward: Callable[[], Tensor]) -> float:
        def both() -> None:
            out = forward()
            out.backward(torch.ones_like(out))

        times = sorted(timed(both, DEVICE) for _ in range(6))
        # the first run, which also compiles and allocates, is never the third fastest of six
        return times[2]

    layers: list[Any] = [*model.model.layers, *(model.mtp.cost().blocks if model.depths else ())]
    sparse: Any = [layer.mlp for layer in layers if isinstance(layer.mlp, MoE)]
    dense: Any = [layer.mlp for layer in layers if isinstance(layer.mlp, MLP)]
    norms = sum(
        isinstance(m, RMSNorm) and m.weight.numel() == width
        for part in [*layers, model.model.norm]
        for m in part.modules()
    )
    result = {"attention": len(layers) * median(lambda: layers[0].self_attn(x, angles, None))}
    if sparse:
        result["MoE"] = len(sparse) * median(lambda: sparse[0](x)[0])
    if dense:
        result["dense feed-forward"] = len(dense) * median(lambda: dense[0](x))
    result["norms"] = norms * median(lambda: layers[0].input_layernorm(x))
    result["output head and loss"] = median(
        lambda: linear_cross_entropy(rows, model.lm_head.weight, targets, row_weight)[0]
    )
    result["optimizer"] = sorted(timed(optimizer.step, DEVICE) for _ in range(6))[2]
    return result


def held() -> int:
    """Bytes that this process holds, on a GPU of the GPU's."""
    return resident("VmRSS") if DEVICE.type == "cpu" else torch.cuda.memory_allocated()


def forget_peak() -> None:
    """`most_held` counts from here on; not on a CPU, whose peak is that of the whole process."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def most_held() -> int:
    return resident("VmHWM") if DEVICE.type == "cpu" else torch.cuda.max_memory_allocated()


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the best of some square products: what `MFU` is measured against."""
    size = 8192 if DEVICE.type == "cuda" else 768
    x, y = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: torch.mm(x, y), DEVICE) for _ in range(5))


def answer_to(spec: dict[str, Any]) -> tuple[Any, dict[str, Callable[[str], Any]]]:
    """The first answer, and what each command does (child.serve)."""
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    config = Config.model_validate(spec["config"])
    notes = tuning.tune(DEVICE) if spec["tuned"] and spec["kind"] == "ours" else []
    if not spec["tuned"]:
        choice.plain().__enter__()  # as long as this process lives
    step, model, optimizer, precision = build(spec)
    if spec["tuned"] and spec["kind"] == "transformers" and DEVICE.type == "cpu":
        # not before: the step would find the memory of the model that the weights came from
        tuning.keep_freed_memory()
    notes += precision
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    forget_peak()
    built = held()
    losses = [step().item() for _ in range(3)]
    size = model_size(model, config.data.seq_len) if isinstance(model, DeepseekV3MTP) else None
    first = {
        "losses": losses,
        "notes": notes,
        "flops_per_token": size and size.flops_per_token,
        "clock": clock(DEVICE),
    }

    def one_step(_: str) -> dict[str, float]:
        start = now(DEVICE)
        loss = step().item()
        return {"seconds": now(DEVICE) - start, "loss": loss}

    def peak(dtype: str) -> float:
        rate = matmul_rate(getattr(torch, dtype))
        forget_peak()  # the products may have taken more of a GPU than a step does
        return rate

    commands: dict[str, Callable[[str], Any]] = {
        "step": one_step,
        "peak": peak,
        "parts": lambda _: parts(model, optimizer, config),
        "memory": lambda _: most_held() - (built if DEVICE.type == "cpu" else 0),  # of a GPU all
    }
    return first, commands


if __name__ == "__main__":
    serve(answer_to)
