"""Files that build on one another: what is merged, what is replaced, and where a wrong value
stands.
"""

from pathlib import Path
from textwrap import dedent

import pytest
import yaml

from dsv3_mtp.config import ConfigError, load_config
from dsv3_mtp.config.tree import DEEPEST, read_document, read_tree

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "v3_tiny.yaml"


def write(folder: Path, **files: str) -> Path:
    """Writes NAME.yaml for each keyword; the path of the last one."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(dedent(text))
    return folder / f"{name}.yaml"


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_mappings_are_merged_and_all_else_is_replaced(tmp_path):
    path = write(
        tmp_path,
        base="a: {x: 1, y: {z: 2, w: [1, 2, 3]}}\nb: [1, 2]\nc: {k: 1}\nd: {k: 1}\ne: 1",
        top="base: base.yaml\na: {y: {z: 3, w: [4]}}\nb: []\nc: {}\nd: null\nf: {n: 1}",
    )
    tree, problems = read_tree(path)
    assert (problems, tree) == (
        [],
        {
            "a": {"x": 1, "y": {"z": 3, "w": [4]}},
            "b": [],
            "c": {},
            "d": None,
            "e": 1,
            "f": {"n": 1},
        },
    )


def test_a_mapping_of_another_type_is_replaced_and_one_of_the_same_type_is_merged(tmp_path):
    path = write(
        tmp_path,
        base="a: {type: step, values: [1, 2], at: [0.5]}\nb: {type: star, degree: 2, nodes: 9}",
        top="base: base.yaml\na: {type: constant, value: 1}\nb: {nodes: 8}",
    )
    assert read_tree(path)[0] == {
        "a": {"type": "constant", "value": 1},
        "b": {"type": "star", "degree": 2, "nodes": 8},
    }


def test_a_base_is_relative_to_the_file_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    write(tmp_path / "inner", deep="a: 1\nb: 1\nc: 1")
    write(tmp_path, middle="base: inner/deep.yaml\nb: 2\nc: 2")
    top = write(tmp_path / "inner", top="base: ../middle.yaml\nc: 3")
    monkeypatch.chdir("/")
    document = read_document(top)
    assert document.tree == {"a": 1, "b": 2, "c": 3}
    origins = [document.origin(key) for key in "abc"]
    assert origins == [
        str(tmp_path / "inner/../inner/deep.yaml"),
        str(tmp_path / "inner/../middle.yaml"),
        None,
    ]


def test_files_that_build_on_one_another_in_a_circle_are_refused(tmp_path):
    path = write(tmp_path, a="base: b.yaml", b="base: c.yaml", c="base: ./a.yaml")
    names = [str(tmp_path / name) for name in ("a.yaml", "b.yaml", "c.yaml", "a.yaml")]
    with pytest.raises(ConfigError) as error:
        read_tree(tmp_path / "a.yaml")
    assert error.value.problems == (
        ("base", f"the files build on one another: {' -> '.join(names)}"),
    )
    assert path.name == "c.yaml"


def test_a_chain_of_files_has_a_limit(tmp_path):
    files = {f"f{n}": f"base: f{n - 1}.yaml" for n in range(1, DEEPEST + 1)}
    write(tmp_path, f0="a: 1", **files)
    assert read_tree(tmp_path / f"f{DEEPEST - 1}.yaml")[0] == {"a": 1}
    with pytest.raises(ConfigError, match=f"at most {DEEPEST} files may build on one another"):
        read_tree(tmp_path / f"f{DEEPEST}.yaml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("base: none.yaml", "base: {folder}/none.yaml cannot be read: No such file or directory"),
        ("base: 3", "base: must be the path of a YAML file, relative to this one (got 3)"),
        ("base: [a.yaml]", "base: must be the path of a YAML file, relative to this one (got"),
    ],
)
def test_a_base_that_is_none_is_reported_for_the_file_that_names_it(tmp_path, text, problem):
    path = write(tmp_path, top=text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    first, line = str(error.value).splitlines()
    assert first == f"{path}: 1 problem"
    assert line.startswith("  " + problem.format(folder=tmp_path))


def test_broken_yaml_in_a_base_names_the_base(tmp_path):
    path = write(tmp_path, base="a: b: c", top="base: base.yaml")
    with pytest.raises(ConfigError, match=r"base.yaml: 1 problem\n  line 1, column 5: invalid"):
        load_config(path)


def test_a_problem_names_the_base_that_the_wrong_value_stands_in(tmp_path):
    base = tmp_path / "base.yaml"
    path = write(
        tmp_path,
        base=f"base: {TINY}\noptim: {{lr: 0}}\ntrain: {{micro_batch_size: 3, batch_sice: 1}}",
        top="base: base.yaml\noptim: {eps: 0}\ntrain: {batch_size: 8}",
    )
    with pytest.raises(ConfigError) as error:
        load_config(path, ["eval.batches=0"])
    assert str(error.value).splitlines() == [
        f"{path}: 4 problems",
        f"  optim.lr: must be > 0 (got 0), in {base}",
        "  optim.eps: must be > 0 (got 0)",
        f"  train.batch_sice: unknown key; did you mean 'train.batch_size'?, in {base}",
        "  eval.batches: must be >= 1 (got 0)",
    ]


def test_a_duplicate_key_in_a_base_names_the_base(tmp_path):
    path = write(tmp_path, base="a: 1\na: 2", top="base: base.yaml")
    document = read_document(path)
    text = f"given twice, on lines 1 and 2; keep one, in {tmp_path / 'base.yaml'}"
    assert document.problems == [("a", text)]


def test_an_override_is_never_said_to_be_of_the_base(tmp_path):
    path = write(tmp_path, top=f"base: {TINY}")
    with pytest.raises(ConfigError) as error:
        load_config(path, ["optim.lr=0"])
    assert error.value.problems == (("optim.lr", "must be > 0 (got 0)"),)
    assert load_config(path).to_dict() == load_config(TINY).to_dict()


def test_a_base_cannot_be_an_override():
    with pytest.raises(ConfigError) as error:
        load_config(TINY, ["base=v3_nano.yaml"])
    assert error.value.problems == (
        ("--set base=v3_nano.yaml", "is for files: write a file with this base, or name another"),
    )


HEADS = {
    "inherited": ("base: base.yaml\nmtp: {mode: parallel}", [], None),
    "inherited by --set": ("base: base.yaml", ["mtp.mode=parallel"], None),
    "in the same file": ("base: base.yaml\nmtp: {mode: parallel, chain: trunk}", [], "trunk"),
    "by --set": ("base: base.yaml\nmtp: {mode: parallel}", ["mtp.chain=trunk"], "trunk"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_key_of_another_head_is_dropped_and_said_only_where_it_was_inherited(
    tmp_path, caplog, name
):
    text, sets, refused = HEADS[name]
    path = write(tmp_path, base=f"base: {TINY}\nmtp: {{chain: trunk}}", top=text)
    if refused:
        with pytest.raises(ConfigError, match="chain: has no effect with mode parallel"):
            load_config(path, sets)
        assert caplog.messages == []
    else:
        assert load_config(path, sets).mtp.model_extra == {}
        assert caplog.messages == [
            f"mtp.chain: 'trunk' of {tmp_path / 'base.yaml'} has no effect with mode parallel: "
            "left out"
        ]


def test_a_key_of_another_head_beside_its_mode_in_one_base_is_an_error(tmp_path):
    text = f"base: {TINY}\nmtp: {{mode: parallel, chain: trunk}}"
    path = write(tmp_path, base=text, top="base: base.yaml")
    with pytest.raises(ConfigError, match=r"has no effect with mode parallel.*in .*base.yaml"):
        load_config(path)


@pytest.mark.parametrize(
    "path", sorted(set(CONFIGS.glob("*.yaml")) - {TINY}), ids=lambda path: path.stem
)
def test_a_shipped_config_holds_exactly_what_differs_from_the_whole_document(path):
    own = yaml.safe_load(path.read_text())
    assert own.pop("base") == TINY.name
    whole, resolved = (dict(leaves(load_config(file).to_dict())) for file in (TINY, path))
    differing = {key for key in whole | resolved if whole.get(key) != resolved.get(key)}
    written = {key for key, _ in leaves(own)}
    # sections that are null in the whole document, or of another type: what they hold is theirs
    sections = ("data.task", "train.batch_size_ramp", "mtp.loss_weight", "model.rope_scaling")
    assert {key for key in written ^ differing if not key.startswith(sections)} == set()


def test_the_whole_document_has_every_key_of_the_schema():
    """But those of sections that it leaves out as null."""
    written = {key for key, _ in leaves(yaml.safe_load(TINY.read_text()))}
    whole = {key for key, _ in leaves(load_config(TINY).to_dict())}
    assert {key for key in whole ^ written if not key.startswith("mtp.loss_weight")} == set()


def test_a_text_is_parsed_once_and_what_is_read_of_it_is_the_readers_own(tmp_path):
    (tmp_path / "a.yaml").write_text("over: &over {x: 1, y: 2}\nown: {<<: *over, x: 3}\n")
    first, problems = read_tree(tmp_path / "a.yaml")
    assert first == {"over": {"x": 1, "y": 2}, "own": {"x": 3, "y": 2}} and problems == []
    first["over"]["x"] = 9
    assert read_tree(tmp_path / "a.yaml")[0]["over"] == {"x": 1, "y": 2}
