"""metrics.jsonl survives kills and resumes; lines show what is logged; the clock counts training
only.
"""

import json
import math
import random
from pathlib import Path

import pytest

from dsv3_mtp.files.atomic import replacing
from dsv3_mtp.report.metrics import Clock, MetricsLog, mfu, peak_flops, read_metrics
from tests.report.test_progress import TRAIN, VAL


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
    for record in (
        {"step": 1, "a": 1},
        {"step": 2, "a": 1},
        {"step": 2, "b": 1},
        {"step": 3, "a": 1},
    ):
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


FULL = "/dev/full"  # a disk without room


@pytest.mark.skipif(not Path(FULL).exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_with_the_name_of_the_file(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.symlink_to(FULL)
    with pytest.raises(OSError, match=r"No space left on device: '.*/metrics\.jsonl'"):
        log.append({"step": 1})
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/file'"),
        replacing(tmp_path / "file") as temporary,
    ):
        temporary.symlink_to(FULL)
        temporary.write_text("whole")


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
