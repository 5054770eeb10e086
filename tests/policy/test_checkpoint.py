"""Checkpoints survive kills and full disks, and load as what was saved; loading executes nothing."""

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
from checkpoints import CONFIG, STATE, policy_checkpoint, tensors
from safetensors import safe_open
from torch import nn

from policy import load_encoder, load_policy
from policy.build import build_model
from policy.checkpoint import (
    FORMAT,
    find_checkpoint,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from policy.export import main as export_command
from policy.head.keypoints import KeypointRegressor

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
