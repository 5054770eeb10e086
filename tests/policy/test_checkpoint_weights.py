"""Weights that do not fit or are no weights, sizes that no model has, and names that no table has, are refused."""

import functools
import resource
import time

import pytest
import tiny
import torch
from checkpoints import STATE, policy_checkpoint
from torch import nn

from policy import load_encoder, load_policy
from policy.build import build_model
from policy.checkpoint import (
    load_checkpoint,
    load_encoder_weights,
    load_weights,
    save_checkpoint,
)


def test_wrong_shapes_and_keys_are_listed():
    own = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).state_dict()
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    with pytest.raises(ValueError, match=r"enc .*0.bias: got \(5,\), allowed \(4,\), 0.weight"):
        load_weights(own, other, "enc")
    other = {**own.state_dict(), "2.weight": torch.zeros(1)}
    del other["1.bias"]
    with pytest.raises(ValueError, match="1.bias.*2.weight"):
        load_weights(own, other, "enc")
    assert all(torch.equal(before[name], tensor) for name, tensor in own.state_dict().items())


def with_nan(tensor):
    tensor[(-1,) * tensor.ndim] = float("nan")
    return tensor


def with_inf(tensor):
    tensor[(0,) * tensor.ndim] = -float("inf")
    return tensor


VALUES = {  # name of a tensor, how it is damaged, what the line names beside it
    "NaN": ("denoiser.out.1.weight", with_nan, "NaN"),
    "inf": ("denoiser.out.1.bias", with_inf, "NaN or inf"),
    "NaN in the encoder": ("encoder.encoders.image.vit.norm.weight", with_nan, "NaN"),
    "too large for float32": ("denoiser.out.1.bias", lambda t: t.double() + 1e300, "inf"),
    "integers": ("denoiser.out.1.weight", lambda t: t.long(), "int64, allowed: torch.float32"),
    "bytes": ("encoder.encoders.image.vit.norm.weight", lambda t: t.byte(), "uint8"),
    "bool": ("denoiser.out.1.bias", lambda t: t > 0, "bool"),
    "complex": ("denoiser.out.1.bias", lambda t: t.to(torch.complex64), "complex"),
    "scale of 0": ("encoder.normalizer.action_scale", torch.zeros_like, "scale"),
    "a scale below 0": ("encoder.normalizer.agent_pos_scale", torch.neg, "scale"),
    "a scale of almost 0": ("encoder.normalizer.action_scale", lambda t: t * 1e-40, "scale"),
    "NaN as scale": ("encoder.normalizer.action_scale", with_nan, "NaN"),
    "inf as offset": ("encoder.normalizer.agent_pos_offset", with_inf, "inf"),
}


@pytest.mark.parametrize("case", VALUES)
def test_weights_that_are_no_weights_are_refused_by_name(tmp_path, case):
    """By a policy, and by resuming (``load_weights``); the model in training keeps its own."""
    name, damage, text = VALUES[case]
    config = tiny.policy_config(images=True)
    model = build_model(config)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wrong = {**weights, name: damage(weights[name].clone())}
    with pytest.raises(ValueError, match=f"run: {name}: got .*{text}|run.*{name}: got .*{text}"):
        load_weights(model, wrong, "run")
    assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, {f"ema.{key}": tensor for key, tensor in wrong.items()}, config=config, state=STATE)
    for load in (load_policy, load_encoder):
        with pytest.raises(ValueError, match=f"x.safetensors: {name}: got .*{text}"):
            load(path)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_width_become_those_of_the_model(kind):
    model, other = nn.Linear(3, 4), nn.Linear(3, 4)
    weights = {name: tensor.to(kind) for name, tensor in other.state_dict().items()}
    load_weights(model, weights, "x")
    assert model.weight.dtype == torch.float32 and torch.equal(model.weight, weights["weight"].float())


@pytest.mark.parametrize(
    "damage", [with_nan, torch.Tensor.long, lambda tensor: tensor[:, :0]], ids=["NaN", "int", "none"]
)
@pytest.mark.parametrize("key", ["vit.pos_embed", "vit.patch_embed.proj.weight", "vit.norm.weight"])
def test_encoder_weights_are_looked_at_before_they_are_adapted(damage, key):
    """Of an encoder with another grid and patch size."""
    config = tiny.policy_config(images=True)
    source = build_model(config).encoder.encoders["image"].state_dict()
    config["encoder"] |= {"patch_size": 2}
    encoder = build_model(config).encoder.encoders["image"]
    load_encoder_weights(encoder, source, "start")
    wrong = {**source, key: damage(source[key][None].clone())[0]}
    with pytest.raises(ValueError, match="start.*" + key):
        load_encoder_weights(encoder, wrong, "start")


