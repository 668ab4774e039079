"""Measures the bytes per parameter that a rank holds under each ZeRO stage, for the table in docs/parallelism.md.

    python -m tests.parallel.memory

Every tensor that is alive is counted, once per storage, at four points of a step of two micro-batches: after the first
forward (weights that ZeRO-3 gathered and did not give back), between the micro-batches (gradients that accumulate),
before the update, and after it. The rows are few, so that activations hardly count; the reduce bucket of DeepSpeed
(5e8 elements by default, whatever the model) is made small, and ZeRO-3 keeps no weights for later (1e9 by default).
"""

import gc
import tempfile
from pathlib import Path

import torch

from dsv3_mtp.config import Config
from dsv3_mtp.trainer import Trainer
from tests.conftest import TINY_CONFIG
from tests.ranks import run_ranks, write_markov

POINTS = ("after forward", "between", "before step", "after step")
LAYOUTS = [
    (0, False, 1),
    (1, False, 1),
    (2, False, 1),
    (3, False, 1),
    (2, True, 1),
    (1, False, 2),
    (2, False, 2),
]  # ZeRO, offload, EP


def make_config(folder: Path, data: str, dtype: str, stage: int, offload: bool, experts: int) -> Config:
    sections = {name: dict(values) for name, values in TINY_CONFIG.items()}
    sections["run"] |= {"dir": str(folder)}
    sections["model"] |= {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 256, "vocab_size": 512}
    sections["data"] |= {"train": data, "val": data}
    sections["train"] |= {"dtype": dtype, "batch_size": 4, "micro_batch_size": 1}
    parallel = {"zero_stage": stage, "offload_optimizer": offload, "expert_parallel_size": experts}
    live = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")
    zero = {"reduce_bucket_size": 10_000} | dict.fromkeys(live, 0)
    deepspeed = {"zero_optimization": zero if stage == 3 else {"reduce_bucket_size": 10_000}}
    return Config.model_validate(sections | {"parallel": parallel, "deepspeed": deepspeed})


def alive() -> dict[int, int]:
    """Address -> bytes of every tensor storage."""
    gc.collect()
    found = [tensor for tensor in gc.get_objects() if type(tensor) in (torch.Tensor, torch.nn.Parameter)]
    found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]  # gc sees no gradient
    return {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in found)}


def measure(config: Config, file: Path) -> None:
    before = alive()
    trainer = Trainer(config, command=["memory"])
    count, found = trainer.size.total + trainer.size.mtp_total, {}

    def note(point: str) -> None:
        found[point] = sum(size for address, size in alive().items() if address not in before) / count

    backward, step = trainer.engine.backward, trainer.engine.step

    def backward_and_look(loss, *, last):
        if not last:
            note("after forward")
        backward(loss, last=last)
        if not last:
            note("between")

    def step_and_look(lr):
        note("before step")
        return step(lr)

    trainer.engine.backward, trainer.engine.step = backward_and_look, step_and_look
    for _ in range(2):
        trainer.optimizer_step()
    note("after step")
    if trainer.world.is_main:
        torch.save(found, file)


def main() -> None:
    print(f"{'bytes per parameter of one of 2 ranks':40}" + "".join(f"{point:>15}" for point in POINTS))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_markov(folder / "data" / "markov", tokens=3000, documents=40)
        for dtype in ("float32", "bfloat16"):
            for stage, offload, experts in LAYOUTS:
                config = make_config(folder / "runs", data, dtype, stage, offload, experts)
                codes = run_ranks(measure, config, folder / "found", world_size=2, log=folder / "log")
                assert codes == [0, 0], (folder / "log.rank0").read_text()
                found = torch.load(folder / "found")
                row = f"{dtype}, ZeRO-{stage}" + ", offload" * offload + f", EP={experts}" * (experts > 1)
                print(f"{row:40}" + "".join(f"{found[point]:15.2f}" for point in POINTS), flush=True)


if __name__ == "__main__":
    main()
