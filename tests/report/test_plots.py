"""The figures of a run can be drawn at every stage of every kind of run, and show what the records
say.
"""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dsv3_mtp.config import AdaptiveSchedule
from dsv3_mtp.report import plots
from dsv3_mtp.report.plots import plot_run, plot_schedules
from tests.conftest import tiny


def records(depths, points, *, validate_every=3):
    """Train and validation records of a run whose losses fall with the logarithm of the step."""
    out = []
    for step in range(1, points + 1):
        at = {"step": step, "tokens": step * 4096, "progress": step / points, "time_s": float(step)}
        loss = 5.0 - math.log(step)
        values = {"main_loss": loss, "top1/0": 0.5}
        for depth in range(1, depths + 1):
            values |= {
                f"mtp_loss/{depth}": loss + depth,
                f"top1/{depth}": 0.4,
                f"agreement/{depth}": 0.3,
            }
        train = {f"train/{key}": value for key, value in values.items()} | {
            "train/loss": loss * 1.3
        }
        if depths:
            train |= {"train/mtp_weight": 0.3, "train/batch_size": 256}
        train |= {
            "optim/lr": 1e-3,
            "optim/grad_norm": 1.0,
            "moe/max_violation": 0.4,
            "perf/tokens_per_s": 9e3,
        }
        out.append({**at, **train})
        if step % validate_every == 0:
            out.append({**at, **{f"val/{key}": value for key, value in values.items()}})
    return out


@pytest.fixture
def drawn(monkeypatch):
    """The Figure objects that would be saved."""
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, out: figures.append(figure))
    return figures


def is_blank(path):
    return np.asarray(Image.open(path).convert("L")).min() > 250


@pytest.mark.parametrize(("depths", "points"), [(0, 30), (1, 1), (4, 300)])
def test_plot_run_draws_every_kind_of_run(tmp_path, depths, points):
    out = tmp_path / "new" / "curves.png"
    plot_run(records(depths, points), out, config=tiny())
    assert Image.open(out).size == (1200, 800)
    assert not is_blank(out)
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("keep", ["val/main_loss", "nothing"])
def test_plot_run_draws_what_there_is(tmp_path, keep):
    plot_run([r for r in records(2, 9) if keep in r], tmp_path / "curves.png", config=tiny())
    assert not is_blank(tmp_path / "curves.png")


def test_plot_run_has_a_curve_and_markers_for_every_depth(tmp_path, drawn):
    plot_run(records(3, 12), tmp_path / "curves.png", config=tiny())
    (figure,) = drawn
    losses = figure.axes[0].lines
    for depth in range(4):
        lines = [line for line in losses if line.get_color() == plots._color(depth)]
        markers = [line for line in lines if line.get_linestyle() == "None"]
        assert len(markers) == 1 and len(markers[0].get_xdata()) == 4
        assert len(lines) >= 2
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "main head",
        "MTP depth 1",
        "MTP depth 2",
        "MTP depth 3",
        "training",
        "validation",
    ]


def test_plot_run_shows_the_last_validation_and_not_too_many_markers(tmp_path, drawn):
    data = records(1, 500, validate_every=7)
    plot_run(data, tmp_path / "curves.png", config=tiny())
    last = [record for record in data if "val/main_loss" in record][-1]
    markers = next(line for line in drawn[0].axes[0].lines if line.get_linestyle() == "None")
    assert len(markers.get_xdata()) <= 16
    assert (markers.get_xdata()[-1], markers.get_ydata()[-1]) == (
        last["tokens"],
        last["val/main_loss"],
    )


def test_plot_run_leaves_a_gap_where_the_loss_was_not_finite(tmp_path):
    data = records(1, 50)
    for record in data[10:20]:
        record.update({key: math.nan for key in record if key.startswith(("train/", "optim/"))})
    data[30]["optim/grad_norm"] = None
    data[31]["optim/grad_norm"] = math.inf
    plot_run(data, tmp_path / "curves.png", config=tiny())
    assert not is_blank(tmp_path / "curves.png")


