"""The speed command: what it compares is equal, what it reports follows from what it measured, its options work."""

import itertools
import json
import re
import subprocess
import sys
import time
from concurrent.futures import Future

import numpy as np
import pytest
import tiny
import torch
import zarr
from PIL import Image

from eval.shared import machine
from eval.speed import __main__ as speed
from eval.speed import attention as attention_speed
from eval.speed import encoder as encoder_speed
from eval.speed import load as load_speed
from eval.speed import sample as sample_speed
from eval.speed import train as train_speed
from eval.speed.attention import COLOURS, DIRECTIONS, attention_methods, flex_method, reference_errors
from policy.attention import fibottention, fibottention_mask, wythoff_offsets
from policy.attention.fibottention import diagonal_table, pattern_density
from policy.build import build_model, cache_features
from policy.checkpoint import save_checkpoint
from policy.diffusion import DiffusionPolicy

TINY = ["--heads", "3", "--head-dim", "8", "--tokens", "40", "--seconds", "0.01", "--device", "cpu"]
DENSE = ["--backend", "dense"]  # compiles nothing; the kernels have tests of their own


def inputs(num_patches=30, heads=3, width=8, batch=2):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, heads, 1 + num_patches, width)
    q, k, v, d_out = (torch.randn(shape, generator=generator) for _ in range(4))
    return *(x.requires_grad_() for x in (q, k, v)), d_out


def measured(folder, *options):
    """(results, Markdown) of a tiny run."""
    speed.main(["attention", *TINY, "--output", str(folder), *options])
    return json.loads((folder / "attention.json").read_text()), (folder / "attention.md").read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    return folder, *measured(folder, "--patches", "20", "11", *DENSE)


