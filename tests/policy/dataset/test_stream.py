"""Batches that worker processes make ahead: their order, their errors, their signals and their ends."""

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT

from policy.dataset.stream import GRACE, seed_generators, stream_batches


def test_seeds_reach_all_generators():
    def draws(seed, index):
        seed_generators(seed, index)
        return random.random(), np.random.random(), torch.rand(()).item()

    first = draws(1, 2)
    assert draws(1, 2) == first
    for other in (draws(2, 2), draws(1, 3), draws(2, 1)):
        assert all(a != b for a, b in zip(first, other, strict=True))
    assert len(set(first)) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_requests_are_taken_as_needed_and_answered_in_order(workers):
    def slow_first(request):
        time.sleep(0.3 if request == 0 else 0)
        return {"request": request, "process": os.getpid(), "threads": torch.get_num_threads()}

    torch.set_num_threads(2)
    try:
        stream = stream_batches(slow_first, itertools.count(), workers=workers)
        answers = list(itertools.islice(stream, 8))
        stream.close()
    finally:
        torch.set_num_threads(1)
    assert [answer["request"] for answer in answers] == list(range(8))
    assert len({answer["process"] for answer in answers} - {os.getpid()}) == workers
    assert {answer["threads"] for answer in answers} == {1 if workers else 2}
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_an_error_arrives_as_it_was_raised(workers, kind):
    def fail_at_two(request):
        if request == 2:
            raise kind("image: got nothing")
        return request

    stream = stream_batches(fail_at_two, itertools.count(), workers=workers)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(kind) as error:
        next(stream)
    assert str(error.value) == "image: got nothing"


def test_signals_to_all_processes_leave_the_workers_at_work():
    stream = stream_batches(lambda request: request, itertools.count(), workers=1)
    assert next(stream) == 0
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert [next(stream) for _ in range(9)] == list(range(1, 10))
    started = time.monotonic()
    stream.close()
    assert not worker.is_alive()
    assert time.monotonic() - started < GRACE / 2


def test_workers_end_some_time_after_a_sigterm(monkeypatch):
    """One that is not asked to end in any other way, as where the main process hangs."""
    monkeypatch.setattr("policy.dataset.stream.GRACE", 1)
    stream = stream_batches(lambda request: request, itertools.count(), workers=1)
    next(stream)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    with pytest.raises(RuntimeError, match="worker"):
        for _ in range(100):
            time.sleep(0.1)
            next(stream)
    assert not worker.is_alive()


def test_workers_end_with_a_killed_parent():
    program = (
        "import itertools, os\n"
        "from policy.dataset.stream import stream_batches\n"
        "stream = stream_batches(lambda request: os.getpid(), itertools.count(), workers=2)\n"
        "print(next(stream), next(stream), flush=True)\n"
        "input()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, **pipes)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(set(workers)) == 2
    assert all(is_running(pid) for pid in workers)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in workers)


def is_running(pid):
    """Whether process ``pid`` is there and no zombie, which nobody may wait for in a container."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