def test_a_failed_drawing_keeps_the_old_picture(tmp_path, monkeypatch):
    out = tmp_path / "curves.png"
    before = b"the old picture"
    out.write_bytes(before)

    def fail(self, path, **_):
        path.write_bytes(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_run(records(1, 9), out, config=tiny())
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_smoothing_keeps_a_straight_line_and_its_ends():
    line = np.linspace(3.0, 1.0, 400)
    np.testing.assert_allclose(plots._smooth(line), line)


def test_smoothing_averages_the_noise_and_skips_what_is_not_finite():
    noise = np.random.default_rng(0).normal(size=4000)
    noise[100] = np.nan
    smooth = plots._smooth(noise)
    assert np.isfinite(smooth).all()
    assert smooth[200:-200].std() < 0.2


@pytest.mark.parametrize(
    "overrides",
    [
        {"mtp.mode": "none"},
        {"mtp.num_nextn_predict_layers": 3, "mtp.curriculum": "forward"},
        {"train.batch_size": 16, "train.batch_size_ramp": {"start": 4, "until": 0.2}},
    ],
)
def test_plot_schedules_draws_every_kind_of_config(tmp_path, make_tiny_config, overrides):
    plot_schedules(make_tiny_config(overrides), tmp_path / "schedules.png")
    assert Image.open(tmp_path / "schedules.png").size == (1200, 800)


def test_plot_schedules_shows_the_schedule_functions(tmp_path, make_tiny_config, drawn):
    weight = {"type": "step", "values": [0.3, 0.1], "at": [0.5]}
    config = make_tiny_config({"mtp.num_nextn_predict_layers": 2, "mtp.loss_weight": weight})
    plot_schedules(config, tmp_path / "schedules.png")
    total, *depths = drawn[0].axes[1].lines
    assert (total.get_ydata()[0], total.get_ydata()[-1]) == (0.3, 0.1)
    assert len(depths) == 2
    for line in depths:
        np.testing.assert_allclose([line.get_ydata()[0], line.get_ydata()[-1]], [0.15, 0.05])
    assert total.get_xdata()[-1] == config.train.total_tokens
    for ax in drawn[0].axes:
        assert all(line.get_drawstyle() == "steps-post" for line in ax.lines)  # no slopes


STEP = {"type": "step", "values": [0.3, 0.1], "at": [0.68]}
LAMBDA = {"mtp.loss_weight": STEP, "train.total_tokens": 30 * 4096}


def weight_line(figure):
    (line,) = [line for ax in figure.axes for line in ax.lines if line.get_color() == "#d55e00"]
    return line


def test_plot_run_draws_a_jump_of_lambda_where_the_schedule_jumps(tmp_path, drawn):
    run = [r for r in records(1, 24) if r["step"] % 8 == 0]
    for record in run:
        if "train/loss" in record:  # the step that begins at two thirds still has 0.3
            record["train/mtp_weight"] = 0.1 if record["step"] > 21 else 0.3
    plot_run(run, tmp_path / "curves.png", config=tiny(LAMBDA))
    tokens, values = weight_line(drawn[0]).get_data()
    assert (tokens[0], tokens[-1]) == (0, 24 * 4096)  # as far as it was trained
    assert set(values) == {0.3, 0.1}
    np.testing.assert_allclose(tokens[values == 0.1][0], 0.68 * 30 * 4096, rtol=0.002)


def test_plot_run_joins_the_records_where_the_schedule_gives_other_weights(tmp_path, drawn):
    run = records(1, 30)
    for record in run[15:]:
        record["train/mtp_weight"] = 0.1  # a start with another schedule
    plot_run(run, tmp_path / "curves.png", config=tiny(LAMBDA))
    adaptive = {"type": f"{__name__}:Halved", "start": 0.3}
    plot_run(records(1, 9), tmp_path / "curves.png", config=tiny({"mtp.loss_weight": adaptive}))
    for figure, points in zip(drawn, (30, 9), strict=True):
        line = weight_line(figure)
        assert line.get_drawstyle() == "steps-pre" and len(line.get_xdata()) == points


class Halved(AdaptiveSchedule):
    """Its first state gives what the records have; the states after it do not."""

    type: str
    start: float

    def first_state(self):
        return {"weight": self.start}

    def next_state(self, state, metrics):
        return {"weight": state["weight"] / 2}

    def weight_in(self, state, progress):
        return state["weight"]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (600, "600"), (5e5, "500k"), (1.5e6, "1.5M"), (14.8e12, "14.8T")]
)
def test_tick_labels_have_readable_units(value, text):
    assert plots.short_number(value) == text


def test_plot_run_shows_the_floors_of_the_last_validation(tmp_path, drawn):
    run = records(1, 30)
    floors = {"unigram": 5.1, "bigram": 3.9, "trigram": 3.2}
    plot_run(run, tmp_path / "without.png", config=tiny())
    run[-1] |= {f"val/floor/{name}": floor for name, floor in floors.items()}
    plot_run(run, tmp_path / "with.png", config=tiny())
    without, with_floors = (figure.axes[0] for figure in drawn)
    dotted = [line for line in with_floors.lines if line.get_linestyle() == ":"]
    assert [line.get_ydata()[0] for line in dotted] == list(floors.values())
    assert [text.get_text() for text in with_floors.texts] == list(floors)
    assert not [line for line in without.lines if line.get_linestyle() == ":"]
