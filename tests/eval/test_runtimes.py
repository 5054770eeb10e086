"""python -m eval.speed runtimes: four runtimes of one policy give the same chunks and are told apart by their times."""

import functools
import json

import pytest
import tiny
import torch

from eval.speed import __main__ as speed
from eval.speed import runtimes
from policy.build import build_model

RUNTIMES = ["ours", "torch", "torch.compile", "onnxruntime"]


@pytest.mark.slow
def test_all_runtimes_give_the_same_chunks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # else it takes a minute
    config = tiny.policy_config(images=True, relative=True)
    path = tiny.save(tmp_path / "policy.safetensors", build_model(config), config)
    options = ["--checkpoint", str(path), "--sampler", "ddpm:3", "--batches", "2", "1"]
    speed.main(["runtimes", *options, "--seconds", "0.1", "--output", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "runtimes.json").read_text())["rows"]
    expected = [(batch, part, name) for batch in (1, 2) for part in ("step", "whole") for name in RUNTIMES]
    assert [(row["batch"], row["part"], row["runtime"]) for row in rows] == expected
    for row in rows:
        assert row["deviation"] < 1e-4 and row["ms_half"][0] <= row["ms"] <= row["ms_half"][1] and row["cpu_ms"] > 0
        assert (row["ratio"] == row["cpu_ratio"] == 1) == (row["runtime"] == "ours")
    assert (tmp_path / "out" / "runtimes.md").read_text() in capsys.readouterr().out


def test_times_are_compared_with_ours(monkeypatch):
    """By the clock 4 against 2 ms, by processor time 9 against 3 ms."""
    wall, processor = {"ours": [0.002] * 4, "torch": [0.004] * 4}, {"ours": [0.003], "torch": [0.009]}
    times = iter([wall, processor])
    monkeypatch.setattr(runtimes, "interleaved_times", lambda calls, **options: next(times))
    ours, other = runtimes.compare_times({"ours": None, "torch": None}, 1)
    assert (ours["ms"], ours["cpu_ms"], ours["ratio"]) == (pytest.approx(2), pytest.approx(3), 1)
    assert (other["ratio"], other["cpu_ratio"]) == (pytest.approx(2), pytest.approx(3))


@pytest.mark.parametrize(
    ("option", "value"), [("--batches", "0"), ("--sampler", "euler:3"), ("--device", "tpu"), ("--seconds", "0")]
)
def test_wrong_options(option, value, capsys):
    with pytest.raises(SystemExit):
        speed.main(["runtimes", option, value])
    assert option in capsys.readouterr().err


def test_more_rows_than_the_kernels_take_are_refused(capsys):
    with pytest.raises(SystemExit):
        speed.main(["runtimes", "--batches", "1", "1000"])
    assert "--batches" in capsys.readouterr().err
