"""Where data lies and what is computed again: neither device storage, additions nor checkpointing change training."""

import shutil

import numpy as np
import pytest
import tiny
import torch
import zarr
from trained import assert_identical, everything, start

from policy.build import build_model, data_sources, datasets_of
from policy.dataset import ReplayBuffer
from policy.dataset.features import cache_features, extend_dataset, place_buffer
from policy.training.batches import to_tensors

DECODER = {**tiny.DECODER, "every": 2}


def copy_of(buffer):
    return ReplayBuffer({key: array.copy() for key, array in buffer.arrays.items()}, buffer.episode_ends)


def same(first, second):
    """Whether two nested dictionaries of arrays or tensors hold the same."""
    if isinstance(first, dict):
        return set(first) == set(second) and all(same(first[key], second[key]) for key in first)
    first, second = np.asarray(first), np.asarray(second)
    return first.dtype == second.dtype and np.array_equal(first, second)


# The replay buffer -------------------------------------------------------------------------------------------------


def test_take_and_to():
    buffer = tiny.replay_buffer()
    arrays = dict(buffer.arrays)
    frames = np.array([[3, 0], [30, 3]])
    before = {key: buffer.take(key, frames) for key in arrays}
    buffer.to("cpu")
    for key, array in arrays.items():
        assert same(before[key], array[frames]) and isinstance(before[key], np.ndarray)
        after = buffer.take(key, frames)
        assert isinstance(after, torch.Tensor) and same(after, array[frames])
    assert buffer.num_frames == 31 and buffer.num_episodes == 3


@pytest.mark.parametrize("moved", [False, True])
def test_extend_appends_whole_episodes(moved):
    buffer, other = tiny.replay_buffer(lengths=(4, 6)), tiny.replay_buffer(lengths=(3, 5, 2), seed=1)
    other.arrays["unused"] = np.zeros(10)
    expected = {key: np.concatenate([array, other.arrays[key]]) for key, array in buffer.arrays.items()}
    if moved:
        buffer.to("cpu")
    buffer.extend(other)
    assert same(buffer.arrays, expected)
    assert all(isinstance(array, torch.Tensor) == moved for array in buffer.arrays.values())
    assert buffer.episode_ends.tolist() == [4, 10, 13, 18, 20] and buffer.num_episodes == 5 and other.num_episodes == 3


def test_use_episodes_is_a_data_set_of_these():
    config, buffer = tiny.policy_config(images=True), tiny.replay_buffer()
    data = tiny.window_data(config, buffer, episodes=[0])
    for episodes in ([2, 1], [1], [0, 1, 2]):
        data.use_episodes(episodes)
        other = tiny.window_data(config, buffer, episodes=episodes)
        assert np.array_equal(data.windows, other.windows) and data.episodes.tolist() == episodes
        assert len(data) == len(other) and same(data.batch(np.arange(3)), other.batch(np.arange(3)))
    with pytest.raises(ValueError, match="horizon"):
        data.use_episodes([])


# Device storage ----------------------------------------------------------------------------------------------------


def test_place_buffer(monkeypatch, capsys):
    buffer = tiny.replay_buffer()
    for storage in ("ram", "auto", "mmap"):
        place_buffer(buffer, storage, "cpu")
        assert all(isinstance(array, np.ndarray) for array in buffer.arrays.values())
    place_buffer(buffer, "device", "cpu")
    assert all(isinstance(array, torch.Tensor) for array in buffer.arrays.values())
    assert capsys.readouterr().out == ""
    size = sum(array.nbytes for array in tiny.replay_buffer().arrays.values())
    for free, expected in ((2 * size + 2, ["cuda:0"]), (2 * size, [])):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 0))
        buffer, moved = tiny.replay_buffer(), []
        monkeypatch.setattr(buffer, "to", lambda device, moved=moved: moved.append(str(device)))
        place_buffer(buffer, "auto", "cuda:0")
        assert moved == expected
        assert f"storage=auto -> {'device' if expected else 'ram'}" in capsys.readouterr().out