# What is compared ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "robot"])
@pytest.mark.parametrize(("theirs", "ours"), [("dense+mask", "exclude"), ("published", "zero")])
def test_methods_of_one_rule_agree(variant, theirs, ours):
    offsets = wythoff_offsets(30, 3, variant=variant)
    q, k, v, d_out = inputs()
    methods = attention_methods(offsets, 30, backend="dense", device="cpu", dtype=torch.float32)
    other = next(rule for rule in ("zero", "exclude") if rule != ours)
    for direction in (attention_speed.forward, attention_speed.forward_backward):

        def results(name, direction=direction):
            result = direction(methods[name], q, k, v, d_out)
            return result if isinstance(result, tuple) else (result,)

        for got, same, different, full in zip(
            *map(results, (theirs, f"fibottention {ours}", f"fibottention {other}", "dense")), strict=True
        ):
            torch.testing.assert_close(got, same, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(got, different, atol=1e-3) and not torch.allclose(got, full, atol=1e-3)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_gets_the_same_pattern(monkeypatch):
    """Uncompiled, which is slow and the same formula; offsets beyond the tokens join nothing."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    offsets = (*wythoff_offsets(30, 2, variant="robot"), (1, 31, 90))
    q, k, v, _ = (x.detach() for x in inputs())
    expected = fibottention(q, k, v, offsets, masked_score="exclude", backend="dense")
    torch.testing.assert_close(flex_method(offsets, 30, "cpu")(q, k, v), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["zero", "exclude"])
def test_reference_errors_find_a_wrong_result_or_gradient(rule):
    offsets = wythoff_offsets(30, 3)
    exact = attention_methods(offsets, 30, backend="dense", device="cpu", dtype=torch.float32)[f"fibottention {rule}"]
    other = "zero" if rule == "exclude" else "exclude"
    errors = reference_errors(exact, rule, offsets, *inputs())
    assert set(errors) == set(DIRECTIONS) and all(0 < error < 2e-5 for error in errors.values())
    assert min(reference_errors(exact, other, offsets, *inputs()).values()) > 0.1

    def wrong_in_the_last_head(q, k, v):
        return exact(q, k, v) + 0.25 * torch.tensor([0, 0, 1.0])[:, None, None]

    assert reference_errors(wrong_in_the_last_head, rule, offsets, *inputs())["forward"] == pytest.approx(
        0.25, rel=1e-4
    )

    def wrong_gradient(q, k, v):
        return exact(q, k, v + 0.25 * (v - v.detach()))

    errors = reference_errors(wrong_gradient, rule, offsets, *inputs())
    assert errors["forward"] < 2e-5 and errors["forward+backward"] > 0.1


@pytest.mark.parametrize(("num_patches", "heads", "variant"), [(196, 12, "paper"), (36, 4, "robot"), (5, 9, "paper")])
def test_density_is_that_of_the_mask(num_patches, heads, variant):
    offsets = wythoff_offsets(num_patches, heads, variant=variant)
    mask = fibottention_mask(offsets, num_patches)[:, 1:, 1:]
    assert pattern_density(offsets, num_patches) == pytest.approx(mask.double().mean().item(), abs=1e-12)


# Results -------------------------------------------------------------------------------------------------------------


def test_every_method_is_measured_at_every_size(run):
    folder, results, _ = run
    methods = [method for method in COLOURS if method != "flex"]
    found = [(row["patches"], row["direction"], row["method"]) for row in results["rows"]]
    assert sorted(found) == sorted(itertools.product((11, 20), DIRECTIONS, methods)) and found[0][0] == 11
    for row in results["rows"]:
        assert row["batch"] == {11: 4, 20: 2}[row["patches"]]  # 40 tokens
        assert row["density"] == pattern_density(wythoff_offsets(row["patches"], 3), row["patches"])
        assert row["ms"] > 0 and 5 <= row["repeats"] <= 200 and row["note"] is None
        assert row["memory_mb"] is None or 0 <= row["memory_mb"] < 50


def test_ratios_and_bandwidth_follow_from_the_times(run):
    _, results, _ = run
    dense = {(r["patches"], r["direction"]): r["ms"] for r in results["rows"] if r["method"] == "dense"}
    for row in results["rows"]:
        assert row["ratio"] == pytest.approx(dense[row["patches"], row["direction"]] / row["ms"])
        ours = row["method"].startswith("fibottention")
        assert ours == ("gb_per_s" in row) == ("max_error" in row)
        if ours:
            tensor = row["batch"] * 3 * (1 + row["patches"]) * 8 * 4  # bytes of q
            passes = 4 if row["direction"] == "forward" else 4 + 5 + 3
            assert row["gb_per_s"] == pytest.approx(passes * tensor / (row["ms"] / 1e3) / 1e9)
            assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / results["copy_gb_per_s"])
            assert 0 < row["max_error"] < 2e-5
    assert results["copy_gb_per_s"] > 0.5


def test_results_say_where_they_come_from(run):
    folder, results, _ = run
    assert (
        results["command"]
        == f"python -m eval.speed attention {' '.join(TINY)} --output {folder} --patches 20 11 {' '.join(DENSE)}"
    )
    assert results["machine"]["device"] == "cpu" and results["machine"]["torch"] == torch.__version__
    assert results["machine"]["threads"] == torch.get_num_threads() and results["machine"]["name"]
    settings = {"backend": "dense", "dtype": "float32", "variant": "paper", "heads": 3, "head_dim": 8, "seconds": 0.01}
    assert results["settings"] == {**settings, "tokens": 40, "patches": [11, 20]}


def test_the_table_has_a_row_a_size(run):
    folder, results, text = run
    for direction, section in zip(DIRECTIONS, re.split("## forward", text)[1:], strict=True):
        header, _, *lines = [line for line in section.split("Peak memory")[0].splitlines() if line.startswith("|")]
        names = [cell.strip() for cell in header.strip("|").split("|")]
        assert names == ["patches", "batch", "density", *(m for m in COLOURS if m != "flex")]
        assert [line.split("|")[1].strip() for line in lines] == ["11", "20"]
        for line in lines:
            cells = dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
            row = next(
                row
                for row in results["rows"]
                if (row["patches"], row["direction"], row["method"])
                == (int(cells["patches"]), direction, "fibottention zero")
            )
            ms, ratio = re.fullmatch(r"([\d.]+) \(([\d.]+)x\)", cells["fibottention zero"]).groups()
            assert float(ms) == pytest.approx(row["ms"], rel=0.01)
            assert float(ratio) == pytest.approx(row["ratio"], abs=0.06)
    assert f"`{results['command']}`" in text
    with Image.open(folder / "attention.png") as picture:
        assert picture.size == (1430, 594) and len(picture.getcolors(10**6)) > 50


def test_options_change_what_they_say(tmp_path, monkeypatch, capsys):
    seen = []

    def spy(q, k, v, offsets, *, masked_score, backend, table):
        assert torch.equal(table, diagonal_table(offsets, 12))
        seen.append((q.dtype, q.shape, offsets, masked_score, backend, torch.is_grad_enabled()))
        return fibottention(q, k, v, offsets, masked_score=masked_score, backend="dense")

    monkeypatch.setattr(attention_speed, "fibottention", spy)
    threads = torch.get_num_threads()
    try:
        options = ["--variant", "robot", "--dtype", "bfloat16", "--backend", "dense", "--threads", "2", "--no-check"]
        results, text = measured(tmp_path, "--patches", "12", *options)
    finally:
        torch.set_num_threads(threads)
    offsets = wythoff_offsets(12, 3, variant="robot")
    # Both rules, forward and with gradients.
    assert {call[3::2] for call in seen} == {("zero", False), ("zero", True), ("exclude", False), ("exclude", True)}
    assert {(*call[:3], call[4]) for call in seen} == {(torch.bfloat16, (3, 3, 13, 8), offsets, "dense")}
    assert results["machine"]["threads"] == 2 and not any("max_error" in row for row in results["rows"])
    assert "not checked" in text and text in capsys.readouterr().out


# What does not run ---------------------------------------------------------------------------------------------------


def evaluated_densely(*arguments, **options):
    return fibottention(*arguments, **{**options, "backend": "dense"})


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_methods_that_would_not_fit_are_left_out(tmp_path, monkeypatch, backend):
    pairs = 3 * 3 * 13 * 13 * 4  # bytes for all pairs
    monkeypatch.setattr(attention_speed, "fibottention", evaluated_densely)
    monkeypatch.setattr(attention_speed, "free_memory", lambda device: 5.5 * pairs / 0.8)  # between the two directions
    results, text = measured(tmp_path, "--patches", "12", "--backend", backend)
    left_out = {(row["direction"], row["method"]) for row in results["rows"] if row["ms"] is None}
    whole = {"dense+mask", "published"} | (
        {"fibottention zero", "fibottention exclude"} if backend == "dense" else set()
    )
    assert left_out == {("forward+backward", method) for method in whole}
    for row in results["rows"]:
        assert (row["note"] is None) == (row["ms"] is not None)
        assert row["note"] is None or row["note"].startswith("skipped: needs about 0.0 GB for all pairs")
    assert "–" in text and "* 12 patches, forward+backward, published: skipped" in text
    monkeypatch.setattr(attention_speed, "free_memory", lambda device: 4.5 * pairs / 0.8)
    made = []
    monkeypatch.setattr(attention_speed, "fibottention_mask", lambda *arguments: made.append(arguments))
    results, _ = measured(tmp_path, "--patches", "12", "--backend", backend, "--no-check")
    assert not made  # a mask of all pairs would not fit either
    assert {row["method"] for row in results["rows"] if row["ms"] is None} == whole


def test_a_method_that_fails_stops_no_other(tmp_path, monkeypatch):
    def fail(q, k, v, offsets, *, masked_score, **options):
        if masked_score == "zero":
            raise RuntimeError("no room\nat all")
        return evaluated_densely(q, k, v, offsets, masked_score=masked_score)

    monkeypatch.setattr(attention_speed, "fibottention", fail)
    results, _ = measured(tmp_path, "--patches", "12", "--no-check")
    notes = {row["method"]: row["note"] for row in results["rows"]}
    assert notes.pop("fibottention zero") == "failed: no room at all" and set(notes.values()) == {None}


ERRORS = {
    "backend": (["--backend", "gpu"], "--backend: got 'gpu', allowed: auto, .*dense.*"),
    "variant": (["--variant", "papre"], "--variant: got 'papre', allowed: paper, robot"),
    "dtype": (["--dtype", "float64"], "--dtype: got 'float64', allowed: float32, bfloat16, float16"),
    "device": (["--device", "gpu"], "--device: got 'gpu', allowed: auto, cpu, cuda"),
    "patches": (["--patches", "9", "0"], "--patches: got 0, allowed: > 0"),
    "heads": (["--heads", "0"], "--heads: got 0, allowed: > 0"),
    "head dim": (["--head-dim", "-8"], "--head-dim: got -8, allowed: > 0"),
    "tokens": (["--tokens", "0"], "--tokens: got 0, allowed: > 0"),
    "seconds": (["--seconds", "nan"], "--seconds: got nan, allowed: > 0"),
    "threads": (["--threads", "0"], "--threads: got 0, allowed: > 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_wrong_option_gives_one_line(tmp_path, monkeypatch, capsys, case):
    options, message = ERRORS[case]
    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop:
        measured(tmp_path, "--patches", "9", *options)
    assert stop.value.code == 1
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err) and not list(tmp_path.iterdir())


def test_a_backend_that_cannot_run_gives_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise ValueError("backend: got 'triton', allowed: dense")

    monkeypatch.setattr(attention_speed, "fibottention", refuse)
    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(SystemExit):
        measured(tmp_path, "--patches", "9")
    assert capsys.readouterr().err.endswith("error: backend: got 'triton', allowed: dense\n")


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.choose_device("auto") == "cpu"
    with pytest.raises(
        ValueError, match="--device: got 'cuda', but torch sees no CUDA device; allowed here: auto, cpu"
    ):
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


def test_labels_are_moved_apart_and_keep_their_order():
    heights = {"a": 100.0, "b": 101.0, "c": 99.0, "d": 10.0}
    placed = attention_speed.spread_labels(heights, 1.3)
    assert placed["d"] == 10.0 and sorted(placed, key=placed.get) == ["d", "c", "a", "b"]
    values = sorted(placed.values())
    assert all(high / low > 1.29 for low, high in zip(values, values[1:], strict=False))
    assert (placed["c"] * placed["a"] * placed["b"]) ** (1 / 3) == pytest.approx(100, rel=0.01)  # around their middle


# Whole encoders --------------------------------------------------------------------------------------------------


def test_encoders_are_the_same_but_for_attention():
    """With attention to all pairs ours would be timm's: same parameters, same result."""
    methods = encoder_speed.encoder_methods(20, 4, "vit_tiny_patch16_224", "paper")
    timm_vit, ours = methods["timm"].eval(), methods["fibottention"].eval()
    assert timm_vit.state_dict().keys() == ours.vit.state_dict().keys()
    ours.vit.load_state_dict(timm_vit.state_dict())
    x = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(timm_vit(x), ours(x), atol=1e-4)
    for mine, theirs in zip(ours.vit.blocks, timm_vit.blocks, strict=True):
        mine.attn = theirs.attn
    torch.testing.assert_close(timm_vit(x), ours(x))


def test_encoder_command(tmp_path, capsys):
    options = "--images 22 16 --patch-size 4 --arch vit_tiny_patch16_224 --tokens 50 --seconds 0.01 --device cpu"
    speed.main(["encoder", *options.split(), "--output", str(tmp_path)])
    results = json.loads((tmp_path / "encoder.json").read_text())
    rows = results["rows"]
    found = {(r["image"], r["patches"], r["batch"], r["direction"], r["method"]) for r in rows}
    sizes = [(22, 25, 2), (16, 16, 3)]  # 22 px: the last two do not fill a patch
    directions, methods = ("forward", "forward+backward"), ("timm", "fibottention")
    assert found == {(*size, direction, method) for size in sizes for direction in directions for method in methods}
    for dense, ours in zip(rows[::2], rows[1::2], strict=True):
        assert ours["ratio"] == pytest.approx(dense["ms"] / ours["ms"])
    table = (tmp_path / "encoder.md").read_text()
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + 4
    assert table in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [("--images 4", "--images: got 4, allowed: the patch size 8 or more"), ("--patch-size 0", "--patch-size: got 0")],
)
def test_encoder_errors(options, message, capsys):
    with pytest.raises(SystemExit):
        speed.main(["encoder", *options.split()])
    assert message in capsys.readouterr().err


