"""State decoders against an evaluation pixel by pixel (arXiv 2307.01849), and what they do to training."""

import copy

import numpy as np
import pytest
import tiny
import torch
from crossway_reference import by_hand
from PIL import Image
from trained import assert_identical, everything, start

from policy.build import build_model
from policy.checkpoint import load_policy, load_weights
from policy.dataset.features import cache_features
from policy.decoder import build_decoder, list_decoders
from policy.training.batches import to_tensors
from policy.training.run_folder import RunFolder

TYPES = [name for name in list_decoders() if name != "none"]
META = {**tiny.IMAGE, **tiny.LOW_DIM}
OPTIONS = {key: value for key, value in tiny.DECODER.items() if key != "name"}


def decoder_of(name, *, shape_meta=META, bottleneck=(16, 4), **changes):
    """A decoder of the tiny policy's sizes: two observed steps, a condition of 7."""
    torch.manual_seed(0)
    sizes = {"obs_steps": 2, "bottleneck": bottleneck, "condition_dim": 7}
    return build_decoder(name, shape_meta=shape_meta, **sizes, **{**OPTIONS, **changes})


def inputs(batch=3, side=2):
    generator = torch.Generator().manual_seed(1)
    bottleneck = torch.randn(batch, 16, side * side, generator=generator, dtype=torch.float64)
    return bottleneck, torch.randn(batch, 2, 7, generator=generator, dtype=torch.float64)


def policy_with(name, *, images=True, seed=0, **changes):
    """A tiny policy with that decoder ("plain": none is configured), and its windows, the normaliser fitted to them."""
    model = {} if name == "plain" else {"decoder": {"name": name, **OPTIONS, **changes}}
    config = tiny.policy_config(images=images, model=model)
    torch.manual_seed(seed)
    policy = build_model(config).eval()
    data = tiny.window_data(config, tiny.replay_buffer(images=images))
    policy.fit_normalizer(data)
    return policy, data


def batch_of(policy, data, indices=(0, 1, 9, 20), crop=0.0):
    """Tensors and randomness of the loss; ``crop``: position of every crop."""
    batch = to_tensors(data.batch(np.array(indices)), "cpu")
    if policy.encoder.cameras:
        batch["crop"] = torch.full((len(batch["frame_id"]), 2), crop)
    return batch, policy.randomness(len(indices), torch.Generator().manual_seed(3))


# By hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("image_size", [None, 10])  # of 5 pixels before upsampling only the third tile's half is there
@pytest.mark.parametrize("name", TYPES)
def test_equals_an_evaluation_by_hand(name, image_size, side):
    decoder = decoder_of(name, image_size=image_size, bottleneck=(16, side * side)).double()
    bottleneck, condition = inputs(batch=2, side=side)
    with torch.no_grad():
        got, expected = decoder(bottleneck, condition), by_hand(decoder, name, bottleneck, condition)
    size = image_size or 12
    shapes = {"image": (2, 2, 3, size, size), **({} if name == "d" else {"agent_pos": (2, 2, 2)})}
    assert {key: tuple(value.shape) for key, value in got.items()} == shapes
    for key, value in got.items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-5)  # the code is float32


# In the loss -----------------------------------------------------------------------------------------------------


def decode_gradients(policy, batch, randomness):
    """{parameter: gradient of the decoder's share of the loss}."""
    gradients = []
    for decoder in (policy.decoder, None):
        policy.zero_grad()
        policy.decoder, kept = decoder, policy.decoder
        policy(batch, randomness)["loss"].backward()
        gradients.append({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in policy.named_parameters()})
        policy.decoder = kept
    return {name: value - gradients[1].get(name, 0) for name, value in gradients[0].items()}


@pytest.mark.parametrize("name", TYPES)
def test_where_the_gradient_goes(name):
    """The U-Net's way down and middle learn from a, b and c; its way up from none; the encoder from all."""
    policy, data = policy_with(name, weight=3.0)
    gradients = decode_gradients(policy, *batch_of(policy, data))
    reached = {".".join(key.split(".")[:2]) for key, value in gradients.items() if value.abs().max() > 0}
    unet = {"denoiser.down", "denoiser.middle", "denoiser.step_embedding"}
    own = {"decoder.decoders"} | ({"decoder.reduce"} if name == "d" else set())
    assert reached == {"encoder.encoders"} | own | (set() if name == "d" else unet)
    unused = [key for key, value in gradients.items() if key.startswith("decoder.") and not value.abs().max() > 0]
    assert not unused