def test_batches_are_the_same_wherever_the_data_lies():
    config, buffer = tiny.policy_config(images=True), tiny.replay_buffer()
    data = tiny.window_data(config, buffer)
    indices = np.array([5, 4, 0, 19])
    expected = to_tensors(data.batch(indices), "cpu")
    place_buffer(buffer, "device", "cpu")
    batch = data.batch(indices)
    assert isinstance(batch["obs"]["image"], torch.Tensor) and batch["obs"]["image"].shape[1:] == (3, 12, 12)
    assert same(to_tensors(batch, "cpu"), expected)


@pytest.mark.parametrize("model", [{}, {"decoder": DECODER}], ids=["plain", "decoder"])
def test_training_is_the_same_wherever_the_data_lies(tmp_path, runs, model):
    ends = []
    for storage in ("ram", "device"):
        trained = start(tmp_path / storage, images=True, model=model, epochs=1)
        place_buffer(trained.train_data.buffer, storage, "cpu")
        trained.fit()
        ends.append(everything(trained))
    assert_identical(*ends)


# More episodes -------------------------------------------------------------------------------------------------------


def write_zarr(path, buffer):
    root = zarr.open_group(str(path), mode="w")
    data = root.create_group("data")
    for key, array in buffer.arrays.items():
        data.create_array(key, data=array)
    root.create_group("meta").create_array("episode_ends", data=buffer.episode_ends)
    return path


def stored(tmp_path, *, storage="ram"):
    """(configuration, first zarr, second zarr, one of both)."""
    config = tiny.policy_config(images=True, model={"decoder": {**DECODER, "weights": {"image": 0}}})
    for key, spec in config["task"]["shape_meta"]["obs"].items():
        spec["source"] = key
    config["task"]["shape_meta"]["action"]["source"] = "action"
    config |= {"storage": storage, "cache_dir": str(tmp_path / "cache"), "seed": 0, "device": "cpu"}
    config["data"] = {"val_ratio": 0.3, "max_train_episodes": None, "pad_after": 3}
    first, second = tiny.replay_buffer(), tiny.replay_buffer(lengths=(8, 11), seed=1)
    both = copy_of(first)
    both.extend(second)
    return config, *(write_zarr(tmp_path / f"{i}.zarr", b) for i, b in enumerate((first, second, both)))


@pytest.mark.parametrize("storage", ["ram", "mmap", "device"])
@pytest.mark.parametrize("cached", [False, True])
def test_an_extended_data_set_equals_one_of_both(tmp_path, cached, storage):
    config, first, second, both = stored(tmp_path, storage=storage)
    torch.manual_seed(0)
    policy = build_model(config).eval()
    train, val = datasets_of(config, first)
    policy.fit_normalizer(train)
    held_out = val.batch(np.arange(len(val)))
    if cached:
        cache_features(policy, [train, val], batch_size=7)
        held_out = val.batch(np.arange(len(val)))
        assert "image" not in train.buffer.arrays and "features" in held_out["obs"]
    place_buffer(train.buffer, storage, "cpu")
    episodes = train.episodes.tolist()
    options = {"sources": data_sources(config["task"]["shape_meta"]), "policy": policy}
    extend_dataset(train, second, **options)
    assert train.episodes.tolist() == [*episodes, 3, 4] and train.buffer is val.buffer
    assert same(to_tensors(val.batch(np.arange(len(val))), "cpu"), to_tensors(held_out, "cpu"))

    whole, _ = datasets_of({**config, "storage": "ram"}, both)
    whole.use_episodes(train.episodes)
    if cached:
        cache_features(policy, [whole], batch_size=7)
    assert np.array_equal(whole.windows, train.windows)
    got, expected = (to_tensors(data.batch(np.arange(len(data))), "cpu") for data in (train, whole))
    if cached:
        torch.testing.assert_close(got["obs"].pop("features"), expected["obs"].pop("features"))
    assert same(got, expected)
    extend_dataset(train, first, **options)
    assert train.episodes.tolist() == [*episodes, 3, 4, 5, 6, 7] and train.buffer.num_frames == 31 + 19 + 31