# Beside the plain way ------------------------------------------------------------------------------------------------

SMALL = "denoiser.widths=[8,16] encoder.dim=16 encoder.depth=1 encoder.num_heads=2 decoder.channels=8 decoder.groups=4"
PLAIN = ["--device", "cpu", "--seconds", "0.01", "--overrides", *SMALL.split()]


@pytest.fixture(scope="module")
def pusht_zarr(tmp_path_factory):
    """Three episodes of 20 random frames of 96 px."""
    path = tmp_path_factory.mktemp("data") / "pusht.zarr"
    rng, root = np.random.default_rng(0), zarr.open_group(str(path), mode="w")
    images = rng.integers(0, 256, (60, 96, 96, 3)).astype(np.float32)
    root.create_array("data/img", data=images, chunks=(20, 96, 96, 3))
    root.create_array("data/state", data=rng.uniform(0, 512, (60, 5)).astype(np.float32))
    root.create_array("data/action", data=rng.uniform(0, 512, (60, 2)).astype(np.float32))
    root.create_array("meta/episode_ends", data=np.array([20, 40, 60]))
    return path


@pytest.fixture
def slow_clock(monkeypatch):
    """Limits of the machine as round numbers, not measured."""
    limits = {"read": 1e9, "fp32": 1e9, "bf16": 4e9}
    monkeypatch.setattr(sample_speed, "machine_limits", lambda device: limits)
    monkeypatch.setattr(train_speed, "multiply_rate", lambda device, kind: limits["bf16" if kind.itemsize == 2 else "fp32"])  # fmt: skip  # noqa: E501
    return limits


