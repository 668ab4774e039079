"""The lines of a run show what is logged; a terminal gets a live bar."""

import io
import math

import pytest

from dsv3_mtp.report.progress import (
    WIDTH,
    Progress,
    duration,
    fit,
    quantity,
    train_line,
    validation_line,
)

TRAIN = {
    "step": 120,
    "tokens": 491_520,
    "progress": 0.0819,
    "time_s": 50.0,
    "train/loss": 3.4123,
    "train/main_loss": 3.1009,
    "train/mtp_loss/1": 3.118,
    "train/mtp_weight": 0.3,
    "train/agreement/1": 0.41,
    "optim/lr": 2.7e-3,
    "optim/grad_norm": 0.82,
    "perf/tokens_per_s": 9840.0,
}
VAL = {
    "step": 200,
    "val/main_loss": 3.01,
    "val/bits_per_byte": 1.23,
    "val/mtp_loss/1": 3.104,
    "val/top1/0": 0.41,
    "val/top1/1": 0.36,
    "val/agreement/1": 0.47,
    "val/overlap/1": 0.62,
    "val/overlap/tokens_per_step": 1.62,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_train_line():
    assert train_line(TRAIN, total_steps=1465, eta_s=72.4) == (
        "step  120/1465 | main 3.101 mtp 3.118 w 0.300 agr 0.41 | lr 2.7e-3 gn 0.82 "
        "| 9.84k tok/s | eta 0:01:12"
    )


def test_train_line_has_every_depth_in_order_and_what_is_known_of_a_gpu():
    depths = {f"train/mtp_loss/{k}": float(k) for k in (10, 2, 1)} | {
        f"train/agreement/{k}": 0.5 for k in (1, 2)
    }
    gpu = {"perf/mfu": 0.4123, "perf/peak_gib": 63.14}
    line = train_line({**TRAIN, **depths, **gpu}, total_steps=1465, eta_s=None)
    assert "mtp 1.000 2.000 10.000 w 0.300 agr 0.50 0.50 |" in line
    assert "tok/s mfu 41.2% mem 63.1 GiB | eta -" in line


def test_no_line_is_wider_than_a_terminal_and_nothing_is_left_out():
    fields = ["a" * 60, "b" * 37, "c" * 10, "d" * 120, "e"]
    lines = fit(" | ".join(fields)).splitlines()
    assert [len(line) for line in lines] == [WIDTH, 16, 126, 7]
    assert [part.strip() for line in lines for part in line.strip(" |").split(" | ")] == fields


def test_lines_of_a_run_without_mtp_do_not_mention_it():
    record = {
        key: value for key, value in TRAIN.items() if "mtp" not in key and "agreement" not in key
    }
    assert "| main 3.101 | lr" in train_line(record, total_steps=1465, eta_s=1.0)
    line = validation_line({"step": 5, "val/main_loss": 3.0, "val/top1/0": 0.4}, total_steps=10)
    assert line == "val  step  5 | main 3.000 | top1 0.40"


def test_validation_line():
    assert validation_line(VAL, total_steps=1465) == (
        "val  step  200 | main 3.010 (bpb 1.230) mtp 3.104 | top1 0.41 0.36 | agreement 0.47 "
        "| overlap 0.62"
    )


def test_a_diverged_run_still_has_a_line():
    record = {**TRAIN, "train/main_loss": math.nan, "optim/grad_norm": math.inf}
    assert "main nan" in (line := train_line(record, total_steps=10, eta_s=math.inf))
    assert "gn inf" in line and line.endswith("eta -")


def show(stream):
    with Progress(1_000_000, total_steps=1465, stream=stream) as progress:
        progress.say("resumed [from] step 110")
        progress.advance(step=120, tokens=491_520, eta_s=72.0)
        progress.train(TRAIN, eta_s=72.0)
        progress.validation(VAL)
    return stream.getvalue()


def test_without_a_terminal_the_output_is_exactly_the_lines():
    lines = show(io.StringIO()).splitlines()
    expected = [
        train_line(TRAIN, total_steps=1465, eta_s=72.0),
        validation_line(VAL, total_steps=1465),
    ]
    assert lines == ["resumed [from] step 110", *expected]


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_terminal_that_asks_for_plain_text_gets_no_control_characters(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert "\x1b" not in show(Terminal())


def test_a_terminal_gets_a_live_bar_and_the_same_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    output = show(Terminal())
    assert "\x1b[" in output
    assert "49%" in output and "step 120/1465" in output
    assert "resumed [from] step 110" in output
    for line in fit(train_line(TRAIN, total_steps=1465, eta_s=72.0)).splitlines():
        assert line in output


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.6, "0:01:00"),
        (3661, "1:01:01"),
        (86400 + 3661, "1d 01:01:01"),
        (None, "-"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1.00k"),
        (9840, "9.84k"),
        (98_400, "98.4k"),
        (999_999, "1.00M"),
        (14.8e12, "14.8T"),
    ],
)
def test_quantity_has_three_digits_and_a_unit(value, text):
    assert quantity(value) == text


def test_a_silent_display_shows_nothing():
    stream = io.StringIO()
    with Progress(100, total_steps=10, stream=stream, silent=True) as display:
        display.train(TRAIN, eta_s=1.0)
        display.advance(step=1, tokens=10, eta_s=1.0)
    assert stream.getvalue() == ""
