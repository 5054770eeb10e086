"""eval.speed of encoders, samples, training steps, loading and decoding: the ways compared do the same."""

import functools
import json
import re
from concurrent.futures import Future

import commands
import numpy as np
import pytest
import tiny
import torch
import zarr

from eval.speed import __main__ as speed
from eval.speed import encoder as encoder_speed
from eval.speed import load as load_speed
from eval.speed import sample as sample_speed
from eval.speed import train as train_speed
from policy.build import build_model
from policy.dataset.features import cache_features
from policy.diffusion import DiffusionPolicy

refused = functools.partial(commands.refused, speed.main)


@pytest.fixture(autouse=True)
def no_traceback(monkeypatch):
    monkeypatch.delenv("DEBUG", raising=False)


# Whole encoders --------------------------------------------------------------------------------------------------


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("options", ["--images 4", "--patch-size 0"])
def test_encoder_errors(options, capsys):
    assert refused(capsys, "encoder", *options.split()).startswith(f"{options.split()[0]}: got {options[-1]}, allowed")


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
    config = tiny.policy_config(images=True)
    config["task"]["name"] = "fake"
    path = tiny.save(tmp_path / "policy.safetensors", tiny.policy(images=True), config)
    options = ["--checkpoint", str(path), "--samplers", "dpmpp_2m:3", *PLAIN[:4]]
    results, table = results_of("sample", tmp_path, *options)
    assert {row["sampler"] for row in results["rows"]} == {None, "dpmpp_2m"} and "fake, policy.safetensors" in table


@pytest.mark.slow
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
    options = ["--preset", "fast", "--data", str(pusht_zarr), "--batch", "8"]
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


PLAIN_WRONG = {  # the command: the key that its error names
    "sample --samplers ddmp:3": "--samplers",
    "sample --samplers ddim": "--samplers",
    "sample --batches 1 0": "--batches",
    "sample --task push": "--task",
    "sample --preset papre": "preset",
    "train --seconds 0": "--seconds",
    "train --batch 0": "--batch",
    "train --windows-per-group 0": "--windows-per-group",
    "train --timesteps-per-sample 0": "--timesteps-per-sample",
    "load --storage ram disk": "--storage",
    "load --storage device --device cpu": "--storage",
    "load --workers -1": "--workers",
    "load --data nowhere.zarr": "task.data",
    "decode --workers -1": "--workers",
}


@pytest.mark.parametrize("options", PLAIN_WRONG)
def test_wrong_options_beside_the_plain_way_give_one_line(tmp_path, capsys, options):
    line = refused(capsys, *options.split(), "--output", str(tmp_path))
    assert line.startswith(f"{PLAIN_WRONG[options]}: got ") and "allowed" in line and not list(tmp_path.iterdir())


def test_a_batch_needs_enough_windows(pusht_zarr, capsys):
    line = refused(capsys, "train", "--preset", "small", "--data", str(pusht_zarr), "--batch", "1000", *PLAIN)
    assert line.startswith("--batch: got 1000, allowed: 1 to ")


def test_decoding_is_measured_for_each_kind_and_number_of_processes(tmp_path, monkeypatch):
    for name, value in {"IMAGES": 8, "VIDEOS": 1, "FRAMES": 70}.items():
        monkeypatch.setattr(f"eval.speed.decode.{name}", value)
    speed.main(["decode", "--workers", "1", "0", "--batch", "4", "--seconds", "0.05", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [row["workers"] for row in rows] == [0, 1] * 3 and len({row["kind"] for row in rows}) == 3
    assert all(row["samples_per_s"] > 0 and row["busy_cores"] >= 0 for row in rows)
    assert "clips, 8 frames" in (tmp_path / "decode.md").read_text()