def results_of(name, folder, *options):
    speed.main([name, *options, "--output", str(folder)])
    table = (folder / f"{name}.md").read_text()
    return json.loads((folder / f"{name}.json").read_text()), table


def test_sample_command(tmp_path, slow_clock, capsys):
    samplers = ["--samplers", "ddim:3", "ddpm:4"]
    results, table = results_of("sample", tmp_path, "--preset", "small", "--batches", "2", "1", *samplers, *PLAIN)
    rows = results["rows"]
    ways = ["plain", "ours fp32", "ours bf16"]
    parts = [("encoder", None, None), ("loop", "ddim", 3), ("whole", "ddim", 3), ("loop", "ddpm", 4), ("whole", "ddpm", 4)]  # fmt: skip  # noqa: E501
    found = [(row["batch"], row["part"], row["sampler"], row["steps"], row["method"]) for row in rows]
    assert found == [(batch, *part, way) for batch in (1, 2) for part in parts for way in ways]
    for row in rows:
        assert ("deviation" in row) == (row["part"] == "whole") and ("share_of_reading" in row) == (
            row["part"] == "loop"
        )
        if row["part"] == "whole":
            low, high = {"plain": (-1, 0), "ours fp32": (0, 1e-3), "ours bf16": (1e-4, 0.5)}[row["method"]]
            assert low < row["deviation"] <= high
    plain, ours, half = (row for row in rows if (row["batch"], row["part"], row["sampler"]) == (1, "loop", "ddim"))
    for row, size, rate in ((plain, 4, 1e9), (ours, 4, 1e9), (half, 2, 4e9)):
        weights = row["share_of_reading"] * row["ms"] / 1e3 * 1e9 / 3 / size
        operations = row["share_of_multiplying"] * row["ms"] / 1e3 * rate / 3
        assert weights == pytest.approx(needs(16)[0]) and operations == pytest.approx(needs(16)[1])
    assert results["settings"]["limits"] == slow_clock and results["settings"]["samplers"] == {"ddim": 3, "ddpm": 4}
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 2 + len(rows)
    assert table in capsys.readouterr().out and "preset small, random weights" in table


