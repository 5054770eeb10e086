"""Checkpoints survive kills, full disks and foreign files; loading executes nothing."""

import copy
import functools
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import timm
import tiny
import torch
from paths import ROOT
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from policy import load_encoder, load_policy
from policy.build import build_model
from policy.checkpoint import (
    FORMAT,
    find_checkpoint,
    load_checkpoint,
    load_encoder_weights,
    load_model,
    load_weights,
    save_checkpoint,
)
from policy.export import main as export_command
from policy.head.keypoints import KeypointRegressor

CONFIG = {"seed": 3, "names": ["a", "ü"], "nested": {"lr": 1e-4, "none": None, "flag": True}}
STATE = {"step": 12, "scores": {"step=1.safetensors": 0.5}}


def tensors(seed=0, size=50):
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(size, 3, generator=generator),
        "model.mask": torch.rand(7, generator=generator) > 0.5,
        "ema.weight": torch.randn(size, 3, generator=generator).to(torch.bfloat16),
        "optimizer.step.weight": torch.tensor(12.0),
        "model.ids": torch.arange(5),
    }


def policy_checkpoint(path, seed=0, **options):
    """The path of a checkpoint of a fresh tiny policy, and that policy."""
    torch.manual_seed(seed)
    config = tiny.policy_config(**options)
    model = build_model(config).eval()
    return tiny.save(path, model, config), model


# Round trip ------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    path, saved = tmp_path / "a" / "b" / "x.safetensors", tensors()
    shared = torch.arange(6.0)
    saved["view"], saved["tied"], saved["transposed"] = shared[:3], shared, torch.arange(6).reshape(2, 3).T
    saved["parameter"] = nn.Parameter(torch.ones(2))
    saved["expanded"] = torch.ones(1).expand(4)
    save_checkpoint(path, saved, config=CONFIG, state=STATE)
    loaded, config, state = load_checkpoint(path)
    assert config == CONFIG and state == STATE
    assert set(loaded) == set(saved)
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    assert list(tmp_path.rglob("*.partial*")) == []


def test_prefix_chooses_tensors(tmp_path):
    save_checkpoint(tmp_path / "x", tensors(), config=CONFIG, state=STATE)
    loaded, config, _ = load_checkpoint(tmp_path / "x", prefix="ema.")
    assert list(loaded) == ["weight"] and torch.equal(loaded["weight"], tensors()["ema.weight"]) and config == CONFIG
    assert load_checkpoint(tmp_path / "x", prefix="none")[0] == {}


def test_the_header_is_plain_json(tmp_path):
    """Other tools can read what a checkpoint is without this project."""
    save_checkpoint(tmp_path / "x", tensors(), config=CONFIG, state=STATE)
    with safe_open(tmp_path / "x", framework="np") as file:
        metadata = file.metadata()
    assert metadata["format"] == FORMAT and set(json.loads(metadata["digests"])) == set(tensors())
    assert json.loads(metadata["config"]) == CONFIG and json.loads(metadata["state"]) == STATE


# Wrong files -----------------------------------------------------------------------------------------------------


def test_missing_files(tmp_path):
    for load in (find_checkpoint, load_checkpoint, load_policy, load_encoder):
        for place in (tmp_path / "missing.safetensors", tmp_path):  # a folder that is no run
            with pytest.raises(FileNotFoundError, match=f"checkpoint: got {place}"):
                load(place)


WEIGHTS = {"a": torch.zeros(2)}
FOREIGN = {  # writers of files that are no checkpoint of ours
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("seed: 42\n" * 100),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "random": lambda path: path.write_bytes(np.random.default_rng(0).bytes(4096)),
    "torch": lambda path: torch.save(WEIGHTS, path),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"step": 1})),
    "other safetensors": lambda path: save_file(WEIGHTS, path),
    "other format": lambda path: save_file(WEIGHTS, path, metadata={"format": "pt"}),
    "our format alone": lambda path: save_file(WEIGHTS, path, metadata={"format": FORMAT}),
    "broken json": lambda path: save_file(WEIGHTS, path, metadata={"format": FORMAT, "config": "{", "state": "{}"}),
}