@pytest.mark.parametrize("name", TYPES)
def test_parts_of_the_loss_by_hand(name):
    """Weighted errors of the normalised, uncropped observation; they and the diffusion loss add up to the total."""
    weights = {"agent_pos": 0.7} if name != "d" else {}
    policy, data = policy_with(name, weight=0.3, weights=weights)
    indices = [0, 1, 9, 20]
    batch, randomness = batch_of(policy, data, indices)
    seen = []
    hook = policy.decoder.register_forward_hook(lambda module, arguments, output: seen.append((arguments, output)))
    with torch.no_grad():
        losses = policy(batch, randomness)
        hook.remove()
        features = policy.encoder(batch["obs"], batch["crop"])[batch["frame"]]
    (((bottleneck, condition), decoded),) = seen
    assert torch.equal(condition, features) and bottleneck.shape == (4, 16, 4)

    frames = data.windows[indices][:, :2]
    arrays = data.buffer.arrays
    place = arrays["agent_pos"][data.windows[:, :2]].reshape(-1, 2).astype(np.float64)
    low, high = place.min(0), place.max(0)
    targets = {
        "image": arrays["image"][frames].transpose(0, 1, 4, 2, 3) / 127.5 - 1,
        "agent_pos": 2 * (arrays["agent_pos"][frames] - low) / (high - low) - 1,
    }
    weight = {"image": 0.3, "agent_pos": 0.7}
    errors = {key: ((values.double().numpy() - targets[key]) ** 2).mean() for key, values in decoded.items()}
    expected = {f"decode_{key}": weight[key] * error for key, error in errors.items()}
    assert set(losses) == {"loss", "diffusion", *expected} and len(expected) == (1 if name == "d" else 2)
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value, rel=1e-4) and not losses[key].requires_grad
    policy.decoder = None
    assert losses["diffusion"].item() == pytest.approx(policy(batch, randomness)["loss"].item(), rel=1e-6)
    assert losses["loss"].item() == pytest.approx(losses["diffusion"].item() + sum(expected.values()), rel=1e-4)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_key_of_weight_0_is_not_decoded(name):
    policy, data = policy_with(name, weights={"image": 0})
    assert set(policy.decoder.shapes) == {"agent_pos"} == set(policy.decoder.decoders)
    assert set(policy(*batch_of(policy, data))) == {"loss", "diffusion", "decode_agent_pos"}
    other, _ = policy_with(name, weight=0, weights={"image": 2.0})
    assert set(other.decoder.decoders) == {"image"}


@pytest.mark.parametrize("name", TYPES)
def test_low_dim_and_image_keys_alone(name):
    if name != "d":
        policy, data = policy_with(name, images=False)
        batch, randomness = batch_of(policy, data)
        assert set(policy(batch, randomness)) == {"loss", "diffusion", "decode_agent_pos"}
        assert policy.reconstruct(batch, randomness) == {}
    decoder = decoder_of(name, shape_meta=tiny.IMAGE).double()
    assert set(decoder(*inputs())) == {"image"}


def test_the_crop_does_not_change_the_targets():
    policy, data = policy_with("c")
    (observed, first), (again, second) = (
        policy.reconstruct(*batch_of(policy, data, crop=crop))["image"] for crop in (0.0, 0.9)
    )
    assert torch.equal(observed, again) and observed.shape == (4, 2, 3, 12, 12)
    assert not torch.equal(first, second)  # the encoder did see another one


