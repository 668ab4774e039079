"""`dsv3 analyse` on a small run: what it writes, prints, compares and refuses."""

import json
from pathlib import Path

import pytest

from dsv3_mtp.analysis.analyse import Analysis
from dsv3_mtp.analysis.intervals import Estimate
from dsv3_mtp.analysis.picture import draw as picture
from dsv3_mtp.analysis.routers import Shared
from dsv3_mtp.cli.command import run as command
from dsv3_mtp.model.causal_lm import DeepseekV3MTP
from tests.conftest import tiny
from tests.made_runs import write_run
from tests.ranks import write_markov


def made(root: Path, name: str, mode: str, **more) -> Path:
    data = root / "data/markov"
    if not data.with_suffix(".idx").exists():
        write_markov(data, tokens=3000, documents=40)
    config = tiny(
        {"run.name": name, "run.dir": str(root / "runs"), "mtp.mode": mode}
        | {"data.train": str(data), "data.val": str(data), "train.dtype": "float32"}
        | {key.replace("__", "."): value for key, value in more.items()}
    )
    folder = root / "runs" / name
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(3)
    return write_run(folder, config, model)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("analyse")
    heads = made(root, "heads", "sequential")
    angles = {"optim/gradient_cosine": 0.2, "optim/gradient_ratio": 0.5}
    records = [{"step": n, "tokens": n, "progress": n / 8, **angles} for n in range(1, 9)]
    records[1]["optim/gradient_cosine"] = -0.4
    (heads / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    return heads, made(root, "none", "none")


def test_a_run_beside_another_on_the_same_windows(runs, capsys):
    heads, none = runs
    assert command("analyse", ["--run", str(heads), "--against", str(none)]) == 0
    text = capsys.readouterr().out
    found = json.loads((heads / "analysis.json").read_text())
    assert (heads / "analysis.png").stat().st_size > 10_000
    assert found["windows"] == 8 and found["against"] == str(none)
    # both trunks are drawn from one seed
    minus = [row["main_loss_minus"]["mean"] for row in found["groups"]["entropy"].values()]
    assert minus == pytest.approx([0.0] * len(minus), abs=1e-5)
    assert [p["probe_minus"]["mean"] for p in found["probes"].values()] == pytest.approx(
        [0.0] * 3, abs=1e-3
    )
    assert [row["cosine"] for row in found["gradients"]] == pytest.approx([0.2, -0.1, 0.2, 0.2])
    assert found["gradients"][1]["conflicts"] == 0.5
    assert {(r["depth"], r["layer"]) for r in found["routers"]} == {(1, 1), (1, 2)}
    assert "note: no token classes: there is no tokenizer.json" in text
    for part in ("overlap 1", "table drafter 1", "t+4", "common experts", "below 0"):
        assert part in text


def test_a_run_without_heads_is_analysed_and_says_what_it_lacks(runs, capsys):
    assert command("analyse", ["--run", str(runs[1]), "--json", "--batches", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["windows"] == 4 and not found["routers"]
    assert any("no gradient angles" in note for note in found["notes"])


def test_without_angles_the_picture_shows_the_routers(tmp_path):
    draw, routers = [], [Shared(1, layer, Estimate(0.4, 0.1, 9), 0.25) for layer in (1, 2)]
    for gradients in ([], [{"from": 0.0, "to": 1.0, "cosine": 0.1, "lowest": 0.0, "highest": 1.0}]):
        found = Analysis("run", None, 1, "data", 2, 8, groups={"entropy": {}})
        found.routers, found.gradients = routers, gradients
        picture(found, tmp_path / "x.png")
        draw.append((tmp_path / "x.png").read_bytes())
    assert draw[0] != draw[1]


def test_runs_that_cannot_be_read_on_the_same_windows_are_refused(runs, capsys):
    short = made(runs[0].parents[1], "short", "none", data__seq_len=8)
    assert command("analyse", ["--run", str(runs[0]), "--against", str(short)]) == 2
    message = capsys.readouterr().err
    assert "data.seq_len is 8" in message and "Traceback" not in message
    assert not (short / "analysis.json").exists()


def test_a_task_is_refused(tmp_path, capsys):
    config = tiny({"data.task": {"type": "markov"}, "data.train": None, "data.val": None})
    model = DeepseekV3MTP(config.model, config.mtp)
    model.init_weights(1)
    folder = write_run(tmp_path / "task", config, model)
    assert command("analyse", ["--run", str(folder)]) == 2
    assert "is no text" in capsys.readouterr().err