@pytest.mark.parametrize("write", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files(tmp_path, write):
    path = tmp_path / "x.safetensors"
    write(path)
    for load in (load_checkpoint, load_policy, load_encoder):
        with pytest.raises(ValueError, match="x.safetensors: got .*allowed"):
            load(path)


def test_truncated_files(tmp_path):
    """Cut anywhere: never a half-loaded policy, never an exception of another kind."""
    path, _ = policy_checkpoint(tmp_path / "x.safetensors")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = [1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1]
    for content in (*(whole[:cut] for cut in cuts), whole + b"more"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.safetensors"):
            load_policy(path)
    path.write_bytes(whole)
    assert load_policy(path)


def load_training(path):
    """All tensors, as resuming reads them."""
    return load_checkpoint(path)


def load_averages(path):
    """The averaged weights alone."""
    return load_checkpoint(path, prefix="ema.")


@pytest.mark.parametrize("load", [load_training, load_averages, load_policy, load_encoder])
def test_a_flipped_bit_is_refused_wherever_it_is(tmp_path, load):
    """In the length, the header or the body of what is read: one line that names the file."""
    path, model = policy_checkpoint(tmp_path / "x.safetensors", images=True)
    if load is load_training:
        tensors, config, _ = load_checkpoint(path)
        weights = model.state_dict()
        others = {f"{part}.{name}": w.float() for part in ("model", "optimizer.exp_avg") for name, w in weights.items()}
        save_checkpoint(path, tensors | others, config=config, state=STATE)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    places = [*range(8), *(rng.randrange(8, header) for _ in range(100)), header - 1]
    places += [header, *(rng.randrange(header, len(whole)) for _ in range(60)), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="x.safetensors: got") as refusal:
            load(path)
        assert "\n" not in str(refusal.value)
    path.write_bytes(whole)
    assert load(path)


def test_what_is_not_read_is_not_compared(tmp_path):
    """Averaged weights load where only the moments of the optimizer are damaged; resuming refuses these, by name."""
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, tensors() | {"optimizer.z": torch.arange(1000.0)}, config=CONFIG, state=STATE)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(1000.0).numpy().tobytes()) + 2000] ^= 4
    path.write_bytes(content)
    assert torch.equal(load_averages(path)[0]["weight"], tensors()["ema.weight"])
    with pytest.raises(ValueError, match="'optimizer.z'"):
        load_training(path)


