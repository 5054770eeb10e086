"""The attention benchmark: counted work is the work done, errors follow their formula, options change what they say."""

import json
import math
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from eval.attention import __main__ as attention
from eval.attention import error as attention_error
from eval.attention import measure as attention_measure
from eval.attention.error import attention_inputs, encoder_at, measure_errors, measure_maps, relative_error, scenes
from eval.attention.flops import attention_flops
from eval.attention.measure import layer_geometry, layer_inputs, make_call, measure, read_configs, refusal
from eval.attention.train import configure, summarise, train
from policy import load_encoder
from policy.attention import ATTENTIONS, build_attention, fibottention_mask
from policy.attention.softmax import SoftmaxAttention

# FLOPs ---------------------------------------------------------------------------------------------------------------

PAIR = 4 * 32  # two multiply-adds for every number of four heads of width 8: a score, and its share of a value
BY_HAND = [  # of 30 patches and one prefix token
    ("softmax", {}, PAIR * 31 * 31),
    ("ra", {}, 2 * PAIR * 31 * 31),  # scores, mean keys, scores around them, values
    ("local", {"window_size": 4}, PAIR * (31 + 8 * 4 * (4 + 1))),  # eight windows, the last one padded
    ("bigbird", {"window_radius": 2, "random_keys": 3}, PAIR * (31 + 4 * 8 * (12 + 1) + 30 * 3)),  # blocks of eight
    ("linformer", {"rank": 7}, 2 * PAIR * 31 * 7),  # projecting keys and values costs as much as attending to them
    ("performer", {"num_features": 10}, 4 * 31 * 10 * 2 * (2 * 8 + 2 * 9)),  # features twice; sums, and reading them
    ("nystromformer", {"num_landmarks": 8, "iterations": 1}, PAIR * (3 * 31 * 8 + 8 * 8) + 4 * 2 * 4 * 8**3),
]


def build(name, options, prefix_tokens=1, grid=(5, 6)):
    geometry = {"num_patches": math.prod(grid), "grid": grid, "layer": 1, "depth": 2, "prefix_tokens": prefix_tokens}
    return build_attention(name, dim=32, num_heads=4, **geometry, **options).eval()


@pytest.mark.parametrize(("name", "options", "flops"), BY_HAND, ids=[case[0] for case in BY_HAND])
def test_flops_worked_by_hand(name, options, flops):
    assert attention_flops(build(name, options), 31) == flops


@pytest.mark.parametrize("masked_score", ["zero", "exclude"])
@pytest.mark.parametrize("prefix_tokens", [0, 2])
@pytest.mark.parametrize("variant", ["paper", "robot"])
def test_fibottention_counts_the_attended_pairs(variant, prefix_tokens, masked_score):
    module = build("fibottention", {"variant": variant, "masked_score": masked_score}, prefix_tokens)
    pairs = int(fibottention_mask(module.offsets, 30, prefix_tokens=prefix_tokens).sum())
    assert attention_flops(module, prefix_tokens + 30) == 4 * 8 * pairs


def test_any_mechanism_is_counted_and_nothing_computed():
    """A layer on all values before softmax attention, over tokens that would fill 40 GB with scores."""

    class Layered(SoftmaxAttention):
        def __init__(self, **common):
            super().__init__(**common)
            self.layer = nn.Linear(8, 8)

        def attend(self, q, k, v, **switches):
            return super().attend(q, k, self.layer(v), **switches)

    tokens = 50_000
    assert attention_flops(Layered(dim=32, num_heads=4), tokens) == PAIR * tokens**2 + 2 * 4 * 8 * 8 * tokens


# Mechanisms ----------------------------------------------------------------------------------------------------------


def test_names_restrict_and_the_baseline_is_always_there():
    configs = read_configs(["fibottention_exclude"])
    assert list(configs) == ["softmax", "fibottention_exclude"]
    assert configs["fibottention_exclude"]["masked_score"] == "exclude"  # from the file that it builds upon
    with pytest.raises(ValueError, match="--attention"):
        read_configs(["lokal"])


