"""Pictures of one run: its curves from metrics.jsonl, and the schedules a config asks for."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dsv3_mtp.config import Config, schedules
from dsv3_mtp.files.atomic import replacing
from dsv3_mtp.report.metrics import Record, depths_of

# In every panel colour says the depth: main head, 1, 2, ... (Okabe and Ito, for the colour-blind)
COLORS = ("#1a1a1a", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "#8c8c8c"
FLOORS = ("unigram", "bigram", "trigram")
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}


@matplotlib.rc_context(STYLE)
def plot_run(metrics: Sequence[Record], out: Path, *, config: Config) -> None:
    """Draw the curves of one run (records of metrics.jsonl) into the PNG file `out`.

    config: the run's, of its last start.
    """
    train = [record for record in metrics if "train/loss" in record]
    val = [record for record in metrics if "val/main_loss" in record]
    figure, axes = _figure(config.run.name)
    _losses(axes[0], train, val)
    _accuracies(axes[1], train, val)
    _schedules(axes[2], train, config)
    _health(axes[3], train)
    last = max((record["tokens"] for record in metrics), default=1)
    for ax in axes:
        _token_axis(ax, last)
    depths = [depth for _, depth in _depth_keys([*train, *val], "train/mtp_loss", "val/mtp_loss")]
    names = {0: "main head"} | {depth: f"MTP depth {depth}" for depth in sorted(set(depths))}
    handles = [Line2D([], [], color=_color(n), label=name) for n, name in names.items()]
    handles.append(Line2D([], [], color=GREY, label="training"))
    handles.append(Line2D([], [], color=GREY, linestyle="", marker="o", label="validation"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    save_figure(figure, out)


@matplotlib.rc_context(STYLE)
def plot_schedules(config: Config, out: Path) -> None:
    """Draw lr, MTP weights, bias speed and batch size over a run into the PNG file `out`."""
    figure, axes = _figure(f"{config.run.name}: schedules")
    axes[0].set_title("learning rate")
    _scheduled(axes[0], config, lambda p: schedules.learning_rate(config.optim, p), color="#0072b2")
    _loss_weights(axes[1], config)
    if depths := config.mtp.depths:
        figure.legend(handles=axes[1].lines, loc="outside lower center", ncols=1 + depths)
    axes[2].set_title("router bias update speed")
    train, micro = config.train, config.train.micro_batch_size
    _scheduled(axes[2], config, lambda p: schedules.bias_update_speed(train, p), color="#009e73")
    axes[3].set_title("batch size (sequences)")
    _scheduled(axes[3], config, lambda p: schedules.batch_size(train, p, micro), color="#cc79a7")
    axes[3].yaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes:
        ax.set_ylim(bottom=0.0)
        _token_axis(ax, config.train.total_tokens)
    save_figure(figure, out)


@matplotlib.rc_context(STYLE)
def plot_loss_weights(config: Config, out: Path) -> None:
    """Draw lambda and the factor of every depth over a run into the PNG file `out`."""
    figure = Figure(figsize=(6, 2.6), dpi=100, layout="constrained")
    ax = figure.subplots()
    _loss_weights(ax, config)
    ax.set_ylim(bottom=0.0)
    _token_axis(ax, config.train.total_tokens)
    ax.legend(handles=ax.lines)
    save_figure(figure, out)


def _scheduled(
    ax: Axes, config: Config, value: Callable[[float], float], *, until: float = 1.0, **style: Any
) -> list[Line2D]:
    """A schedule over the run. A value holds until the next one: a step is drawn as a step.

    until: progress at which the line ends.
    """
    progress = np.linspace(0.0, until, 1001)
    tokens = progress * config.train.total_tokens
    values = [value(p) for p in progress.tolist()]
    return ax.plot(tokens, values, drawstyle="steps-post", **style)


def _loss_weights(ax: Axes, config: Config) -> None:
    ax.set_title("MTP loss weights")
    if not config.mtp.depths:
        return
    weight = config.mtp.loss_weight
    grey: Any = {"color": "#c8c8c8", "linewidth": 5.0}
    _scheduled(ax, config, lambda p: schedules.mtp_loss_weight(weight, p), label="lambda", **grey)
    for depth in range(1, config.mtp.depths + 1):

        def factor(progress: float, depth: int = depth) -> float:
            return schedules.depth_loss_weights(config.mtp, progress)[depth - 1]

        # equal weights stay visible under one another
        width = 1.6 + 2.6 * (config.mtp.depths - depth)
        style: Any = {"color": _color(depth), "linewidth": width, "label": f"depth {depth}"}
        _scheduled(ax, config, factor, **style)


def _losses(ax: Axes, train: Sequence[Record], val: Sequence[Record]) -> None:
    ax.set_title("loss (nats per token)")
    ax.plot(*_series(train, "train/main_loss"), color=_color(0), alpha=0.2, linewidth=1)
    for key, depth in [("train/main_loss", 0), *_depth_keys(train, "train/mtp_loss")]:
        tokens, values = _series(train, key)
        _line(ax, tokens, _smooth(values), color=_color(depth))
    for key, depth in [("val/main_loss", 0), *_depth_keys(val, "val/mtp_loss")]:
        _markers(ax, *_series(val, key), depth)
    for name, floor in floors_of(val).items():
        floor_line(ax, name, floor)


def floors_of(val: Sequence[Record]) -> dict[str, float]:
    """The n-gram floors in the records of validations: order -> nats per token, of the last one."""
    last = next((record for record in reversed(val) if "val/floor/trigram" in record), {})
    return {name: last[f"val/floor/{name}"] for name in FLOORS if f"val/floor/{name}" in last}


def floor_line(ax: Axes, name: str, floor: float, *, color: str = GREY) -> None:
    """What a table of the training tokens reaches: a dotted line with its name."""
    ax.axhline(floor, color=color, linestyle=":", linewidth=1.2)
    place: dict[str, Any] = {"xy": (0.995, floor), "xycoords": ax.get_yaxis_transform()}
    ax.annotate(name, **place, ha="right", va="bottom", fontsize=8, color=color)


def _accuracies(ax: Axes, train: Sequence[Record], val: Sequence[Record]) -> None:
    ax.set_title("teacher-forced accuracy")
    for name, linestyle, marker in (("top1", "-", "o"), ("agreement", "--", "^")):
        for key, depth in _depth_keys(train, f"train/{name}"):
            tokens, values = _series(train, key)
            _line(ax, tokens, _smooth(values), color=_color(depth), linestyle=linestyle)
        for key, depth in _depth_keys(val, f"val/{name}"):
            _markers(ax, *_series(val, key), depth, marker)
    ax.set_ylim(bottom=0.0)
    grey: Any = {"color": GREY, "markersize": 5}
    joint = Line2D([], [], linestyle="--", marker="^", label="joint agreement", **grey)
    _legend_above(ax, [Line2D([], [], marker="o", label="top-1", **grey), joint])


def _schedules(ax: Axes, train: Sequence[Record], config: Config) -> None:
    ax.set_title("schedules")
    handles = _line(ax, *_series(train, "optim/lr"), color="#0072b2", label="learning rate")
    if any("train/mtp_weight" in record for record in train):
        twin = _twin(ax)
        handles += _used_weight(twin, train, config)
        twin.set_ylim(bottom=0.0)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_ylim(bottom=0.0)
    _legend_above(ax, handles)


def _used_weight(ax: Axes, train: Sequence[Record], config: Config) -> list[Line2D]:
    """lambda up to the last record. Records can be far apart, and only the schedule says where
    between two of them it jumps. It cannot say so if it has a state, or if it gives other values
    than the records, as after a start with another schedule: then the records are joined.
    """
    style: Any = {"color": "#d55e00", "linestyle": "--", "label": "MTP loss weight (right)"}
    weight, total = config.mtp.loss_weight, config.train.total_tokens

    def scheduled(progress: float) -> float:
        return schedules.mtp_loss_weight(weight, progress)

    def before(record: Record) -> float:  # progress before the record's step, which had this weight
        step = record["train/batch_size"] * config.data.seq_len
        return min(max(0.0, (record["tokens"] - step) / total), 1.0)

    stateless = schedules.first_state(config.mtp) is None
    if stateless and all(scheduled(before(r)) == r["train/mtp_weight"] for r in train):
        until = min(train[-1]["tokens"] / total, 1.0)
        return _scheduled(ax, config, scheduled, until=until, **style)
    return _line(ax, *_series(train, "train/mtp_weight"), drawstyle="steps-pre", **style)


def _health(ax: Axes, train: Sequence[Record]) -> None:
    ax.set_title("health")
    twin = _twin(ax)
    handles = []
    for key, label, color in (
        ("optim/grad_norm", "gradient norm", "#cc79a7"),
        ("moe/max_violation", "load violation", "#009e73"),
    ):
        handles += _line(ax, *_series(train, key), color=color, linewidth=1.2, label=label)
    style: Any = {"color": GREY, "linestyle": "--", "linewidth": 1.2}
    handles += _line(twin, *_series(train, "perf/tokens_per_s"), label="tokens/s (right)", **style)
    twin.yaxis.set_major_formatter(lambda value, _: short_number(value))
    ax.set_ylim(bottom=0.0)
    twin.set_ylim(bottom=0.0)
    _legend_above(ax, handles)


def _series(records: Sequence[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values of the records that have `key`; null becomes a gap."""
    points = [(record["tokens"], record[key]) for record in records if key in record]
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of the finite values in a centred window of a twentieth, narrower at the ends."""
    length, known = len(values), np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(length)
    half = np.minimum(length // 40, np.minimum(index, length - 1 - index))
    first, last = index - half, index + half + 1
    count = counts[last] - counts[first]
    return np.where(count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), np.nan)


def _depth_keys(records: Sequence[Record], *prefixes: str) -> list[tuple[str, int]]:
    """(key, depth) of every per-depth metric named PREFIX/depth that occurs in the records."""
    found = {
        (f"{prefix}/{d}", d) for r in records for prefix in prefixes for d in depths_of(r, prefix)
    }
    return sorted(found, key=lambda item: (item[1], item[0]))


def _color(depth: int) -> str:
    return COLORS[depth % len(COLORS)]


def _line(ax: Axes, tokens: np.ndarray, values: np.ndarray, **style: Any) -> list[Line2D]:
    # A line through one point is invisible.
    return ax.plot(tokens, values, marker="." if len(tokens) == 1 else "", **style)


def _markers(
    ax: Axes, tokens: np.ndarray, values: np.ndarray, depth: int, marker: str = "o"
) -> None:
    """Points without a line, at most sixteen, the last one among them."""
    every = -(-len(tokens) // 16) or 1
    shown = slice((len(tokens) - 1) % every, None, every)
    style: Any = {"color": _color(depth), "linestyle": "", "marker": marker, "markersize": 5.5}
    style |= {"markeredgecolor": "white", "markeredgewidth": 0.8, "zorder": 3}
    ax.plot(tokens[shown], values[shown], **style)


def _figure(title: str) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(12, 8), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    figure.suptitle(title, fontsize=13)
    return figure, list(figure.subplots(2, 2).flat)


def _twin(ax: Axes) -> Axes:
    twin = ax.twinx()
    twin.grid(False)
    twin.spines["right"].set_visible(True)
    return twin


def _legend_above(ax: Axes, handles: list[Line2D]) -> None:
    """A one-row legend at the right of the title's row, outside the data."""
    place: Any = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.985), "borderaxespad": 0.0}
    ax.legend(handles=handles, ncols=len(handles), columnspacing=1.2, handlelength=1.8, **place)


def _token_axis(ax: Axes, last: float) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(7))
    ax.xaxis.set_major_formatter(lambda value, _: short_number(value))
    ax.set_xlim(0, last * 1.01)
    ax.set_xlabel("tokens")


def short_number(value: float) -> str:
    """A tick label: 0, 500k, 1.5M, 14.8T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def save_figure(figure: Figure, out: Path) -> None:
    """PNG, atomically."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png")