def needs(horizon):
    """(weights, operations) of the U-Net of SMALL by hand: every convolution's, and GroupNorm's weights."""
    widths, total, operations = [8, 16], 0, 0

    def convolution(i, o, kernel, length, bias=True):
        nonlocal total, operations
        total += i * o * kernel + o * bias
        operations += 2 * i * o * kernel * length

    def block(i, o, length):
        nonlocal total
        for inputs in (i, o):
            convolution(inputs, o, 5, length)
            total += 2 * o
        if i != o:
            convolution(i, o, 1, length)

    low, high = widths
    half = horizon // 2
    for sizes in ((2, low, horizon), (low, low, horizon), (low, high, half), *[(high, high, half)] * 3, (2 * high, low, half), (low, low, half)):  # fmt: skip  # noqa: E501
        block(*sizes)
    convolution(low, low, 3, half)
    convolution(low, low, 4, half)  # transposed: every input step meets four taps
    convolution(low, low, 5, horizon)
    total += 2 * low
    convolution(low, 2, 1, horizon)
    return total, operations


def test_sample_of_a_checkpoint(tmp_path, slow_clock, monkeypatch):
    policy = tiny.policy(images=True)
    tensors = {f"ema.{name}": tensor for name, tensor in policy.state_dict().items()}
    config = tiny.policy_config(images=True)
    config["task"]["name"] = "fake"
    save_checkpoint(tmp_path / "policy.safetensors", tensors, config=config, state={"step": 0})
    options = ["--checkpoint", str(tmp_path / "policy.safetensors"), "--samplers", "dpmpp_2m:3", *PLAIN[:4]]
    results, table = results_of("sample", tmp_path, *options)
    assert {row["sampler"] for row in results["rows"]} == {None, "dpmpp_2m"} and "fake, policy.safetensors" in table


