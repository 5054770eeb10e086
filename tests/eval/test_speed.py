"""The speed command: what it compares is equal, what it reports follows from what it measured, its options work."""

import functools
import itertools
import json
import re

import commands
import pytest
import torch
from PIL import Image

from eval.speed import __main__ as speed
from eval.speed import attention as attention_speed
from eval.speed.attention import COLOURS, DIRECTIONS, attention_methods, flex_method, reference_errors
from policy.attention import fibottention, fibottention_mask, wythoff_offsets
from policy.attention.fibottention import diagonal_table, pattern_density

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


def test_the_tables_have_a_row_a_size(run):
    folder, results, text = run
    sections = [part for part in text.split("## ") if part.startswith(DIRECTIONS)]
    for direction, section in zip(DIRECTIONS, sections[::2], strict=True):  # beside each one of memory
        header, _, *lines = [line for line in section.splitlines() if line.startswith("|")]
        names = [cell.strip() for cell in header.strip("|").split("|")]
        assert names == ["patches", "batch", "density", *(m for m in COLOURS if m != "flex")]
        assert [line.split("|")[1].strip() for line in lines] == ["11", "20"]
        rows = {(row["patches"], row["direction"], row["method"]): row for row in results["rows"]}
        for line in lines:
            cells = dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
            row = rows[int(cells["patches"]), direction, "fibottention zero"]
            ms, ratio = re.fullmatch(r"([\d.]+) \(([\d.]+)x\)", cells["fibottention zero"]).groups()
            assert float(ms) == pytest.approx(row["ms"], rel=0.01)
            assert float(ratio) == pytest.approx(row["ratio"], abs=0.06)
    assert f"`{results['command']}`" in text
    with Image.open(folder / "attention.png") as picture:
        assert picture.size[0] > 1000 and len(picture.getcolors(10**6)) > 50


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


WRONG = ["--backend gpu", "--variant papre", "--dtype float64", "--device gpu", "--patches 9 0", "--heads 0"]
WRONG += ["--head-dim -8", "--tokens 0", "--seconds nan", "--threads 0"]


refused = functools.partial(commands.refused, speed.main)


@pytest.fixture(autouse=True)
def no_traceback(monkeypatch):
    monkeypatch.delenv("DEBUG", raising=False)


@pytest.mark.parametrize("options", WRONG)
def test_a_wrong_option_gives_one_line(tmp_path, capsys, options):
    option, *values = options.split()
    line = refused(capsys, "attention", *TINY, "--patches", "9", option, *values, "--output", str(tmp_path))
    assert re.match(rf"{option}: got '?{values[-1]}'?, allowed: ", line) and not list(tmp_path.iterdir())


def test_a_backend_that_cannot_run_gives_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise ValueError("backend: got 'triton', allowed: dense")

    monkeypatch.setattr(attention_speed, "fibottention", refuse)
    line = refused(capsys, "attention", *TINY, "--patches", "9", "--output", str(tmp_path))
    assert line == "backend: got 'triton', allowed: dense"
