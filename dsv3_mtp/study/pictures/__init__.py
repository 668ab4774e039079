"""The figures of a study's report. Each arm keeps its colour and its marker."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from dsv3_mtp.report.plots import STYLE, save_figure
from dsv3_mtp.study.matrix import Study
from dsv3_mtp.study.metric_names import is_rate_over_seeds
from dsv3_mtp.study.pictures import outcome, training
from dsv3_mtp.study.pictures.base import PictureData


def draw_all(data: PictureData, folder: Path) -> list[tuple[str, str]]:
    """Writes the PNG files that the data allow, and removes others of these names.

    Returns [(file, caption)], the answer's first.
    """
    drawn = []
    for name, (draw, caption) in figures(data.study).items():
        with matplotlib.rc_context(STYLE):
            figure = draw(data)
            if figure is None:
                (folder / name).unlink(missing_ok=True)
            else:
                save_figure(figure, folder / name)
                drawn.append((name, caption))
    return drawn


def figures(study: Study) -> dict[str, tuple[Callable[[PictureData], Figure | None], str]]:
    """File -> (how it is drawn, caption)."""
    against = study.comparisons[study.primary.comparison].against
    rate = is_rate_over_seeds(study.primary.metric)
    answer = (
        "Share of seeds that solved the task, with Clopper and Pearson's exact interval."
        if rate
        else "The primary comparison: paired differences, one small dot per seed, and their 95 % t "
        "intervals; an interval that covers 0 is no detectable difference. Grey: the margin within "
        "which a difference would not matter. Open diamond: what was expected."
    )
    return {
        "answer.png": (outcome.draw_answer, answer),
        "loss.png": (
            training.draw_losses,
            f"Left: main validation loss of {against} over training, beside n-gram floors where "
            "they were measured. Right, unless all are equal: each arm's main loss minus that of "
            f"{against}, mean over paired seeds, with the 95 % t interval at the end; below 0 is "
            "better.",
        ),
        "effects.png": (
            outcome.draw_effects,
            "Exploratory comparisons: paired differences with 95 % t intervals over seeds.",
        ),
        "depths.png": (
            outcome.draw_depths,
            "Per depth, mean over seeds with 95 % t intervals. Losses of heads that see other "
            "tokens must not be ranked against each other.",
        ),
        "tradeoff.png": (
            outcome.draw_tradeoff,
            "Quality against drafting: main loss and tokens per step, free-running; small marks "
            "are seeds, large ones means. Better is to the lower right. Lines: arms that do not "
            "draft.",
        ),
        "lambda.png": (
            training.draw_lambda,
            "The loss weight lambda over training, of the arms that differ in it.",
        ),
        "balance.png": (
            training.draw_balance,
            "MaxVio, the load of the busiest expert above the mean, over training; lower is "
            "better.",
        ),
        "loss_error.png": (
            training.draw_loss_errors,
            f"Training losses relative to those of {study.loss_error_against}, smoothed with EMA "
            "0.9 (V3 B.1): mean over seeds, band from the lowest to the highest seed; the grey "
            "band is +-0.25 %, V3's bound.",
        ),
        "solved.png": (
            outcome.draw_solved,
            "Share of seeds that have not solved the task yet (Kaplan and Meier); runs that end "
            "unsolved are censored. Lower, sooner is better.",
        ),
    }