def edit_header(path, change):
    """Call ``change`` with the header (a dict), and write what it returns: None, or the bytes that take its place."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = change(header)
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def set_metadata(key, value):
    return lambda header: header["__metadata__"].update({key: value})


def rename(old, new):
    return lambda header: header.update({new: header.pop(old)})


def exchange(header):
    header["ema.a"], header["ema.b"] = header["ema.b"], header["ema.a"]


def twice(header):
    entry = json.dumps({"ema.c": header["ema.a"]})[1:]
    return json.dumps(header).encode()[:-1] + b", " + entry.encode()


LIES = {
    "another configuration": set_metadata("config", '{"seed": 4}'),
    "another step": set_metadata("state", '{"step": 13}'),
    "another digest": set_metadata("digest", "0" * 64),
    "other digests": set_metadata("digests", "{}"),
    "no digest": lambda header: header["__metadata__"].pop("digest") and None,
    "more texts": set_metadata("more", "text"),
    "exchanged tensors": exchange,
    "another name": rename("ema.a", "ema.d"),
    "another part": rename("ema.a", "model.a"),
    "another type": lambda header: header["ema.a"].update(dtype="I32"),
    "another shape": lambda header: header["ema.a"].update(shape=[3, 2]),
    "a huge shape": lambda header: header["ema.a"].update(shape=[2**40, 2**40]),
    "beyond the end": lambda header: header["ema.a"].update(data_offsets=[0, 2**40]),
    "a tensor twice": twice,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_headers_that_lie(tmp_path, lie):
    path = tmp_path / "x.safetensors"
    weights = {"ema.a": torch.rand(2, 3), "ema.b": torch.rand(2, 3), "model.c": torch.rand(5)}
    save_checkpoint(path, weights, config=CONFIG, state=STATE)
    edit_header(path, lambda header: None)
    assert load_checkpoint(path)[1] == CONFIG  # written by another program
    edit_header(path, lie)
    with pytest.raises(ValueError, match="x.safetensors: got"):
        load_checkpoint(path)


def test_checkpoints_from_before_there_were_digests_load_with_a_note(tmp_path, capsys):
    """And no text of a newer one can be dropped to look like them."""
    path, model = policy_checkpoint(tmp_path / "x.safetensors")

    def to_older(header):
        for key in ("digests", "digest"):
            del header["__metadata__"][key]

    load_policy(path)
    assert capsys.readouterr().err == ""
    edit_header(path, to_older)
    loaded = load_policy(path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    (line,) = capsys.readouterr().err.splitlines()
    assert "x.safetensors" in line and "digests" in line


@pytest.mark.parametrize("path", sorted((ROOT / "pretrained").glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_checkpoints_have_digests(path, capsys):
    assert load_averages(path)[0]
    assert capsys.readouterr().err == ""


# Contents that are no configuration or state -------------------------------------------------------------------------

DEEP = "[" * 100_000 + "]" * 100_000
JSON = {  # text: of the configuration, of the state
    "null": ("null", "null"),
    "a number": ("3", "3"),
    "a list": ("[]", "[1]"),
    "text": ('"x"', '"x"'),
    "deep": (DEEP, DEEP),
    "quite deep": ('{"a":' + "[" * 80 + "]" * 80 + "}",) * 2,
    "a huge integer": ('{"step": 1' + "0" * 30 + "}",) * 2,
    "an endless integer": ('{"step": ' + "9" * 10_000 + "}",) * 2,
    "NaN": ('{"step": NaN}',) * 2,
    "infinity": ('{"step": 1, "a": [Infinity]}', '{"step": Infinity}'),
    "a key twice": ('{"step": 1, "step": 1}',) * 2,
    "sections": ('{"model": []}', "{}"),
    "no step": ('{"task": "pusht"}', '{"steps": 3}'),
    "a step that is none": ('{"rollout": null}', '{"step": -1}'),
    "text as step": ('{"encoder": 3}', '{"step": "3"}'),
    "half a step": ('{"attention": "softmax"}', '{"step": 1.5}'),
}


@pytest.mark.parametrize("part", ["config", "state"])
@pytest.mark.parametrize("case", JSON)
def test_texts_of_the_right_form_and_wrong_content(tmp_path, case, part):
    """With right digests, as a program would write them."""
    path, texts = tmp_path / "x.safetensors", {"config": json.dumps(CONFIG), "state": json.dumps(STATE)}
    texts[part] = JSON[case][part == "state"]
    save_file(WEIGHTS, path, metadata={"format": FORMAT, **texts})
    for load in (load_checkpoint, load_policy, load_encoder):
        with pytest.raises(ValueError, match="x.safetensors: got") as refusal:
            load(path)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500


def test_a_state_may_hold_what_a_run_measured(tmp_path):
    save_checkpoint(tmp_path / "x", WEIGHTS, config=CONFIG, state={"step": 3, "score": float("nan")})
    assert np.isnan(load_checkpoint(tmp_path / "x")[2]["score"])
    with pytest.raises(ValueError):  # but a configuration that could not be read again is not written
        save_checkpoint(tmp_path / "y", WEIGHTS, config={"lr": float("nan")}, state={"step": 3})
    assert not (tmp_path / "y").exists()


WRONG = (None, -1, 0, 10**9, 2.5, "text", [], {}, "module:X", [[1]], True)


@pytest.mark.parametrize("key", ["model", "encoder", "attention", "crop", "task"])
def test_configurations_of_no_model_are_refused_in_one_line(tmp_path, key):
    """Values of the section that are wrong, some of all; nothing is imported and nothing hangs."""
    path, model = policy_checkpoint(tmp_path / "x.safetensors", images=True)
    config = load_checkpoint(path)[1]
    weights = {f"ema.{name}": tensor for name, tensor in model.state_dict().items()}

    def places(section, above=()):
        for name in section if isinstance(section, dict) else range(len(section)):
            yield (*above, name)
            if isinstance(section[name], dict | list):
                yield from places(section[name], (*above, name))

    cases = list(itertools.product(places({key: config[key]}), WRONG))
    cases, refused = random.Random(0).sample(cases, min(len(cases), 40)), 0
    for (*above, name), wrong in cases:
        changed = copy.deepcopy(config)
        section = functools.reduce(lambda inner, part: inner[part], above, changed)
        section[name] = wrong
        save_checkpoint(path, weights, config=changed, state=STATE)
        try:
            load_policy(path)
        except ValueError as error:
            assert "\n" not in str(error) and "x.safetensors" in str(error)
            refused += 1
    assert refused > len(cases) / 3


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


# Loading a model -------------------------------------------------------------------------------------------------


def refuse(*arguments, **options):
    raise AssertionError("something was unpickled")


def test_loading_never_unpickles(tmp_path, monkeypatch):
    path, _ = policy_checkpoint(tmp_path / "x.safetensors", images=True)
    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr("builtins.eval", refuse)
    assert load_policy(path).config["crop"] == 8
    assert load_encoder(path).out_dim == 5


def test_loaded_policy_acts_as_the_saved_one(tmp_path):
    """From a file or a run folder; the fitted normaliser is inside; evaluation mode; the configuration is there."""
    torch.manual_seed(0)
    config = tiny.policy_config(images=True, relative=True)
    model = build_model(config)
    data = tiny.window_data(config, tiny.replay_buffer())
    model.fit_normalizer(data)
    path = tiny.save(tmp_path / "checkpoints" / "last.safetensors", model, config)
    rng = np.random.default_rng(0)
    obs = {
        "image": rng.integers(0, 256, (2, 2, 3, 12, 12), dtype=np.uint8),
        "agent_pos": rng.uniform(0, 512, (2, 2, 2)).astype(np.float32),
    }
    expected = model.eval().act(obs, generator=torch.Generator().manual_seed(0))
    assert find_checkpoint(tmp_path) == find_checkpoint(path) == path
    for source in (path, str(path), tmp_path, str(tmp_path)):
        loaded = load_policy(source)
        assert not any(module.training for module in loaded.modules())
        assert loaded.config == config
        assert torch.equal(loaded.act(obs, generator=torch.Generator().manual_seed(0)), expected)


def test_load_encoder(tmp_path):
    """The encoder of the camera asked for, which one camera does not need."""
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    for obs in (tiny.IMAGE, {**tiny.IMAGE, "wrist": tiny.IMAGE["image"]}):
        config = tiny.policy_config(images=True)
        config["task"]["shape_meta"]["obs"] = {**obs, **tiny.LOW_DIM}
        model = build_model(config).eval()
        path = tiny.save(tmp_path / "x", model, config)
        for camera in obs:
            assert torch.equal(load_encoder(path, camera=camera)(images), model.encoder.encoders[camera](images))
        with pytest.raises(ValueError, match=f"camera: got 'none', allowed: {', '.join(obs)}"):
            load_encoder(path, camera="none")
    with pytest.raises(ValueError, match="camera: got None"):
        load_encoder(path)
    path, model = policy_checkpoint(tmp_path / "x", images=True)
    assert torch.equal(load_encoder(path)(images), model.encoder.encoders["image"](images))
    with pytest.raises(ValueError, match="camera: got None"):
        load_encoder(policy_checkpoint(tmp_path / "blind")[0])


def test_a_pretraining_checkpoint_is_no_policy_but_has_an_encoder(tmp_path):
    config = tiny.policy_config(images=True, crop=None)
    config["model"] = {"name": "keypoints", "px_per_unit": 256}
    config["encoder"] = {**config["encoder"], "out_dim": 4}
    config["task"]["shape_meta"] = {**config["task"]["shape_meta"], "keypoint": {"type": "low_dim", "shape": [4]}}
    model = build_model(config).eval()
    assert isinstance(model, KeypointRegressor)
    tiny.save(tmp_path / "x", model, config)
    with pytest.raises(ValueError, match="got a 'keypoints' checkpoint"):
        load_policy(tmp_path / "x")
    images = torch.rand(2, 3, 12, 12)
    assert torch.equal(load_encoder(tmp_path / "x")(images), model.encoder.encoders["image"](images))


def test_weights_that_do_not_fit_their_own_configuration(tmp_path):
    _, model = policy_checkpoint(tmp_path / "x")
    config = tiny.policy_config(model={"denoiser": {"widths": [8, 24], "kernel_size": 3, "groups": 4, "step_dim": 8}})
    tiny.save(tmp_path / "x", model, config)
    with pytest.raises(ValueError, match="x .*denoiser.down"):
        load_model(tmp_path / "x")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "", 3.5, "cuda"])
def test_devices_that_are_not_there(tmp_path, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    path, _ = policy_checkpoint(tmp_path / "x.safetensors", images=True)
    for load in (load_policy, load_model, load_encoder):
        with pytest.raises(ValueError, match=f"device: got '{device}', allowed here: cpu"):
            load(path, device=device)


def test_a_language_model_has_no_encoder_of_images(tmp_path):
    sizes = {"vocabulary": 9, "context": 8, "dim": 8, "depth": 1, "num_heads": 2}
    config = {"model": {"name": "language", **sizes}, "attention": {"name": "softmax"}}
    path = tiny.save(tmp_path / "x.safetensors", build_model(config), config)
    assert load_model(path).context == 8
    for load in (load_encoder, load_policy):
        with pytest.raises(ValueError, match="x.safetensors: got a 'language' checkpoint"):
            load(path)


def test_loading_downloads_nothing(tmp_path, monkeypatch):
    """A policy that was trained from timm's ImageNet weights loads without asking timm for them again."""
    config = tiny.policy_config(images=True)
    model = build_model(config)
    config["encoder"] = {**config["encoder"], "pretrained": True}
    tiny.save(tmp_path / "x", model, config)
    asked, create = [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, pretrained, **k: asked.append(pretrained) or create(*a, **k))
    assert load_policy(tmp_path / "x").config["encoder"]["pretrained"] is True
    assert asked and not any(asked)


