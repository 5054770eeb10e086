"""Measuring: calls take turns, memory is what a call holds, the limits of a machine count bytes and operations."""

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from eval.shared import machine


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.choose_device("auto") == "cpu"
    with pytest.raises(ValueError, match="--device"):
        machine.choose_device("cuda")


# Measuring -----------------------------------------------------------------------------------------------------------


def fake_clock(monkeypatch, costs):
    """A clock by which the call ``name`` takes costs[name] s; returns (calls, the list of names as they run)."""
    ran = []
    monkeypatch.setattr(machine, "timed", lambda call, device: costs[call()])
    return {name: lambda name=name: ran.append(name) or name for name in costs}, ran


def test_calls_take_turns_in_bursts(monkeypatch):
    calls, ran = fake_clock(monkeypatch, {"a": 0.011, "b": 0.021, "c": 0.001})
    times = machine.interleaved_times(calls, seconds=1.9, device="cpu")  # a turn 0.127 s: 10, 6, 10 calls; 7 rounds
    assert {name: len(values) for name, values in times.items()} == {"a": 7 * 9, "b": 7 * 5, "c": 7 * 9}
    assert times["b"] == [0.021] * 35 and len(ran) == 3 + 7 * 26
    rounds = [[name for name, _ in itertools.groupby(ran[3 + 26 * n : 29 + 26 * n])] for n in range(7)]
    assert all(sorted(turns) == ["a", "b", "c"] for turns in rounds)
    assert len(set(map(tuple, rounds))) > 2  # in many orders


@pytest.mark.parametrize(("seconds", "calls_each"), [(0.001, 5), (1000, 200 * 9)])
def test_repeats_have_bounds(monkeypatch, seconds, calls_each):
    calls, _ = fake_clock(monkeypatch, {"a": 0.01, "b": 0.02})
    times = machine.interleaved_times(calls, seconds=seconds, device="cpu")
    assert [len(values) for values in times.values()] == [calls_each, calls_each]


def test_slow_calls_are_repeated_less_and_spread_out(monkeypatch):
    calls, ran = fake_clock(monkeypatch, {"slow": 2.0, "fast": 0.11})
    times = machine.interleaved_times(calls, seconds=7.4, device="cpu")
    assert len(times["slow"]) == 3 and len(times["fast"]) == 5 * 5
    assert [name for name in ran[2:] if name == "slow"] == ["slow"] * 3 and "slow" not in ran[2:5]
    calls, _ = fake_clock(monkeypatch, {"slow": 2.0})
    assert len(machine.interleaved_times(calls, seconds=1, device="cpu")["slow"]) == 3


def test_rows_are_medians_and_ratios_of_them(monkeypatch):
    calls, ran = fake_clock(monkeypatch, {"a": 0.01, "b": 0.02})
    times = {"a": [0.3, 0.1, 0.2], "b": [0.1, 0.1, 0.4, 0.1]}
    monkeypatch.setattr(machine, "interleaved_times", lambda calls, seconds, device: times)
    monkeypatch.setattr(machine, "peak_memory", lambda call, device: {"a": 3e6, "b": None}[call()])
    one, other, missing = machine.compare(calls, {"c": "why"}, baseline="a", seconds=1, device="cpu")
    known = {"ms": 200, "ratio": 1, "repeats": 3, "memory_mb": 3, "note": None}
    assert one == {"method": "a", **{key: pytest.approx(value) for key, value in known.items()}}
    assert other == {"method": "b", "ms": pytest.approx(100), "ratio": pytest.approx(2), "repeats": 4, "memory_mb": None, "note": None}  # fmt: skip  # noqa: E501
    assert missing == {"method": "c", "ms": None, "ratio": None, "repeats": 0, "memory_mb": None, "note": "why"}
    assert ran[:2] == ["a", "b"]  # warm-up
    assert all(row["ratio"] is None for row in machine.compare(calls, {}, baseline="c", seconds=1, device="cpu"))


def test_time_is_that_of_the_call():
    assert 0.05 <= machine.timed(lambda: time.sleep(0.05), "cpu") < 1


@pytest.mark.skipif(machine.peak_memory(lambda: None, "cpu") is None, reason="the kernel does not tell")
@pytest.mark.parametrize("make", [lambda n: torch.ones(n, dtype=torch.uint8), lambda n: np.ones(n, np.uint8)])
def test_peak_memory_sees_what_a_call_holds_at_most(make):
    megabytes = 2**20
    for size in (8, 40):

        def call(size=size):
            both = make(size * megabytes), make(size * megabytes // 2)
            return int(both[0][0])  # at the end nothing is left

        for _ in range(2):  # freed memory that is used again counts as well
            call()
            beyond = machine.peak_memory(call, "cpu") / megabytes - 1.5 * size
            assert -1 < beyond < 4.5  # each of the two arrays may end within a huge page of 2 MiB


def test_peak_memory_admits_that_it_does_not_know(monkeypatch):
    monkeypatch.setattr(machine, "_proc_bytes", lambda path, key: None)
    assert machine.peak_memory(lambda: None, "cpu") is None and machine.free_memory("cpu") is None
    monkeypatch.setattr(machine, "_proc_bytes", lambda path, key: {"VmRSS": 10, "VmHWM": 2**30}[key])  # not reset
    assert machine.peak_memory(lambda: None, "cpu") is None


def test_what_children_hold_counts(monkeypatch):
    if machine.resident_memory() is None:
        pytest.skip("the kernel does not tell")
    before = machine.resident_memory()
    child = subprocess.Popen([sys.executable, "-c", "x = bytearray(b'1' * 50_000_000); print(); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip  # noqa: E501
    child.stdout.readline()
    held = machine.resident_memory() - before
    child.communicate(b"\n")
    assert 45e6 < held < 150e6


def test_limits_count_bytes_and_operations(monkeypatch):
    monkeypatch.setattr(machine, "timed", lambda call, device: call() is None or 0.5)
    assert machine.read_bandwidth("cpu") == 2 * 2**30
    assert machine.multiply_rate("cpu", torch.bfloat16) == 2 * 2 * 2048**3