def test_auto_maps_files_where_there_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, first, *_ = stored(tmp_path, storage="auto")
    train, _ = datasets_of({**config, "device": "auto"}, first)
    assert all(isinstance(array, np.memmap) for array in train.buffer.arrays.values())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    train, _ = datasets_of({**config, "device": "auto"}, first)
    assert not any(isinstance(array, np.memmap) for array in train.buffer.arrays.values())
    place_buffer(train.buffer, "auto", "cpu")  # stays where it is
    assert not any(isinstance(array, torch.Tensor) for array in train.buffer.arrays.values())


# Gradient checkpointing ----------------------------------------------------------------------------------------------


def counted(policy):
    """A list that grows with every start of a block; computing it again ends as soon as everything is there."""
    calls = []
    for block in policy.encoder.encoders["image"].vit.blocks:
        block.register_forward_pre_hook(lambda *arguments: calls.append(1))
    return calls


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_gradient_checkpointing_computes_blocks_twice_and_the_same(drop_path):
    gradients, counts, losses = [], [], []
    for checkpointing in (False, True):
        options = {"depth": 3, "drop_path": drop_path, "gradient_checkpointing": checkpointing}
        config = tiny.policy_config(images=True, encoder=options)
        torch.manual_seed(0)
        policy = build_model(config)
        data = tiny.window_data(config, tiny.replay_buffer())
        policy.fit_normalizer(data)
        batch = to_tensors(data.batch(np.arange(4)), "cpu")
        randomness = policy.randomness(4, torch.Generator().manual_seed(0))
        calls = counted(policy)
        torch.manual_seed(1)
        loss = policy(batch, randomness)["loss"]
        assert len(calls) == 3
        loss.backward()
        counts.append(len(calls))
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in policy.named_parameters()})
        calls.clear()
        with torch.no_grad():
            policy.eval()(batch, randomness)
        assert len(calls) == 3
    assert counts == [3, 6] and losses[0] == losses[1]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


# torch.compile -------------------------------------------------------------------------------------------------------


def test_what_is_compiled_and_what_is_not(tmp_path, runs, monkeypatch):
    """The cameras' encoders and the U-Net of the model that trains; the averaged copy stays as it was."""
    compiled = []

    def double(function, **options):
        compiled.append((function, options))
        return lambda *arguments: function(*arguments)

    monkeypatch.setattr(torch, "compile", double)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    trained = start(tmp_path / "compiled", images=True, compile=True, epochs=1)
    encoder = trained.raw_model.encoder.encoders["image"]
    assert (encoder, {"dynamic": True}) in compiled and len(compiled) == 2
    assert compiled[1][0].__self__ is trained.raw_model.denoiser
    assert "denoise_and_bottleneck" in vars(trained.raw_model.denoiser)
    assert "denoise_and_bottleneck" not in vars(trained.ema.model.denoiser)
    trained.fit()
    plain = start(tmp_path / "plain", images=True, epochs=1)
    assert len(compiled) == 2
    plain.fit()
    assert_identical(everything(trained), everything(plain))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_training_computes_the_same():
    config = tiny.policy_config(images=True, model={"decoder": DECODER})
    data = tiny.window_data(config, tiny.replay_buffer())
    losses, gradients = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        policy = build_model(config)
        policy.fit_normalizer(data)
        if compiled:
            policy.compile_training()
        for apart in (2, 1):  # how many frames windows share varies
            batch = to_tensors(data.batch(np.arange(0, 4 * apart, apart)), "cpu")
            loss = policy(batch, policy.randomness(4, torch.Generator().manual_seed(0)))["loss"]
            losses.append(loss.item())
        loss.backward()
        gradients.append([p.grad for p in policy.parameters()])
        names = set(policy.state_dict())
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-5)
    assert names == set(build_model(config).state_dict())
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
