"""Attention maps: the weights are those that the layers use, pictures show what they say, errors take one line."""

import numpy as np
import pytest
import tiny
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from eval import attention_map
from eval.attention import pictures as attention_pictures
from eval.attention.pictures import diagonals, head_colours, reach
from eval.attention_map import encoder_weights, main, observation, parse_query, pattern_of
from policy.attention import build_attention, list_attentions, wythoff_offsets
from policy.build import build_model
from policy.checkpoint import load_encoder

FIBOTTENTION = [  # dense: compiles nothing; the kernels have tests of their own
    {"name": "fibottention", "variant": variant, "masked_score": rule, "backend": "dense"}
    for variant in ("paper", "robot")
    for rule in ("zero", "exclude")
]


def layer(attention, *, prefix_tokens, patches=12, heads=8):
    torch.manual_seed(0)
    options = {key: value for key, value in attention.items() if key != "name"}
    geometry = {"num_patches": patches, "grid": (patches // 4, 4), "layer": 1, "depth": 2}
    geometry |= {"dim": 16, "num_heads": heads, "prefix_tokens": prefix_tokens}
    return build_attention(attention["name"], **geometry, **options)


def values_weighed(module, weights, x):
    """What ``module`` must return for x (B, P+N, C) if ``weights`` are its own."""
    batch, tokens, dim = x.shape
    v = module.qkv(x)[..., 2 * dim :].unflatten(2, (module.num_heads, -1)).transpose(1, 2)
    return module.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


def checkpoint(path, *, size=24, crop=20, attention=None, encoder=None, cameras=("image",), arch=None):
    """The file of a fresh tiny policy on Push-T whose images are size x size px."""
    config = tiny.policy_config(images=True, crop=crop, encoder={"depth": 2, **(encoder or {})})
    config["task"]["env"] = {"name": "pusht", "image_size": size}
    obs = config["task"]["shape_meta"]["obs"]
    del obs["image"]
    obs |= {camera: {"type": "rgb", "shape": [3, size, size]} for camera in cameras}
    config["attention"] = attention or FIBOTTENTION[3]
    if arch:
        config["encoder"] = arch
    torch.manual_seed(0)
    model = build_model(config)
    for name, tensor in model.state_dict().items():
        if name.endswith("qkv.weight"):
            tensor *= 20  # a fresh layer attends to all tokens alike
    return tiny.save(path, model, config)


def pixels(path):
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB")) / 255


def share_of(colour, picture):
    return (np.abs(picture - to_rgb(colour)).max(axis=-1) < 0.01).mean()


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix_tokens", [0, 1, 2])
@pytest.mark.parametrize("attention", FIBOTTENTION, ids=str)
def test_pattern_of_fibottention_is_its_mask(attention, prefix_tokens):
    """By the published rule unattended pairs of a row all weigh exp(0), by the other one nothing."""
    module = layer(attention, prefix_tokens=prefix_tokens)
    with torch.no_grad():
        weights = module.attention_map(3 * torch.randn(2, 12 + prefix_tokens, 16))
    attended = pattern_of(module, 12 + prefix_tokens)
    assert attended.shape == weights.shape[1:] and attended.dtype == torch.bool
    if attention["masked_score"] == "exclude":
        assert torch.equal(weights > 0, attended.expand_as(weights))
    for row, mask in zip(weights[0].flatten(0, 1), attended.flatten(0, 1), strict=True):
        assert mask.all() or len(row[~mask].unique()) == 1


@pytest.mark.parametrize("name", [name for name in list_attentions() if name != "fibottention"])
def test_what_no_query_looks_at_has_no_weight(name):
    module = layer({"name": name}, prefix_tokens=1).eval()
    with torch.no_grad():
        attended, weights = pattern_of(module, 13), module.attention_map(3 * torch.randn(2, 13, 16))
    assert attended.shape == weights.shape[1:] and attended.any(dim=-1).all()
    torch.testing.assert_close(weights[:, ~attended], torch.zeros_like(weights[:, ~attended]))


@pytest.mark.parametrize("attention", [FIBOTTENTION[1], {"name": "softmax"}], ids=str)
def test_weights_of_an_encoder_are_those_on_its_way(tmp_path, attention):
    encoder = load_encoder(checkpoint(tmp_path / "x", attention=attention))
    image = torch.rand(3, 20, 20) * 2 - 1
    seen = []
    for block in encoder.vit.blocks:
        block.attn.register_forward_hook(lambda module, arguments, out: seen.append((module, arguments[0], out)))
    with torch.no_grad():
        encoder(image[None])
    captured, before = list(seen), len(encoder.vit.blocks[0].attn._forward_pre_hooks)
    weights = encoder_weights(encoder, image)
    assert len(weights) == len(captured) == 2 and weights[0].shape == (2, 26, 26)
    for one, (module, x, out) in zip(weights, captured, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(values_weighed(module, one[None], x), out, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)
    assert len(encoder.vit.blocks[0].attn._forward_pre_hooks) == before == 0


# Patterns ------------------------------------------------------------------------------------------------------------


def test_reach_is_the_number_of_layers_of_the_shortest_chain():
    generator = torch.Generator().manual_seed(0)
    patterns = [torch.rand(2, 21, 21, generator=generator) < 0.04 for _ in range(4)]
    found = reach(patterns, 1)
    for query in range(20):
        # Backwards from the last layer: what the output of layer k at ``query`` depends on.
        for number in range(1, 5):
            needed = {query}
            for pattern in reversed(patterns[:number]):
                links = pattern.any(dim=0)[1:, 1:]
                needed |= {key for one in needed for key in range(20) if links[one, key]}
            assert {key for key in range(20) if 0 < found[query, key] <= number} == needed
    assert {0, 1, 2, 3} <= set(found.unique().tolist())
    assert (reach([torch.ones(1, 5, 5, dtype=torch.bool)], 1) == 1).all()


def test_diagonals_and_colours_of_heads():
    offsets = wythoff_offsets(30, 4)
    patterns = attention_map.geometry_patterns(patches=30, heads=4, depth=3, variant="paper", modified=True)
    assert len(patterns) == 3 and patterns[0].shape == (4, 31, 31)
    counts = sorted(sum(1 + (offset > 0) for offset in head if offset < 30) for head in offsets)
    for one in patterns:
        assert sorted(diagonals(pattern[1:, 1:]) for pattern in one) == counts
    colours = head_colours(patterns)
    named = {}
    for layer_colours, one in zip(colours, patterns, strict=True):
        assert len({tuple(colour) for colour in layer_colours}) == 4
        for colour, pattern in zip(layer_colours, one, strict=True):
            assert torch.equal(named.setdefault(tuple(colour), pattern), pattern)
    ordered = sorted(named.items(), key=lambda item: item[1].sum().item())
    green = [colour[1] for colour, _ in ordered]
    assert green == sorted(green)  # viridis, yellow is the densest
    assert len(named) == 4 and not torch.equal(patterns[0], patterns[1])


def test_blocks_of_a_matrix_lose_nothing():
    matrix = np.arange(100).reshape(10, 10)
    blocks = attention_pictures._blocks(matrix, 3)
    assert np.array_equal(blocks.min(axis=(1, 3)), matrix[::3, ::3])
    assert np.array_equal(blocks.max(axis=(1, 3)), matrix[[2, 5, 8, 9]][:, [2, 5, 8, 9]])
    assert np.array_equal(attention_pictures._blocks(matrix, 1)[:, 0, :, 0], matrix)


def test_a_large_coverage_shows_the_most_heads_and_the_earliest_layer_of_a_dot(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(attention_pictures, "MATRIX", 7)
    monkeypatch.setattr(attention_pictures, "_discrete", lambda axes, *rest, zero: drawn.append(rest))
    patterns = attention_map.geometry_patterns(patches=14, heads=3, depth=2, variant="paper", modified=True)
    attention_pictures.plot_coverage(patterns, 1, tmp_path / "coverage.png")
    (most, *_), (earliest, step, _, names) = drawn
    seen, layers = patterns[0][:, 1:, 1:].sum(dim=0), reach(patterns, 1)
    assert step == 2 and most.shape == earliest.shape == (7, 7) and len(names) == 1 + layers.max()
    for row in range(7):
        for column in range(7):
            dot = np.s_[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert most[row, column] == seen[dot].max()
            assert earliest[row, column] == min(layers[dot][layers[dot] > 0].tolist(), default=0)
    assert 0 in layers and set(np.unique(earliest)) == {0, 1, 2}


@pytest.mark.parametrize(("bitmap", "step"), [(230, 1), (10, 3)])
def test_the_bitmaps_show_each_pair(tmp_path, monkeypatch, bitmap, step):
    """Once, or where a dot stands for step x step pairs, any of them."""
    monkeypatch.setattr(attention_pictures, "BITMAP", bitmap)
    patterns = attention_map.geometry_patterns(patches=20, heads=3, depth=2, variant="robot", modified=True)
    attention_pictures.plot_pattern(patterns, 1, tmp_path / "pattern.png")
    picture = pixels(tmp_path / "pattern.png")
    side = 21 // step
    scale = max(1, round(bitmap / 21))  # px a dot
    dots = picture.shape[0] * picture.shape[1] / scale**2
    class_token = share_of(attention_pictures.CLASS_COLOUR, picture) * dots
    assert class_token == pytest.approx(2 * 3 * (2 * side - 1), rel=0.02)
    for pattern, colour in zip(patterns[0], head_colours(patterns)[0], strict=True):
        seen = {(i // step, j // step) for i, j in pattern.nonzero().tolist()}
        seen = {dot for dot in seen if 0 not in dot}  # without those that have a class token
        assert share_of(colour[:3], picture) * dots == pytest.approx(2 * len(seen), rel=0.02)  # in both layers


def test_a_tinted_picture_shows_the_image_the_weights_and_what_is_not_seen():
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    picture = np.full((9, 9, 3), 255, np.uint8)
    picture[0, 0] = 0
    values = np.array([[1.0, 0.0], [0.5, 0.25]])
    scale = ScalarMappable(Normalize(0, 1), "YlOrRd")
    tinted = attention_pictures.tint(picture, values, scale, 4)
    assert tinted.shape == (9, 9, 3) and (tinted[0, 0] == 0).all() and (tinted[8] == 1).all()
    assert np.allclose(tinted[3, 3], scale.to_rgba(1.0)[:3]) and np.allclose(tinted[4, 3], scale.to_rgba(0.5)[:3])
    assert np.allclose(tinted[0, 4:8], to_rgb(attention_pictures.BLIND_COLOUR))


# The command ---------------------------------------------------------------------------------------------------------


def test_pictures_of_the_shipped_policy_and_of_a_geometry(tmp_path, capsys):
    options = ["--patches", "30", "--heads", "3", "--depth", "2", "--variant", "robot", "--no-modified"]
    main(["--output", str(tmp_path), *options])
    assert capsys.readouterr().out == f"wrote {tmp_path}/pattern.png, coverage.png and attention.png\n"
    shapes = {name: pixels(tmp_path / f"{name}.png").shape for name in ("pattern", "coverage", "attention")}
    assert shapes["pattern"][1] > 3 * 31 * 7 and shapes["pattern"][0] > 2 * 31 * 7  # three heads, two layers
    assert shapes["attention"][1] > 1.5 * shapes["attention"][0] > 750  # four layers; image, two maps and four heads


@pytest.mark.parametrize("option", [["--patches", "25"], ["--heads", "3"], ["--depth", "3"], ["--variant", "robot"], ["--no-modified"]])  # fmt: skip  # noqa: E501
def test_options_change_the_geometry(tmp_path, monkeypatch, option):
    shown = []
    for name in ("plot_coverage", "plot_attention"):
        monkeypatch.setattr(attention_map, name, lambda *arguments, **options: None)
    monkeypatch.setattr(attention_map, "plot_pattern", lambda patterns, *rest: shown.append(patterns))
    base = ["--output", str(tmp_path), "--patches", "30", "--heads", "2", "--depth", "2", "--variant", "paper"]
    main(base)
    main([*base, *option])
    one, other = shown
    assert len(one) == 2 and one[0].shape == (2, 31, 31)
    assert len(one) != len(other) or not all(map(torch.equal, one, other))


def captured_call(monkeypatch, *arguments):
    """Keyword arguments and results that main hands to the three plots."""
    calls = {}
    for name in ("plot_pattern", "plot_coverage", "plot_attention"):
        monkeypatch.setattr(attention_map, name, lambda *given, name=name, **options: calls.update({name: (given, options)}))  # fmt: skip  # noqa: E501
    main([str(argument) for argument in arguments])
    return calls


def test_a_checkpoint_shows_its_own_geometry_image_and_crop(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "x", attention=FIBOTTENTION[3])
    Image.fromarray(np.arange(30 * 48 * 3, dtype=np.uint8).reshape(30, 48, 3)).save(tmp_path / "picture.png")
    calls = captured_call(monkeypatch, "--checkpoint", path, "--output", tmp_path, "--image", tmp_path / "picture.png")
    (patterns, prefix_tokens, _), _ = calls["plot_pattern"]
    encoder = load_encoder(path)
    assert prefix_tokens == 1 and len(patterns) == 2
    for pattern, block in zip(patterns, encoder.vit.blocks, strict=True):
        assert torch.equal(pattern, pattern_of(block.attn, 26))
    (weights, picture), options = calls["plot_attention"]
    raw = observation(encoder.config, "image", image=tmp_path / "picture.png", seed=0)
    assert raw.shape == (3, 24, 24) and raw.dtype == torch.uint8
    assert np.array_equal(picture, raw.numpy().transpose(1, 2, 0)[2:22, 2:22])  # centre crop of 20 px
    assert (options["grid"], options["patch"], options["query"]) == ((5, 5), 4, (2, 2))
    expected = encoder_weights(encoder, torch.from_numpy(picture.transpose(2, 0, 1).copy()) / 127.5 - 1)
    assert all(map(torch.equal, weights, expected))
    assert "x: fibottention" in options["title"] and "masked_score exclude" in options["title"]


def test_without_an_image_the_simulator_shows_one_of_the_seed(tmp_path, monkeypatch):
    from envs import make_env

    path = checkpoint(tmp_path / "x", crop=None)
    env = make_env("pusht", image_size=24)
    seen = []
    for seed in (3, 4):
        calls = captured_call(monkeypatch, "--checkpoint", path, "--output", tmp_path, "--seed", seed)
        env.reset(seed)
        seen.append(calls["plot_attention"][0][1])
        assert np.array_equal(seen[-1], env.image())
    assert not np.array_equal(*seen)


def test_several_cameras_and_other_encoders(tmp_path, monkeypatch):
    path = checkpoint(
        tmp_path / "x", cameras=("left", "right"), attention={"name": "softmax"}, encoder={"stem": "conv"}
    )
    Image.new("RGB", (24, 24), "red").save(tmp_path / "red.png")
    given = ["--checkpoint", path, "--output", tmp_path / "out", "--image", tmp_path / "red.png", "--query", "0,4"]
    calls = {camera: captured_call(monkeypatch, *given, "--camera", camera) for camera in ("left", "right")}
    left, right = (call["plot_attention"] for call in calls.values())
    assert not torch.allclose(left[0][0][0], right[0][0][0], atol=1e-3)
    assert left[1]["query"] == (0, 4) and left[1]["patch"] == 4  # a convolution stem does not name its patch size
    monkeypatch.undo()
    main([str(argument) for argument in [*given, "--camera", "left"]])
    sizes = {name: (tmp_path / "out" / f"{name}.png").stat().st_size for name in ("pattern", "coverage", "attention")}
    assert min(sizes.values()) > 5000


ERRORS = {  # what main gets, and the key that its error names; {x} and {resnet} are checkpoints, {text} a text file
    "checkpoint": (["--checkpoint", "nowhere"], "checkpoint"),
    "encoder": (["--checkpoint", "{resnet}"], "encoder"),
    "camera": (["--checkpoint", "{x}"], "camera"),
    "no image": (["--image", "nowhere.png"], "--image"),
    "not an image": (["--image", "{text}"], "cannot identify image file"),
    "query": (["--query", "6,0"], "--query"),
    "patches": (["--patches", "0"], "--patches"),
    "many patches": (["--patches", "1601"], "--patches"),
    "depth": (["--depth", "0"], "--depth"),
    "heads": (["--heads", "0"], "num_tokens, num_heads"),
    "variant": (["--variant", "robots"], "variant"),
    "both": (["--checkpoint", "{x}", "--heads", "3"], "--heads"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_input_gives_one_line(tmp_path, monkeypatch, capsys, case):
    options, key = ERRORS[case]
    if "{resnet}" in options:
        resnet = {"name": "resnet18", "init": "none", "freeze": False}
        checkpoint(tmp_path / "resnet", size=40, crop=None, arch=resnet)
    if "{x}" in options:
        checkpoint(tmp_path / "x", cameras=("left", "right"))
    (tmp_path / "text").write_text("no picture")
    names = {name: tmp_path / name for name in ("resnet", "x", "text")}
    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "out"), *(option.format(**names) for option in options)])
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and line.startswith(f"error: {key}") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "-1,0", "a,b", "0,7", "6,0", "1.5,0"])
def test_queries_outside_of_the_grid_are_refused(text):
    assert parse_query(None, (6, 7)) == (3, 3) and parse_query("5, 6", (6, 7)) == (5, 6)
    with pytest.raises(ValueError, match="--query"):
        parse_query(text, (6, 7))
