"""Ranks and their launchers."""

import multiprocessing
import time

from dsv3_mtp.parallel.launch import StopRequest

FORK = multiprocessing.get_context("fork")


def rank(answers) -> None:
    stop, deadline = StopRequest(), time.monotonic() + 20
    answers.send(bool(stop))
    while not stop and time.monotonic() < deadline:
        time.sleep(0.01)
    answers.send(stop.reason)


def launcher(answers) -> None:
    FORK.Process(target=rank, args=(answers,)).start()
    time.sleep(60)


def test_a_rank_whose_torchrun_was_killed_asks_to_stop(monkeypatch):
    """It would otherwise train on as an orphan, and hold the run folder."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    here, there = FORK.Pipe()
    torchrun = FORK.Process(target=launcher, args=(there,))
    torchrun.start()
    assert here.poll(20) and here.recv() is False
    torchrun.kill()
    assert here.poll(20) and here.recv() == "the end of its launcher"
