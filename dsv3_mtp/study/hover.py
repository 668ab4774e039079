"""Figures of the HTML page that answer to the pointer: hover values, arms to switch off.

Drawn by Bokeh, whose script (1.3 MB) is put into the page: no network. Without that package
(pip install 'dsv3_mtp[report]') the page has the PNG files, and says so.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dsv3_mtp.study.findings import LOSS, paired, values_of
from dsv3_mtp.study.metric_names import describe_metric, is_rate_over_seeds
from dsv3_mtp.study.page import Live
from dsv3_mtp.study.pictures.base import PictureData, Series

SHAPES = {  # matplotlib's marker -> Bokeh's
    "o": "circle", "s": "square", "D": "diamond", "^": "triangle", "v": "inverted_triangle",
    "P": "plus", "X": "x", "<": "hex", ">": "star", "*": "asterisk", "h": "hex", "p": "square_pin",
    "d": "diamond_dot",
}  # fmt: skip
FILTER = """
for (const box of document.querySelectorAll('#arms input')) box.addEventListener('change', () => {
  for (const doc of Bokeh.documents) for (const root of doc.roots()) for (const part of
  root.references())
    if (part.name === box.value) part.visible = box.checked;
});
"""


def live(data: PictureData) -> Live:
    """The live parts of a report's page; without Bokeh a sentence."""
    if importlib.util.find_spec("bokeh") is None:
        needed = "hover values and arms to switch off need pip install 'dsv3_mtp[report]'"
        return Live(controls=f"<p>Pictures only: {needed}.</p>")
    from bokeh.embed import components
    from bokeh.resources import Resources

    drawn = {file: figure for file, make in FIGURES.items() if (figure := make(data)) is not None}
    script, elements = components(drawn)
    library = Resources(mode="inline", components=["bokeh"]).render_js()
    return Live(f"{library}\n{script}", _arm_boxes(data), elements)


def _arm_boxes(data: PictureData) -> str:
    """Check boxes that hide an arm that has been run in every figure of the page."""
    boxes = "".join(
        f'<label style="color:{color}"><input type="checkbox" value="{arm}" checked> {arm}</label>'
        for arm, color in data.colors.items()
        if data.table[arm]
    )
    return f'<fieldset id="arms"><legend>arms</legend>{boxes}</fieldset><script>{FILTER}</script>'


def _figure(**more: Any) -> Any:
    from bokeh.plotting import figure

    tools: Any = {"tools": "pan,box_zoom,reset,save", "active_drag": None}
    plot = figure(sizing_mode="stretch_width", toolbar_location="above", **tools, **more)
    plot.toolbar.logo = None
    return plot


def _hover(plot: Any, renderers: list[Any], rows: list[tuple[str, str]]) -> None:
    from bokeh.models import HoverTool

    plot.add_tools(HoverTool(renderers=renderers, tooltips=rows))


def _answer(data: PictureData) -> Any:
    if is_rate_over_seeds(data.study.primary.metric):
        return None  # shares of seeds, with intervals: the picture is as good
    from bokeh.models.annotations import BoxAnnotation, Span

    effects = [e for e in data.effects if e.primary and e.interval is not None]
    arms = [e.arm for e in effects]
    if not arms:
        return None
    plot = _figure(height=110 + 42 * len(arms), y_range=list(reversed(arms)))
    margin = data.study.primary.margin
    grey: Any = {"fill_color": "#8c8c8c", "fill_alpha": 0.15}
    plot.add_layout(BoxAnnotation(left=-margin, right=margin, **grey))
    plot.add_layout(Span(location=0, dimension="height", line_color="#8c8c8c"))
    marks = []
    for effect in effects:
        i, color = effect.interval, data.colors[effect.arm]
        assert i is not None
        low, high = (i.low, i.high) if i.n > 1 else (i.mean, i.mean)
        row = {"arm": effect.arm, "mean": i.mean, "n": i.n, "p": effect.adjusted_p}
        source = {key: [value] for key, value in (row | {"low": low, "high": high}).items()}
        look = {"color": color, "name": effect.arm}
        plot.segment("low", "arm", "high", "arm", source=source, line_width=3, **look)
        marker = SHAPES[data.markers[effect.arm]]
        marks.append(plot.scatter("mean", "arm", source=source, size=11, marker=marker, **look))
        each = list(paired(data.table, effect.arm, effect.against, effect.metric).values())
        below = [(effect.arm, -0.3)] * len(each)  # a little below the arm's line
        plot.scatter(each, below, size=4, alpha=0.7, **look)
        if effect.expected is not None:
            open_mark = {"fill_color": None, "line_color": "#1a1a1a", "name": effect.arm}
            plot.scatter([effect.expected], [effect.arm], marker="diamond", size=14, **open_mark)
    rows = [("arm", "@arm"), ("difference", "@mean{+0.0000}")]
    rows += [("95 %", "@low{+0.0000} .. @high{+0.0000}"), ("seeds", "@n")]
    _hover(plot, marks, [*rows, ("Holm p", "@p{0.0000}")])
    words, _ = describe_metric(data.study.primary.metric)
    plot.xaxis.axis_label = f"{words}: minus {data.reference}"
    return plot