def test_image_size_resizes_the_target():
    """As PIL does it, with a filter as wide as the shrinking asks for."""
    policy, data = policy_with("a", image_size=6)
    indices = [3, 12]
    observed, reconstructed = policy.reconstruct(*batch_of(policy, data, indices))["image"]
    assert observed.shape == reconstructed.shape == (2, 2, 3, 6, 6)
    frames = data.windows[indices][:, :2]
    for row, step, channel in np.ndindex(2, 2, 3):
        pixels = data.buffer.arrays["image"][frames[row, step]][..., channel] / np.float32(127.5) - 1
        small = Image.fromarray(pixels.astype(np.float32)).resize((6, 6), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(observed[row, step, channel], np.asarray(small), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TYPES)
def test_every_nth_window_is_reconstructed(name):
    policy, data = policy_with(name)
    batch, randomness = batch_of(policy, data, range(7))
    every = policy.reconstruct(batch, randomness)["image"]
    policy.decoder.every = 3
    for got, expected in zip(policy.reconstruct(batch, randomness)["image"], every, strict=True):
        torch.testing.assert_close(got, expected[[0, 3, 6]])
    some = policy(batch, randomness)["decode_image"].item()
    observed, reconstructed = (values[[0, 3, 6]] for values in every)
    assert some == pytest.approx(0.1 * (observed - reconstructed).square().mean().item(), rel=1e-5)
    fewer, _ = policy_with(name, every=3)
    assert fewer.reconstruct(batch, randomness)["image"][0].shape[0] == 3


def test_of_several_diffusion_steps_the_first_is_decoded():
    policy, data = policy_with("c")
    batch, randomness = batch_of(policy, data)
    expected = policy.reconstruct(batch, randomness)["image"][1]
    policy.timesteps_per_sample = 3
    more = policy.randomness(4, torch.Generator().manual_seed(9))
    more["noise"][:, 0], more["steps"][:, 0] = randomness["noise"][:, 0], randomness["steps"][:, 0]
    torch.testing.assert_close(policy.reconstruct(batch, more)["image"][1], expected)


@pytest.mark.parametrize("name", TYPES)
def test_sampling_leaves_the_decoder_out(name):
    policy, _ = policy_with(name)
    rng = np.random.default_rng(0)
    obs = {"agent_pos": rng.uniform(0, 512, (2, 2, 2)), "image": rng.integers(0, 256, (2, 2, 3, 12, 12), np.uint8)}
    calls = []
    for module in policy.decoder.modules():
        module.register_forward_hook(lambda *arguments: calls.append(1))
    chunk = policy.sample(obs, generator=torch.Generator().manual_seed(0))
    policy.decoder = None
    assert torch.equal(policy.sample(obs, generator=torch.Generator().manual_seed(0)), chunk) and not calls


def test_none_is_the_plain_policy():
    (plain, data), (none, _) = policy_with("plain"), policy_with("none")
    assert none.decoder is None
    assert_identical(none.state_dict(), plain.state_dict())
    batch, randomness = batch_of(plain, data)
    losses = none(batch, randomness)
    assert set(losses) == {"loss", "diffusion"} and losses["loss"] == plain(batch, randomness)["loss"]
    assert none.reconstruct(batch, randomness) == {}


@pytest.mark.parametrize("name", TYPES)
def test_cached_features_keep_what_is_reconstructed(name):
    policy, data = policy_with(name)
    batch, randomness = batch_of(policy, data)
    batch.pop("crop")
    expected = policy(batch, randomness)
    cache_features(policy, [data], batch_size=7)
    assert data.obs_keys == ["agent_pos", "features", "image"]
    again = policy(to_tensors(data.batch(np.array([0, 1, 9, 20])), "cpu"), randomness)
    for key, value in expected.items():
        torch.testing.assert_close(again[key], value)


@pytest.mark.parametrize("name", TYPES)
def test_bf16_is_close(name):
    policy, data = policy_with(name)
    batch, randomness = batch_of(policy, data)
    exact = policy(batch, randomness)
    with torch.autocast("cpu", torch.bfloat16):
        rough = policy(batch, randomness)
    for key, value in exact.items():
        assert rough[key].dtype == torch.float32 and rough[key].item() == pytest.approx(value.item(), rel=0.1)


@pytest.mark.parametrize("name", TYPES)
def test_a_decoder_learns(name):
    """Constant observations are reconstructed within some steps."""
    policy, data = policy_with(name, weight=1.0)
    data.buffer.arrays["image"][:] = 200
    batch, randomness = batch_of(policy, data)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    first = policy(batch, randomness)["decode_image"]
    for _ in range(30):
        optimizer.zero_grad()
        policy(batch, randomness)["loss"].backward()
        optimizer.step()
    assert policy(batch, randomness)["decode_image"] < 0.1 * first


# Pictures and checkpoints -------------------------------------------------------------------------------------------


def test_a_run_folder_writes_pictures_only_where_it_may(tmp_path):
    pairs = {"image": (torch.zeros(1, 1, 3, 4, 4),) * 2}
    path = RunFolder(tmp_path, {}, writes=True).save_reconstructions(3, pairs)
    assert path == tmp_path / "reconstructions" / "epoch_0003.png" and path.exists()
    assert RunFolder(tmp_path, {}, writes=True).save_reconstructions(4, {}) is None
    assert RunFolder(tmp_path, {}, writes=False).save_reconstructions(5, pairs) is None
    assert len(list(path.parent.iterdir())) == 1


def test_a_run_logs_parts_draws_pictures_and_resumes_exactly(tmp_path, runs):
    model = {"decoder": {"name": "b", **OPTIONS}}
    straight = start(tmp_path / "straight", images=True, model=model, epochs=2)
    lines = []
    straight.tracker = lines.append
    straight.fit()
    assert all({"train_decode_image", "train_decode_agent_pos"} <= set(line) for line in lines if "lr" in line)
    (validation,) = (line for line in lines if line["step"] == 3 and "val_loss" in line)
    parts = [validation[f"val_{key}"] for key in ("diffusion", "decode_image", "decode_agent_pos")]
    assert validation["val_loss"] == pytest.approx(sum(parts), rel=1e-5)
    pictures = [line["reconstructions"] for line in lines if "reconstructions" in line]
    assert [picture.name for picture in pictures] == ["epoch_0001.png", "epoch_0002.png"]
    start(tmp_path / "parts", images=True, model=model, epochs=2).fit(stop_at=2)
    second = start(tmp_path / "parts", images=True, model=model, epochs=2, fresh=5)
    second.resume()
    second.fit()
    assert_identical(everything(straight), everything(second))
    loaded = load_policy(tmp_path / "parts")
    assert_identical(loaded.state_dict(), straight.ema.model.state_dict())
    refused = start(tmp_path / "parts", images=True, model={"decoder": {"name": "d", **OPTIONS}}, epochs=2)
    before = {key: value.clone() for key, value in refused.raw_model.state_dict().items()}
    with pytest.raises(ValueError, match="decoder.reduce"):
        refused.resume()
    assert_identical(refused.raw_model.state_dict(), before)
    assert_identical(load_policy(tmp_path / "parts").state_dict(), straight.ema.model.state_dict())


@pytest.mark.parametrize(
    ("source", "target", "key"),
    [("a", "plain", "unexpected: decoder.decoders.agent_pos"), ("plain", "a", "missing: decoder.decoders.agent_pos"),
     ("a", "c", "missing: decoder.decoders.image.project"), ("b", "c", "shapes: decoder.decoders.agent_pos")],
)  # fmt: skip
def test_weights_of_another_decoder_are_refused(source, target, key):
    model = policy_with(target)[0]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=key):
        load_weights(model, policy_with(source, seed=1)[0].state_dict(), "file")
    assert_identical(model.state_dict(), before)


# Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("d", {"shape_meta": tiny.LOW_DIM}, "no key"),
        ("a", {"weight": 0}, "no key"),
        ("d", {"weights": {"image": 0}}, "no key"),
        ("b", {"weights": {"image": -1}}, "weight"),
        ("c", {"weight": -0.1}, "weight"),
        ("a", {"weights": {"imag": 1}}, "imag"),
        ("a", {"image_size": -2}, "-2x-2"),
        ("a", {"image_size": 7}, "7x7"),
        ("d", {"shape_meta": {"image": {"type": "rgb", "shape": [3, 11, 12]}}}, "11x12"),
        ("a", {"kernel_size": 4}, "kernel_size"),
        ("b", {"channels": 6}, "channels"),
        ("d", {"code_channels": 10}, "code_channels"),
        ("a", {"bottleneck": (12, 4)}, "12 bottleneck channels"),
        ("b", {"bottleneck": (18, 4)}, "18 bottleneck channels"),
        ("c", {"bottleneck": (17, 4)}, "17 bottleneck channels"),
        ("b", {"bottleneck": (16, 8)}, "8 positions"),
        ("c", {"bottleneck": (16, 2)}, "2 positions"),
        ("a", {"every": 0}, "every"),
        ("e", {}, "decoder"),
    ],
)
def test_impossible_decoders_are_refused(name, options, key):
    with pytest.raises(ValueError, match=key):
        decoder_of(name, **options)
