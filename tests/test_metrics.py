"""metrics.jsonl survives kills and resumes; lines show what is logged; the clock counts training only."""

import io
import json
import math
import random

import pytest

from dsv3_mtp.metrics import (
    Clock,
    MetricsLog,
    Progress,
    duration,
    mfu,
    peak_flops,
    quantity,
    read_metrics,
    replacing,
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
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


class FakeTime:
    def __init__(self):
        self.value = 1000.0

    def __call__(self):
        return self.value


def test_records_come_back_as_they_were_written(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.append(TRAIN)
    log.append(VAL)
    assert read_metrics(log.path) == [TRAIN, VAL]


def test_non_finite_numbers_are_valid_json_and_come_back(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "nan": math.nan, "up": math.inf, "down": -math.inf, "unknown": None})
    json.loads(log.path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (record,) = read_metrics(log.path)
    assert math.isnan(record["nan"])
    assert (record["up"], record["down"], record["unknown"]) == (math.inf, -math.inf, None)


def test_a_value_that_is_no_scalar_is_refused_by_its_key(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(TypeError, match=r"train/loss: list .*\.item\(\)"):
        log.append({"step": 1, "train/loss": [1.0]})
    assert not log.path.exists()


def test_a_log_cut_off_anywhere_keeps_every_whole_line_and_can_be_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(4):
        log.append({"step": step, "value": step / 3})
    written = path.read_bytes()
    for length in range(len(written) + 1):
        path.write_bytes(written[:length])
        whole = written[:length].count(b"\n")
        assert [record["step"] for record in read_metrics(path)] == list(range(whole))
        MetricsLog(path).append({"step": 99})
        assert [record["step"] for record in read_metrics(path)] == [*range(whole), 99]


def test_resuming_leaves_no_step_twice_and_none_out(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "metrics.jsonl"
    step = 0
    for _ in range(20):  # lives of one run, each killed at some point after its last checkpoint
        log = MetricsLog(path)
        log.truncate_after(step)
        reached = step + rng.randrange(1, 9)
        for later in range(step + 1, reached + 1):
            log.append({"step": later})
        step = rng.randrange(step, reached + 1)
    log.truncate_after(step)
    assert [record["step"] for record in read_metrics(path)] == list(range(1, step + 1))


def test_truncating_keeps_train_and_validation_of_the_resumed_step(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate_after(10)  # nothing there yet
    for record in ({"step": 1, "a": 1}, {"step": 2, "a": 1}, {"step": 2, "b": 1}, {"step": 3, "a": 1}):
        log.append(record)
    log.truncate_after(2)
    assert read_metrics(log.path) == [{"step": 1, "a": 1}, {"step": 2, "a": 1}, {"step": 2, "b": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("broken", ["{oops", "[1, 2]", ""])
def test_a_broken_line_in_the_middle_is_named(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_metrics(path)


def test_a_failed_rewrite_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_train_line():
    assert train_line(TRAIN, total_steps=1465, eta_s=72.4) == (
        "step  120/1465   8% | loss 3.412 main 3.101 mtp 3.118 (w 0.300) agr 0.41 | lr 2.7e-3 gn 0.82"
        " | 9.84k tok/s | eta 0:01:12"
    )


def test_train_line_has_every_depth_in_order_and_mfu_when_known():
    depths = {f"train/mtp_loss/{k}": float(k) for k in (10, 2, 1)} | {f"train/agreement/{k}": 0.5 for k in (1, 2)}
    line = train_line({**TRAIN, **depths, "perf/mfu": 0.4123}, total_steps=1465, eta_s=None)
    assert "mtp 1.000 2.000 10.000 (w 0.300) agr 0.50 0.50 |" in line
    assert "tok/s mfu 41.2% | eta -" in line


def test_lines_of_a_run_without_mtp_do_not_mention_it():
    record = {key: value for key, value in TRAIN.items() if "mtp" not in key and "agreement" not in key}
    assert "| loss 3.412 main 3.101 | lr" in train_line(record, total_steps=1465, eta_s=1.0)
    line = validation_line({"step": 5, "val/main_loss": 3.0, "val/top1/0": 0.4}, total_steps=10)
    assert line == "val   step  5 | main 3.000 | top1 0.40"


def test_validation_line():
    assert validation_line(VAL, total_steps=1465) == (
        "val   step  200 | main 3.010 (bpb 1.230) mtp 3.104 | top1 0.41 0.36 | agreement 0.47"
    )


def test_a_diverged_run_still_has_a_line():
    record = {**TRAIN, "train/loss": math.nan, "optim/grad_norm": math.inf}
    assert "loss nan" in (line := train_line(record, total_steps=10, eta_s=math.inf))
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
    expected = [train_line(TRAIN, total_steps=1465, eta_s=72.0), validation_line(VAL, total_steps=1465)]
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
    assert train_line(TRAIN, total_steps=1465, eta_s=72.0) in output


def test_clock_leaves_out_pauses_and_goes_on_after_a_restart():
    now = FakeTime()
    clock = Clock(now=now)
    clock.start()
    now.value += 10
    with clock.paused():
        now.value += 100
    now.value += 5
    assert clock.seconds == pytest.approx(15)
    resumed = Clock(now=now)
    resumed.load_state_dict(clock.state_dict())
    now.value += 1000  # start-up is not training
    resumed.start(tokens=3000)
    now.value += 2
    assert resumed.seconds == pytest.approx(17)
    assert resumed.lap(3500) == pytest.approx(250)


def test_lap_is_the_speed_since_the_last_lap_without_pauses():
    now = FakeTime()
    clock = Clock(now=now)
    clock.start()
    now.value += 10
    assert clock.lap(1000) == pytest.approx(100)
    now.value += 1
    with clock.paused():
        now.value += 50
    now.value += 1
    assert clock.lap(1400) == pytest.approx(200)


def test_a_pause_ends_when_what_is_inside_fails():
    now = FakeTime()
    clock = Clock(now=now)
    clock.start()
    with pytest.raises(RuntimeError), clock.paused():
        raise RuntimeError
    now.value += 3
    assert clock.seconds == pytest.approx(3)


def test_eta_follows_recent_speed_and_includes_pauses():
    now = FakeTime()
    clock = Clock(now=now, window=2)
    clock.start()
    assert clock.eta(100) is None
    now.value += 1000  # a slow first lap, forgotten after two more
    clock.lap(100)
    assert clock.eta(100) == pytest.approx(1000)
    for tokens in (200, 300):
        now.value += 5
        with clock.paused():
            now.value += 5
        clock.lap(tokens)
    assert clock.eta(100) == pytest.approx(10)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_peak_flops_of_known_devices(name, tflops):
    assert peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["AMD EPYC 9B14", "NVIDIA RTX A1000", "cpu", ""])
def test_peak_of_another_device_is_unknown_and_so_is_mfu(name):
    assert peak_flops(name) is None
    assert mfu(1e4, 1e9, name, 1) is None


def test_mfu_is_used_over_possible_flops():
    assert mfu(2e6, 1e9, "NVIDIA A100-SXM4-80GB", 16) == pytest.approx(2e15 / (16 * 312e12))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (86400 + 3661, "1d 01:01:01"), (None, "-")],
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