def _curves(data: PictureData, found: Mapping[str, Series], label: str) -> Any:
    if not found:
        return None
    plot, marks = _figure(height=380), []
    for arm, (tokens, values, _) in found.items():
        rows = {"mean": values.mean(0), "low": values.min(0), "high": values.max(0)}
        columns = {name: x.tolist() for name, x in ({"tokens": tokens} | rows).items()}
        source = columns | {"arm": [arm] * len(tokens)}
        look = {"source": source, "color": data.colors[arm], "name": arm}
        plot.line("tokens", "mean", line_width=2, **look)
        shape = SHAPES[data.markers[arm]]
        marks.append(plot.scatter("tokens", "mean", size=6, marker=shape, **look))
    shown = [("arm", "@arm"), ("tokens", "@tokens{0,0}"), ("mean", "@mean{0.0000}")]
    _hover(plot, marks, [*shown, ("seeds", "@low{0.0000} .. @high{0.0000}")])
    plot.xaxis.axis_label, plot.yaxis.axis_label = "tokens", label
    plot.xaxis.formatter.use_scientific = False
    return plot


def _loss(data: PictureData) -> Any:
    from bokeh.layouts import column

    whole = _curves(data, data.curves(LOSS), "main validation loss")
    apart = {}
    for arm, (tokens, values, seeds) in data.over_reference().items():
        late = tokens >= tokens[-1] / 5
        apart[arm] = Series(tokens[late], values[:, late], seeds)
    parts = [plot for plot in (whole, _curves(data, apart, f"minus {data.reference}")) if plot]
    return column(*parts, sizing_mode="stretch_width") if parts else None


def _tradeoff(data: PictureData) -> Any:
    metric = next(
        (m for m in ("acceptance/T1/tokens_per_step", "acceptance/T0/tokens_per_step")
         if any(values_of(data.table, arm, m) for arm in data.colors)), None
    )  # fmt: skip
    if metric is None:
        return None
    plot, marks = _figure(height=380), []
    for arm, color in data.colors.items():
        loss, drafts = values_of(data.table, arm, LOSS), values_of(data.table, arm, metric)
        seeds = [seed for seed in drafts if seed in loss]
        if seeds:
            source: Any = {"drafts": [drafts[s] for s in seeds], "loss": [loss[s] for s in seeds]}
            source |= {"seed": [str(s) for s in seeds], "arm": [arm] * len(seeds)}
            look = {"color": color, "marker": SHAPES[data.markers[arm]], "name": arm}
            marks.append(plot.scatter("drafts", "loss", source=source, size=9, **look))
        elif loss:
            from bokeh.models.annotations import Span

            level = float(np.mean(list(loss.values())))
            plot.add_layout(Span(location=level, dimension="width", line_color=color, name=arm))
    _hover(plot, marks, [("arm", "@arm"), ("seed", "@seed"), ("tokens per step", "@drafts{0.000}"),
                         ("main loss", "@loss{0.0000}")])  # fmt: skip
    plot.xaxis.axis_label = describe_metric(metric)[0]
    plot.yaxis.axis_label = "main validation loss"
    return plot


FIGURES: dict[str, Callable[[PictureData], Any]] = {
    "answer.png": _answer,
    "loss.png": _loss,
    "tradeoff.png": _tradeoff,
}
