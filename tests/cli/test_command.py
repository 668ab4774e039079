"""The one command from the outside: its help, its errors, and an installed wheel away from the
clone.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dsv3_mtp
from dsv3_mtp.cli.command import COMMANDS, find_config, main, run

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {
    "train",
    "study",
    "generate",
    "evaluate",
    "prepare_data",
    "export_hf",
    "import_hf",
    "verify",
}


def test_every_command_is_listed_and_explains_itself(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name} " in listed and summary in listed
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0 and f"usage: dsv3 {name}" in capsys.readouterr().out


def test_help_and_wrong_options_need_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    for name in COMMANDS:
        for option, code in (("--help", 0), ("--no-such-option", 2)):
            command = [sys.executable, "-m", "dsv3_mtp", name, option]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


def test_a_command_that_does_not_exist_is_named_with_those_that_do(capsys):
    assert main(["trian"]) == 2
    said = capsys.readouterr().err
    assert "trian: no such command" in said and all(name in said for name in COMMANDS)


@pytest.mark.parametrize("tool", sorted(TOOLS))
def test_a_tool_of_the_clone_is_its_command(tool):
    text = (ROOT / "tools" / f"{tool}.py").read_text()
    assert len(text.splitlines()) <= 16 and any(f'run("{name}")' in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("lr: must be > 0"), 2, "error: lr: must be > 0\n"),
        (OSError(28, "No space left on device", "a"), 2, "error: a: No space left on device\n"),
        (KeyboardInterrupt(), 130, "it goes on from its last checkpoint"),
    ],
)
def test_errors_become_exit_codes(monkeypatch, capsys, error, code, said):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("dsv3_mtp.config.load_config", fail)
    assert run("train", ["--config", "v3_tiny"]) == code
    assert said in capsys.readouterr().err


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("dsv3_mtp.config.load_config", fail)
    with pytest.raises(ZeroDivisionError):
        run("train", ["--config", "v3_tiny"])


def test_a_shipped_config_is_found_by_its_name_and_a_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("v3_tiny", "v3_tiny.yaml", "configs/v3_tiny.yaml"):
        assert find_config(name) == str(ROOT / "configs/v3_tiny.yaml")
    Path("v3_tiny.yaml").write_text("mine")
    assert find_config("v3_tiny.yaml") == "v3_tiny.yaml"
    assert find_config("gone.yaml") == "gone.yaml"  # load_config says that it is missing


def test_configs_prints_a_shipped_file_as_it_is(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["configs", "v3_nano"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs/v3_nano.yaml").read_text()
    assert main(["configs", "v3_nono"]) == 2
    assert "`dsv3 configs` lists them" in capsys.readouterr().err


@pytest.mark.slow
def test_an_installed_wheel_works_away_from_the_clone(tmp_path):
    pytest.importorskip("hatchling", reason="the wheel is built with it; pip install '.[dev]'")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", tmp_path, ROOT], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"dsv3_mtp-{dsv3_mtp.__version__}-")

    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps"]
    subprocess.run([*install, "--no-index", wheel], check=True, timeout=120)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(
        "\n".join(entry for entry in sys.path if entry.endswith("site-packages"))
    )

    away = tmp_path / "away"
    away.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def dsv3(*arguments: str) -> str:
        command = [home / "bin" / "dsv3", *arguments]
        done = subprocess.run(
            command, cwd=away, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert dsv3("--version").strip() == dsv3_mtp.__version__
    assert "v3_tiny" in dsv3("configs") and "studies/heads" in dsv3("configs")
    assert "fits in 8 GiB" in dsv3("plan", "--config", "v3_nano.yaml")
    assert "arms" in dsv3("study", "--study", "studies/lambda", "--dry-run")
    installed = packages / "dsv3_mtp"
    assert (installed / "py.typed").is_file()
    assert (installed / "ops/csrc/attention.c").is_file()
    metadata = next(packages.glob("dsv3_mtp-*.dist-info/METADATA")).read_text()
    assert "Description-Content-Type: text/markdown" in metadata and "Project-URL:" in metadata