@pytest.mark.parametrize("patches", [1, 7, 64, 196, 1568, 6272])
def test_grids_are_as_square_as_can_be(patches):
    rows, columns = layer_geometry(patches, dim=8, heads=2)["grid"]
    pairs = [(a, patches // a) for a in range(1, patches + 1) if patches % a == 0 and a <= patches // a]
    assert (rows, columns) == min(pairs, key=lambda pair: pair[1] - pair[0])


def test_the_seed_decides_what_is_random_and_nothing_else():
    geometry = layer_geometry(16, dim=16, heads=2)
    before = torch.random.get_rng_state()
    for options in ({"name": "performer", "num_features": 4, "seed": 0}, {"name": "eva"}):
        states = [attention_measure.build(options, seed=seed, **geometry).state_dict() for seed in (0, 0, 1)]
        own = [name for name in states[0] if name.split(".")[0] not in ("qkv", "proj")]
        assert all(torch.equal(states[0][name], states[1][name]) for name in own)
        assert any(not torch.equal(states[0][name], states[2][name]) for name in own)
    assert torch.equal(before, torch.random.get_rng_state())


def test_own_parameters_are_those_beside_qkv_and_proj():
    options = {"softmax": {"name": "softmax"}, "linformer": {"name": "linformer", "rank": 5, "seed": 0}}
    described = attention_measure.describe(options, patches=16, dim=8, heads=2)
    assert described["softmax"]["own_parameters"] == 0
    assert described["softmax"]["parameters"] == 8 * 24 + 24 + 8 * 8 + 8
    assert described["linformer"]["own_parameters"] == 2 * 5 * 17


# Time and memory -----------------------------------------------------------------------------------------------------

SIZES = {"dim": 16, "heads": 2, "batch": 1, "seconds": 0.02, "limit": 10, "device": "cpu"}
TWO = {"softmax": {"name": "softmax"}, "local": {"name": "local", "window_size": 2}}


def test_rows_say_what_was_measured():
    rows = measure(TWO, patches=[16, 9], directions=["forward", "forward+backward"], **{**SIZES, "batch": 3})
    keys = [(row["patches"], row["direction"], row["mechanism"]) for row in rows]
    directions = ("forward", "forward+backward")
    assert keys == [(n, direction, name) for n in (9, 16) for direction in directions for name in TWO]
    for row in rows:
        module = attention_measure.build(TWO[row["mechanism"]], **layer_geometry(row["patches"], dim=16, heads=2))
        assert row["flops"] == 3 * attention_flops(module, 1 + row["patches"]) and row["batch"] == 3
        assert row["quartiles_ms"][0] <= row["ms"] <= row["quartiles_ms"][1] and row["repeats"] >= 3
    for base, row in zip(rows[::2], rows[1::2], strict=True):
        assert base["ratio"] == 1 and row["ratio"] == pytest.approx(base["ms"] / row["ms"])


def test_slow_calls_are_foretold_and_left_out():
    rows = measure(TWO, patches=[9, 16, 25], directions=["forward"], **{**SIZES, "limit": 1e-7})
    assert [row["skipped"] for row in rows] == [None] * 2 + ["skipped (> 1e-07 s)"] * 4
    assert all(row["ms"] is None and row["ratio"] is None for row in rows[2:])


def test_calls_are_left_out_for_time_or_memory(monkeypatch):
    last = {"ms": 100, "flops": 10, "memory_mb": 50, "skipped": None}
    monkeypatch.setattr(attention_measure, "free_memory", lambda device: 1e9)
    assert refusal(None, 1e12, limit=1, device="cpu") is None
    assert refusal(last, 99, limit=1, device="cpu") is None
    assert refusal(last, 101, limit=1, device="cpu") == "skipped (> 1 s)"
    assert refusal(last, 159, limit=100, device="cpu") is None
    assert refusal(last, 161, limit=100, device="cpu") == "skipped (> 0.8 GB)"
    assert refusal({**last, "skipped": "why"}, 1, limit=100, device="cpu") == "why"
    monkeypatch.setattr(attention_measure, "free_memory", lambda device: None)
    assert refusal(last, 161, limit=100, device="cpu") is None


def test_one_thread_is_not_charged_for_waiting(monkeypatch):
    for threads, waits in ((1, False), (2, True)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        times = attention_measure.call_times({"nap": lambda: time.sleep(0.01)}, seconds=0.001, device="cpu")["nap"]
        assert len(times) >= 3 and all((value >= 0.01) == waits for value in times)
        assert attention_measure.own_time("cpu") != waits and not attention_measure.own_time("cuda")


def test_inputs_lie_in_memory_as_the_layer_leaves_them():
    module = attention_measure.build(TWO["softmax"], **layer_geometry(9, dim=16, heads=2))
    inputs = layer_inputs(2, 10, 16, 2, "cpu")
    split = module.split(torch.randn(2, 10, 16))
    assert [x.shape for x in inputs] == [split[0].shape] * 4
    assert [x.stride() for x in inputs[:3]] == [x.stride() for x in split]
    assert inputs[3].transpose(1, 2).is_contiguous()
    assert not torch.equal(inputs[0], inputs[1])


def test_calls_attend_forward_and_backward():
    """Forward as in evaluation; backward in training, for inputs and own parameters."""
    options = {"name": "linformer", "rank": 3, "seed": 0, "attn_drop": 0.5}
    module = attention_measure.build(options, **layer_geometry(9, dim=16, heads=2))
    q, k, v, d_out = inputs = layer_inputs(1, 10, 16, 2, "cpu")
    out = make_call(module, "forward", inputs)()
    assert out.is_inference() and torch.equal(out, module.eval().attend(q, k, v))
    call = make_call(module, "forward+backward", inputs)
    torch.manual_seed(0)
    gradients = call()
    wanted = [*(x.clone().requires_grad_() for x in (q, k, v)), module.key_projection, module.value_projection]
    torch.manual_seed(0)
    expected = torch.autograd.grad(module.train().attend(*wanted[:3]), wanted, d_out)
    assert len(gradients) == 5
    assert all(torch.allclose(got, own, atol=1e-6) for got, own in zip(gradients, expected, strict=True))
    dropless = torch.autograd.grad(module.eval().attend(*wanted[:3]), wanted, d_out)
    assert not torch.allclose(gradients[0], dropless[0], atol=1e-3)


# Errors and maps -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen():
    """The shipped encoder on its own size, pictures, and what enters its layers."""
    encoder, images = encoder_at(96), scenes(96, 2)
    return encoder, images, attention_inputs(encoder, images.float() / 127.5 - 1)


def test_activations_are_those_of_the_shipped_encoder(seen):
    encoder, images, inputs = seen
    shipped = load_encoder(attention_error.ENCODER)
    x = images.float() / 127.5 - 1
    with torch.no_grad():
        assert torch.equal(encoder(x), shipped(x))
        tokens = shipped.vit.norm_pre(shipped.vit._pos_embed(shipped.vit.patch_embed(x)))
        for block, got in zip(shipped.vit.blocks, inputs, strict=True):
            assert torch.allclose(got, block.norm1(tokens), atol=1e-5)
            tokens = block(tokens)
    assert images.shape == (2, 3, 96, 96) and (images[0] != images[1]).any()
    assert not encoder.vit.blocks[0].attn._forward_pre_hooks


def test_relative_error_is_that_of_frobenius_norms():
    a, b = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    assert relative_error(a, b) == pytest.approx(3 / 4)


@pytest.mark.parametrize("name", ["fibottention_exclude", "local", "causal_eva_text", "softmax"])
def test_errors_follow_from_the_weights(name, seen, monkeypatch):
    """In float64 from the maps of all layers."""
    encoder, images, inputs = seen
    monkeypatch.setattr(attention_error, "SIZES", (96,))
    options = read_configs([name])[name] | ({"window_size": 4, "chunk_size": 2} if name == "causal_eva_text" else {})
    (row,) = measure_errors({name: options}, images=2)
    errors = [[], []]
    for seed, layer in ((seed, layer) for seed in attention_error.SEEDS for layer in range(4)):
        own = encoder.vit.blocks[layer].attn
        module = attention_measure.build(options, seed=seed, **attention_error.geometry_of(encoder, layer))
        module.load_state_dict({key: x for key, x in own.state_dict().items()}, strict=False)
        with torch.no_grad():
            q, k, v = (x.double() for x in own.split(inputs[layer]))
            scores = q @ k.mT * q.shape[-1] ** -0.5
            if name == "causal_eva_text":
                scores = scores.masked_fill(torch.ones(37, 37).triu(1).bool(), -torch.inf)
            expected = scores.softmax(dim=-1) @ v
            out = module.attention_map(inputs[layer]).double() @ v
        errors[seed > 0].append(((out - expected).square().sum() / expected.square().sum()).sqrt().item())
    every = errors[0] + errors[1]
    assert row["error"] == pytest.approx(np.mean(every), abs=1e-5)
    assert row["layers"] == pytest.approx(np.reshape(every, (-1, 4)).mean(axis=0), abs=1e-5)
    means = np.reshape(every, (-1, 4)).mean(axis=1)
    assert row["std"] == pytest.approx(means.std(ddof=1), abs=1e-6) and (row["std"] > 0) == (name == "causal_eva_text")
    assert row["patches"] == 36 and row["causal"] == row["trainable"] == (name == "causal_eva_text")


def test_larger_pictures_have_more_patches(monkeypatch):
    monkeypatch.setattr(attention_error, "SIZES", (96, 128))
    rows = measure_errors(read_configs(["local"]), images=1)
    assert [(row["mechanism"], row["patches"]) for row in rows] == [
        (name, patches) for patches in (36, 64) for name in ("softmax", "local")
    ]


def test_maps_are_those_of_the_encoder_or_say_why_not(monkeypatch):
    configs = {"softmax": {"name": "softmax"}, "local": {"name": "local"}, "bare": {"name": "ra"}}
    monkeypatch.setattr(ATTENTIONS["ra"], "has_map", False)
    picture, grid, maps = measure_maps(configs, layer=2, head=3)
    assert picture.shape == (224, 224, 3) and grid == (14, 14) and list(maps) == list(configs)
    encoder = encoder_at(224)
    x = attention_inputs(encoder, scenes(224, 1).float() / 127.5 - 1)[2]
    with torch.no_grad():
        q, k, _ = encoder.vit.blocks[2].attn.split(x)
        expected = (q @ k.mT / math.sqrt(32)).softmax(dim=-1)[0, 3]
    assert torch.allclose(maps["softmax"], expected, atol=1e-6)
    assert (maps["local"][5] > 0).sum() == 5  # its window of four and the class token
    assert "RandomizedAttention" in maps["bare"]


# Training ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder of two colours, 8 for training and 4 for testing of each."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for place, colour in enumerate(("red", "blue")):
            (root / split / colour).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 90, (16, 16, 3), dtype=np.uint8)
                pixels[..., 2 * place] += 150
                Image.fromarray(pixels).save(root / split / colour / f"{number}.png")
    return root


NUMBERS = ("top1", "top1_ci95", "chance", "test_samples", "parameters", "minutes")
SMALL = ["encoder.dim=16", "encoder.depth=1", "encoder.num_heads=2", "image_size=16", "workers=0"]
SMALL += ["training.batch_size=8", "base_lr=0.3", "device=cpu"]


def test_each_mechanism_and_seed_is_trained_once(folder, tmp_path, runs):
    options = {"data": str(folder), "overrides": SMALL, "epochs": 1}
    rows = train(["softmax", "local"], tmp_path, seeds=2, **options)
    keys = [("softmax", 42), ("local", 42), ("softmax", 43), ("local", 43)]
    assert [(row["mechanism"], row["seed"]) for row in rows] == keys
    summary = tmp_path / "local" / "42" / "summary.json"
    stored, written = json.loads(summary.read_text()), summary.stat().st_mtime_ns
    assert all(rows[1][key] == stored[key] for key in NUMBERS) and stored["attention"] == "local"
    assert stored["mode"] == "scratch" and stored["test_samples"] == 8
    assert train(["local"], tmp_path, **options) == [rows[1]] and summary.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="output"):
        train(["softmax"], tmp_path, **{**options, "epochs": 3})
    summary.unlink()  # stopped before its test: it goes on, and all steps are behind it
    (again,) = train(["local"], tmp_path, **options)
    assert again["top1"] == rows[1]["top1"] and again["test_samples"] == 8


def test_changes_reach_the_configuration(folder):
    config = configure("local", 43, data=str(folder), preset="image_small", epochs=2, overrides=SMALL)
    assert config.attention.name == "local" and config.seed == config.training.seed == 43
    assert config.training.epochs == 2 and config.preset == "image_small" and config.encoder.dim == 16
    assert configure("local", 42).data == "pusht_octant"


def test_accuracies_are_averaged_over_seeds():
    rows = [
        {"mechanism": name, "top1": top1, "top1_ci95": [0.1, 0.9], "minutes": minutes}
        for name, top1, minutes in (("a", 0.5, 1), ("b", 0.25, 2), ("a", 0.6, 3))
    ]
    summaries = summarise(rows)
    assert summaries["b"] == {"top1": 0.25, "interval": [0.1, 0.9], "minutes": 2, "seeds": 1}
    half = 12.706 * np.std([0.5, 0.6], ddof=1) / math.sqrt(2)  # Student's t, one degree of freedom
    assert summaries["a"]["top1"] == pytest.approx(0.55) and summaries["a"]["minutes"] == 2
    assert summaries["a"]["interval"] == pytest.approx([max(0.55 - half, 0), min(0.55 + half, 1)], abs=1e-3)


# The command ---------------------------------------------------------------------------------------------------------

TRAINED = {"top1_ci95": [0.5, 0.9], "chance": 0.5, "test_samples": 10, "parameters": 3, "minutes": 1.5}
TINY = ["--dim", "16", "--heads", "2", "--seconds", "0.02", "--images", "1", "--device", "cpu", "--patches", "9", "16"]


@pytest.mark.slow
def test_command_writes_everything(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attention_error, "SIZES", (96,))
    trained = [{"mechanism": "local", "seed": 42, "top1": 0.75, **TRAINED}]
    monkeypatch.setattr(
        attention, "train", lambda names, folder, **changes: trained if names == ["softmax", "local"] else []
    )
    attention.main(["--attention", "local", *TINY, "--quick", "--train", "--output", str(tmp_path)])
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {"latency.png", "tradeoff.png", "training.png", "gallery.png"}
    assert names == {"results.json", "results.csv", "results.md", "index.html", *pictures}
    for name in pictures:
        assert Image.open(tmp_path / name).size[0] > 500
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["settings"]["patches"] == [9, 16] and found["settings"]["directions"] == ["forward"]
    assert found["training"] == trained and len(found["rows"]) == 4 and len(found["errors"]) == 2
    assert found["command"].startswith("python -m eval.attention --attention local --dim 16")
    text = (tmp_path / "results.md").read_text()
    assert "## Overview" in text and "## Trained" in text and text in capsys.readouterr().out
    assert (tmp_path / "index.html").read_text().count("data:image/png") == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attention", "sofmax"], "--attention: got 'sofmax' (did you mean 'softmax'?), allowed: "),
        (["--patches", "0"], "--patches: got 0, allowed: > 0"),
        (["--limit", "0"], "--limit: got 0.0, allowed: > 0"),
        (["--dim", "16", "--heads", "3", "--attention", "softmax"], "num_heads: got 3, allowed: a divisor of dim 16"),
        (["--device", "tpu"], "--device: got 'tpu', allowed: auto, cpu, cuda"),
    ],
)
def test_wrong_options_are_one_line(options, message, capsys):
    with pytest.raises(SystemExit):
        attention.main(options)
    assert f"error: {message}" in capsys.readouterr().err