# Bounds --------------------------------------------------------------------------------------------------------------

SIZES = {  # (section, keys..., value), what the line names
    "depth": ("encoder", "depth", 10**6, "depth"),
    "width": ("encoder", "dim", 10**6, "GB"),
    "widths": ("model", "denoiser", "widths", [8, 800_000], "GB"),
    "many widths": ("model", "denoiser", "widths", [8] * 100_000, "widths"),
    "timesteps": ("model", "noise", "num_train_timesteps", 10**9, "num_train_timesteps"),
    "horizon": ("model", "horizon", 2**40, "horizon"),
    "step_dim": ("model", "denoiser", "step_dim", 10**12, "step_dim"),
    "mlp": ("encoder", "mlp_ratio", 1e12, "mlp_ratio"),
    "image": ("task", "shape_meta", "obs", "image", "shape", [3, 10**7, 10**7], "shape"),
    "action": ("task", "shape_meta", "action", "shape", [10**9], "shape"),
    "no depth": ("encoder", "dim", -16, "model|dim"),
    "no timesteps": ("model", "noise", "num_train_timesteps", -1, "noise"),
    "infinite": ("encoder", "mlp_ratio", float("inf"), "mlp_ratio"),
}


def peak_memory():
    """Bytes that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("size", SIZES)
def test_sizes_that_no_model_has_are_refused_before_they_take_memory_or_minutes(tmp_path, size):
    """From a configuration of the command line and from that of a checkpoint."""
    *above, last, value, named = SIZES[size]
    config = tiny.policy_config(images=True, crop=None)
    path = tiny.save(tmp_path / "x.safetensors", build_model(config), config)
    functools.reduce(lambda inner, part: inner[part], above, config)[last] = value
    started, before = time.monotonic(), peak_memory()
    with pytest.raises(ValueError, match=named):
        build_model(config)
    assert peak_memory() - before < 2e8 and time.monotonic() - started < 5
    if size != "infinite":
        tensors, _, state = load_checkpoint(path)
        save_checkpoint(path, {f"ema.{name}": tensor for name, tensor in tensors.items()}, config=config, state=state)
        with pytest.raises(ValueError, match=f"x.safetensors: .*({named})"):
            load_policy(path)


def test_a_configuration_of_another_size_than_its_weights_is_refused_before_it_is_built(tmp_path):
    """A model of 4 GB, which this machine could hold."""
    config = tiny.policy_config()
    path = tmp_path / "x.safetensors"
    weights = build_model(config).state_dict()
    config["model"]["denoiser"]["widths"] = [16, 8192]
    save_checkpoint(path, {f"ema.{name}": tensor for name, tensor in weights.items()}, config=config, state=STATE)
    before = peak_memory()
    with pytest.raises(ValueError, match="x.safetensors does not fit .*denoiser"):
        load_policy(path)
    assert peak_memory() - before < 2e8


PARTS = {  # where a configuration names a part of a registry
    "model": ("model", "name"),
    "encoder": ("encoder", "name"),
    "timm's ViT": ("encoder", "arch"),
    "attention": ("attention", "name"),
    "denoiser": ("model", "denoiser", "name"),
    "decoder": ("model", "decoder", "name"),
    "sampler": ("model", "sampler", "name"),
    "noise": ("model", "noise", "beta_schedule"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["foreign_part:Part", "hf-hub:someone/model", "os", ["a"], None], ids=str)
def test_names_from_a_checkpoint_are_those_of_the_tables(tmp_path, monkeypatch, part, name):
    """A module of that name, beside the user, is never imported, and nothing is downloaded."""
    (tmp_path / "foreign_part.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path, model = policy_checkpoint(tmp_path / "x.safetensors", images=True, model={"decoder": {"name": "none"}})
    config = load_checkpoint(path)[1]
    *above, last = PARTS[part]
    functools.reduce(lambda inner, key: inner[key], above, config)[last] = name
    tiny.save(path, model, config)
    with pytest.raises(ValueError, match="x.safetensors: got a configuration of no model"):
        load_policy(path)
    assert not (tmp_path / "executed").exists()