def test_export(tmp_path, capsys):
    """A file with the averaged weights alone; in half precision smaller, nearly the same, and the normaliser exact."""
    torch.manual_seed(0)
    denoiser = {"widths": [32, 64], "kernel_size": 3, "groups": 8, "step_dim": 32}
    config = tiny.policy_config(model={"denoiser": denoiser})
    model = build_model(config).eval()
    model.normalizer.fit("action", torch.tensor([[0.123456789, -7.0], [511.987654321, 9.0]]))
    weights = {f"{part}.{name}": t for part in ("model", "ema") for name, t in model.state_dict().items()}
    path = tmp_path / "run" / "checkpoints" / "last.safetensors"
    save_checkpoint(path, {**weights, "optimizer.step.x": torch.ones(())}, config=config, state=STATE)
    export_command([str(tmp_path / "run"), str(tmp_path / "whole.safetensors")])
    export_command([str(path), str(tmp_path / "half.safetensors"), "--half"])
    assert "whole.safetensors" in capsys.readouterr().out
    tensors, again, state = load_checkpoint(tmp_path / "whole.safetensors")
    assert all(name.startswith("ema.") for name in tensors) and again == config and state == {"step": 12}
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.65 * sizes[0] < sizes[0] < 0.6 * path.stat().st_size
    obs = {"agent_pos": np.random.default_rng(0).uniform(0, 1, (3, 2, 2)).astype(np.float32)}
    expected = model.act(obs, generator=torch.Generator().manual_seed(0))
    whole, half = load_policy(tmp_path / "whole.safetensors"), load_policy(tmp_path / "half.safetensors")
    assert torch.equal(whole.act(obs, generator=torch.Generator().manual_seed(0)), expected)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    assert torch.equal(half.normalizer.action_offset, model.normalizer.action_offset)
    close = half.act(obs, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(close, expected)
    torch.testing.assert_close(close, expected, rtol=0, atol=0.01 * 512)
    with pytest.raises(SystemExit, match="checkpoint: got .*missing"):
        export_command([str(tmp_path / "missing"), str(tmp_path / "x.safetensors")])


# Kills and full disks ----------------------------------------------------------------------------------------------


def in_child(function):
    """Run ``function`` in a forked process that never returns to pytest; its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the parent's thread pool does not exist here
            function()
            code = 0
        finally:
            os._exit(code)
    return child


def test_killed_while_saving(tmp_path):
    """SIGKILL at random moments of a save loop: the file always loads and is one of the saved ones, whole."""
    path, size = tmp_path / "last.safetensors", 200_000  # 600,000 floats: several writes a save
    save_checkpoint(path, {"x": torch.zeros(size, 3)}, config=CONFIG, state={"step": 0})
    rng = random.Random(0)

    def save_forever(first):
        for step in itertools.count(first):
            save_checkpoint(path, {"x": torch.full((size, 3), float(step))}, config=CONFIG, state={"step": step})

    step, interrupted, rounds, started = 0, 0, 0, time.monotonic()
    while rounds < 12 or ((step == 0 or interrupted == 0) and time.monotonic() < started + 30):
        rounds += 1
        child = in_child(lambda first=step + 1: save_forever(first))
        time.sleep(rng.uniform(0.01, 0.08))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        loaded, config, state = load_checkpoint(path)
        assert config == CONFIG and state["step"] >= step
        assert (loaded["x"] == state["step"]).all()
        step = state["step"]
        left = {file.name for file in tmp_path.iterdir()} - {path.name}
        assert all(name.startswith("last.safetensors.partial") for name in left)
        interrupted += bool(left)
    assert step > 0, "no save ever finished"
    assert interrupted > 0, "no save was ever interrupted"
    save_checkpoint(path, tensors(), config=CONFIG, state=STATE)
    assert list(tmp_path.iterdir()) == [path], "what a killed process left was not cleared away"


def test_full_disk(tmp_path):
    """No room for the new file: an OSError that says so, the older one untouched, nothing left over."""
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, tensors(), config=CONFIG, state=STATE)
    before = path.read_bytes()

    def save_with_a_limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_checkpoint(path, {"x": torch.zeros(100_000)}, config=CONFIG, state={"step": 13})
        except OSError as error:
            (tmp_path / "message").write_text(str(error))

    child = in_child(save_with_a_limit)
    assert os.waitpid(child, 0)[1] == 0
    assert str(path) in (tmp_path / "message").read_text()
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"last.safetensors", "message"}


def test_file_permissions_follow_the_umask(tmp_path):
    """As of any other file: what may be read by colleagues is not decided by a library's temporary file."""
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, tensors(), config=CONFIG, state=STATE)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        save_checkpoint(tmp_path / "file" / "x.safetensors", tensors(), config=CONFIG, state=STATE)
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        save_checkpoint(tmp_path / "folder", tensors(), config=CONFIG, state=STATE)
    assert list(tmp_path.glob("*.partial*")) == []


def test_a_copied_checkpoint_loads_elsewhere(tmp_path):
    """Nothing beside the one file is needed."""
    path, model = policy_checkpoint(tmp_path / "run" / "checkpoints" / "last.safetensors")
    shutil.copy(path, tmp_path / "alone.safetensors")
    shutil.rmtree(tmp_path / "run")
    loaded = load_policy(tmp_path / "alone.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