def test_train_command(tmp_path, pusht_zarr, slow_clock, capsys):
    options = ["--preset", "small", "--data", str(pusht_zarr), "--batch", "4", "--windows-per-group", "2", "--timesteps-per-sample", "3"]  # fmt: skip  # noqa: E501
    results, table = results_of("train", tmp_path, *options, *PLAIN)
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == ["plain", "ours fp32", "ours bf16", "ours bf16, 2 windows a group", "ours bf16, 3 timesteps a sample"]  # fmt: skip  # noqa: E501
    plain, ours, half, grouped, several = rows.values()
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4) and ours["loss"] != several["loss"]
    assert half["loss"] == pytest.approx(plain["loss"], rel=0.05) and half["loss"] != ours["loss"]
    assert grouped["loss"] != pytest.approx(half["loss"], rel=1e-6)  # other windows
    for row in rows.values():
        assert row["samples_per_s"] == pytest.approx(4e3 / row["ms"]) and row["gpu_busy"] is None
        assert row["ratio"] == pytest.approx(plain["ms"] / row["ms"])
    operations = [row["share_of_multiplying"] * row["ms"] for row in (plain, ours, half, grouped)]
    assert operations == pytest.approx([operations[0]] * 2 + [operations[0] / 4] * 2) and operations[0] > 0
    assert several["share_of_multiplying"] is None
    assert table in capsys.readouterr().out and len(re.findall(r"^\|", table, re.MULTILINE)) == 2 + 5


def test_train_with_a_frozen_encoder_reads_features(tmp_path, pusht_zarr, slow_clock, monkeypatch):
    cached = []
    monkeypatch.setattr(train_speed, "cache_features", lambda *arguments, **options: cached.append(cache_features(*arguments, **options)))  # fmt: skip  # noqa: E501
    options = ["--preset", "cpu", "--data", str(pusht_zarr), "--batch", "8"]
    results, _ = results_of("train", tmp_path, *options, *PLAIN)
    assert len(cached) == 1
    plain, ours, *_ = results["rows"]
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_compiled_steps_are_a_method_of_their_own(monkeypatch):
    compiled = []
    monkeypatch.setattr(DiffusionPolicy, "compile_training", lambda self: compiled.append(self))
    config = tiny.policy_config(images=True)
    config |= {"seed": 0, "training": tiny.training_options(), "storage": "ram"}
    policy = build_model(config)
    policy.config = config
    step = train_speed.Step(policy, tiny.window_data(config, tiny.replay_buffer()), batch=4, group=1)
    found = train_speed.our_methods(policy, step, group=2, timesteps=3, compiled=True)
    (one,) = compiled
    assert found["ours bf16, compiled"][0] is one is not policy
    assert "ours bf16, compiled" not in train_speed.our_methods(policy, step, group=2, timesteps=3, compiled=False)


class Here:
    """An executor that runs in this process."""

    def __init__(self, *arguments, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *arguments, **options):
        future = Future()
        future.set_result(function(*arguments, **options))
        return future


