"""The private names of DeepSpeed and torch: all in one file, and all still there."""

import ast
import inspect
from pathlib import Path

import deepspeed.ops
import deepspeed.runtime.zero.utils
import pytest
import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils import groups

from dsv3_mtp.parallel import private

PACKAGE = Path(__file__).resolve().parents[2] / "dsv3_mtp"
# Names with an underscore that are documented, or of the standard library.
PUBLIC = {"_replace", "_exit", "_fields", "_asdict", "_make"}
# Outside parallel/: file -> names of torch and Transformer Engine, each with the object that has
# it.
ELSEWHERE = {
    "ops/recompute.py": {"_cdata"},
    "objectives/base.py": {"_version"},
    "precision/hopper.py": {"_scaled_mm_v2"},
    "precision/te.py": {"_parameters", "_rowwise_scale_inv", "_rowwise_data"},
    "hf/load.py": {"_parameters"},
    "parallel/launch.py": {"_run_exitfuncs"},  # of atexit
}


def foreign_private_names(path: Path) -> set[str]:
    """Attributes with an underscore of objects other than self, cls, super() and the file's own."""
    tree = ast.parse(path.read_text())
    own = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    } | {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("self", "cls")
    }
    found = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
    }
    return found - own - PUBLIC


def test_private_names_of_others_stand_in_one_file():
    assert "_exec_schedule" in foreign_private_names(PACKAGE / "parallel/private.py")
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if name != "parallel/private.py" and "triton" not in name:
            assert foreign_private_names(path) <= ELSEWHERE.get(name, set()), name


def test_every_field_that_is_read_of_deepspeeds_optimizers_is_listed():
    public = {"param_groups", "state"}  # of torch's optimizers
    listed = {field for fields in private.FIELDS.values() for field in fields}
    for file in ("clip.py", "placement.py"):
        tree = ast.parse((PACKAGE / "parallel" / file).read_text())
        read = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "optimizer"
        }
        assert read and read <= listed | public, file


@pytest.mark.parametrize("kind", private.FIELDS, ids=lambda kind: kind.__name__)
def test_the_fields_of_deepspeeds_optimizers_are_there(kind):
    source = "".join(inspect.getsource(base) for base in kind.__mro__ if base is not object)
    there = {f for f in private.FIELDS[kind] if hasattr(kind, f) or f"self.{f} = " in source}
    assert there == {*private.FIELDS[kind]}


@pytest.mark.parametrize(
    "name",
    [
        "_INSTRUCTION_MAP",
        "_exec_schedule",
        "_exec_reduce_tied_grads",
        "_exec_reduce_grads",
        "_exec_optimizer_step",
    ],
)
def test_a_name_of_deepspeeds_pipeline_engine_is_there(name):
    assert hasattr(PipelineEngine, name)


def test_other_names_of_deepspeed_are_there():
    assert "self._compute_loss" in inspect.getsource(PipelineEngine)
    assert "self._running_engine_backward" in inspect.getsource(DeepSpeedEngine)
    assert hasattr(PipelineModule, "_partition_layers") and hasattr(PipelineModule, "_set_bounds")
    assert isinstance(deepspeed.ops.__compatible_ops__, dict)
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    assert hasattr(deepspeed.runtime.zero.utils, "warned")
    private.import_muon()
    for name in (
        "_get_expert_parallel_group_dict",
        "_create_expert_and_data_parallel",
        "_get_expert_parallel_group",
        "_get_expert_parallel_rank",
        "_get_expert_data_parallel_group",
    ):
        assert callable(getattr(groups, name)), name


def test_names_of_torch_are_there():
    assert all(hasattr(torch.distributed.distributed_c10d, name) for name in private.TIMEOUTS)
    assert hasattr(torch.UntypedStorage, "_cdata") and callable(torch._scaled_mm_v2)


def test_the_default_timeout_is_put_back():
    c10d = torch.distributed.distributed_c10d
    before = c10d.default_pg_timeout
    with pytest.raises(ZeroDivisionError), private.default_timeout(7):
        assert c10d.default_pg_timeout.total_seconds() == 7
        raise ZeroDivisionError
    assert c10d.default_pg_timeout == before