def test_load_command(tmp_path, pusht_zarr, monkeypatch, capsys):
    monkeypatch.setattr(load_speed, "ProcessPoolExecutor", Here)
    options = ["--data", str(pusht_zarr), "--batch", "4", "--workers", "0", "--device", "cpu", "--seconds", "0.01"]
    results, table = results_of("load", tmp_path, *options)
    names = ["plain", "ours, ram", "ours, mmap, first time", "ours, mmap, again"]
    assert [row["method"] for row in results["rows"]] == names
    plain, *ours = results["rows"]
    image, low_dim = 96 * 96 * 3, 16 * 2 * 4
    assert plain["kb_per_sample"] == pytest.approx((16 * image * 4 + 2 * low_dim) / 1e3)
    for row in ours:
        assert image / 1e3 < row["kb_per_sample"] < plain["kb_per_sample"] / 30
        assert row["ratio"] == pytest.approx(row["samples_per_s"] / plain["samples_per_s"])
        assert row["first_s"] > 0 and row["imports_s"] >= 0
    assert table in capsys.readouterr().out and "pusht.zarr, batches of 4 windows" in table


@pytest.mark.slow
def test_load_in_processes_of_their_own(tmp_path, pusht_zarr):
    options = ["--data", str(pusht_zarr), "--storage", "ram", "--batch", "4", "--workers", "1", "--device", "cpu", "--seconds", "0.01"]  # fmt: skip  # noqa: E501
    results, _ = results_of("load", tmp_path, *options)
    plain, ours = results["rows"]
    assert plain["imports_s"] > 0.5 and ours["imports_s"] > 0.5  # torch
    if plain["resident_mb"] is not None:
        assert plain["resident_mb"] > ours["resident_mb"] > 0


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


PLAIN_ERRORS = {
    "samplers": ("sample --samplers ddmp:3", "--samplers: got 'ddmp:3', allowed: NAME:STEPS .*ddpm, ddim, dpmpp_2m"),
    "steps": ("sample --samplers ddim", "--samplers: got 'ddim', allowed: NAME:STEPS .*"),
    "batches": ("sample --batches 1 0", "--batches: got 0, allowed: > 0"),
    "task": ("sample --task push", r"--task: got 'push' \(did you mean 'pusht'\?\), allowed: .*lift_ph.*"),
    "preset": ("sample --preset papre", "preset: got 'papre'.*allowed: .*paper.*"),
    "seconds": ("train --seconds 0", "--seconds: got 0.0, allowed: > 0"),
    "batch": ("train --batch 0", "--batch: got 0, allowed: > 0"),
    "group": ("train --windows-per-group 0", "--windows-per-group: got 0, allowed: > 0"),
    "timesteps": ("train --timesteps-per-sample 0", "--timesteps-per-sample: got 0, allowed: > 0"),
    "storage": ("load --storage ram disk", "--storage: got 'disk', allowed: ram, mmap, device"),
    "no gpu": ("load --storage device --device cpu", "--storage: got 'device' without a GPU, allowed here: ram, mmap"),
    "workers": ("load --workers -1", "--workers: got -1, allowed: >= 0"),
    "data": ("load --data nowhere.zarr", "task.data: got 'nowhere.zarr'.*does not exist.*"),
}


@pytest.mark.parametrize("case", PLAIN_ERRORS)
def test_wrong_options_beside_the_plain_way_give_one_line(tmp_path, monkeypatch, capsys, case):
    options, message = PLAIN_ERRORS[case]
    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(SystemExit):
        speed.main([*options.split(), "--output", str(tmp_path)])
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err) and not list(tmp_path.iterdir())


def test_a_batch_needs_enough_windows(tmp_path, pusht_zarr, capsys):
    with pytest.raises(SystemExit):
        speed.main(["train", "--preset", "small", "--data", str(pusht_zarr), "--batch", "1000", *PLAIN])
    assert "--batch: got 1000, allowed: 1 to " in capsys.readouterr().err


def test_decoding_is_measured_for_each_kind_and_number_of_processes(tmp_path, monkeypatch, capsys):
    for name, value in {"IMAGES": 8, "VIDEOS": 1, "FRAMES": 70}.items():
        monkeypatch.setattr(f"eval.speed.decode.{name}", value)
    speed.main(["decode", "--workers", "1", "0", "--batch", "4", "--seconds", "0.05", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [row["workers"] for row in rows] == [0, 1] * 3 and len({row["kind"] for row in rows}) == 3
    assert all(row["samples_per_s"] > 0 and row["busy_cores"] >= 0 for row in rows)
    assert "clips, 8 frames" in (tmp_path / "decode.md").read_text()
    with pytest.raises(SystemExit):
        speed.main(["decode", "--workers", "-1"])
    assert "--workers: got -1, allowed: >= 0" in capsys.readouterr().err
