"""The plain way that eval.speed compares with gives what ours gives: chunks, losses, updates and samples."""

import copy

import numpy as np
import pytest
import tiny
import torch
import zarr
from torch.utils.data import DataLoader, default_collate

from eval.speed.reference import (
    PlainDataset,
    plain_loss,
    plain_policy,
    plain_sample,
    plain_training_step,
    sharing,
)
from eval.speed.train import Step
from policy.build import build_model
from policy.dataset import ReplayBuffer, epoch_order
from policy.training.trainer import Trainer

DECODER = {**tiny.DECODER, "weight": 0.5, "weights": {"agent_pos": 0.3}, "image_size": 6, "every": 2}


def observation(batch=3):
    generator = torch.Generator().manual_seed(4)
    image = torch.randint(0, 256, (batch, 2, 3, 12, 12), dtype=torch.uint8, generator=generator)
    return {"image": image, "agent_pos": torch.rand(batch, 2, 2, generator=generator) * 2 - 1}


def generator():
    return torch.Generator().manual_seed(5)


def flat(policy):
    """All parameters as one vector, a copy."""
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def trained(prediction="epsilon", **options):
    """(configuration, policy with a fitted normaliser, data); with a decoder."""
    config = tiny.policy_config(images=True, **options)
    config["model"]["noise"]["prediction_type"] = prediction
    config["model"]["decoder"] = DECODER
    config |= {"seed": 0, "training": tiny.training_options(warmup_steps=0, gradient_clip=0.1)}
    torch.manual_seed(0)
    policy = build_model(config)
    policy.config = config
    data = tiny.window_data(config, tiny.replay_buffer())
    policy.fit_normalizer(data)
    return config, policy, data


# Sampling ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["zero", "exclude"])
@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 20), ("ddim", 5), ("dpmpp_2m", 4)])
def test_chunks_are_the_same(sampler, steps, rule):
    attention = {"name": "fibottention", "variant": "paper", "masked_score": rule}
    policy = tiny.policy(images=True, relative=sampler == "ddim", attention=attention)
    policy.set_sampler(sampler, steps)
    ours = policy.sample(observation(), generator=generator())
    plain = plain_sample(plain_policy(policy), observation(), generator=generator())
    torch.testing.assert_close(plain, ours, rtol=0, atol=1e-4)
    other = plain_sample(plain_policy(policy), observation(), generator=generator().manual_seed(6))
    assert not torch.allclose(other, ours, atol=1e-2)


def test_a_copy_shares_parameters_only():
    policy = tiny.policy(images=True)
    for other in (sharing(policy), plain_policy(policy)):
        assert [id(p) for p in other.parameters()] == [id(p) for p in policy.parameters()]
        assert other.normalizer.action_scale is not policy.normalizer.action_scale
        other.set_sampler("ddpm", 7)
    assert policy.num_inference_steps == 4


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_losses_and_gradients_are_the_same(prediction):
    _, policy, data = trained(prediction, relative=prediction == "sample")
    plain = plain_policy(policy)
    step = Step(policy, data, batch=6, group=1)
    ours = step.loss(policy, "fp32", step.indices)
    gradients = torch.autograd.grad(ours, list(policy.parameters()))
    loss = plain_loss(plain, **step.plain_inputs(plain))
    torch.testing.assert_close(loss, ours, rtol=1e-5, atol=0)
    for got, expected in zip(torch.autograd.grad(loss, list(plain.parameters())), gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)
    moved = {**step.plain_inputs(plain), "crop": None}
    assert abs(plain_loss(plain, **moved) - ours) > 1e-4  # the crops matter
    policy.decoder = plain.decoder = None
    torch.testing.assert_close(plain_loss(plain, **step.plain_inputs(plain)), step.loss(policy, "fp32", step.indices))
    assert plain_loss(plain, **step.plain_inputs(plain)) < loss - 0.01


def test_steps_are_those_of_the_trainer(tmp_path, monkeypatch):
    config, policy, data = trained()
    monkeypatch.setattr("policy.training.trainer.step_seed", lambda seed, step: 0)
    expected = copy.deepcopy(policy)
    options = {"options": config["training"], "config": {}, "run_dir": tmp_path, "device": "cpu"}
    trainer = Trainer(expected, data, None, **options)
    trainer._train_step()
    start = flat(policy)
    for name in ("plain", "ours"):
        one = copy.deepcopy(policy)
        step = Step(one, data, batch=8, group=1)
        loss = step.plain(plain_policy(one)) if name == "plain" else step.ours(one, "fp32", step.indices)
        assert loss.item() == pytest.approx(trainer._pending[0]["loss"].item(), rel=1e-5)
        for got, wanted in ((one, expected), (step.ema.model, trainer.ema.model)):
            got, wanted = flat(got), flat(wanted)
            # AdamW's first step is a sign, which rounding may turn where a gradient is almost nothing.
            assert torch.isclose(got, wanted, rtol=0, atol=1e-5).float().mean() > 0.97
            assert (got - start).abs().median() > 5e-3  # lr 0.01
        assert all(parameter.grad is None for parameter in one.parameters())


def test_the_average_follows_by_its_decay():
    _, policy, data = trained()
    step, plain = Step(policy, data, batch=4, group=1), plain_policy(policy)
    average = copy.deepcopy(policy)
    before = flat(policy)
    options = {"optimizer": step.plain_optimizer, "average": average, "decay": 0.75}
    plain_training_step(plain, **step.plain_inputs(plain), **options)
    after = flat(policy)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(flat(average), 0.75 * before + 0.25 * after)


def test_optimizers_share_their_moments():
    _, policy, data = trained()
    step = Step(policy, data, batch=4, group=1)
    parameter = next(policy.parameters())
    plain, ours = step.plain_optimizer.state[parameter], step.optimizer.state[parameter]
    assert plain["exp_avg"] is ours["exp_avg"] and plain["exp_avg_sq"] is ours["exp_avg_sq"]
    step.plain(plain_policy(policy))
    assert plain["step"] == 1 and ours["step"] == 0 and plain["exp_avg"].abs().sum() > 0


def test_groups_are_neighbours_and_the_rest_as_the_trainer_orders():
    _, policy, data = trained()
    step = Step(policy, data, batch=8, group=4)
    assert np.array_equal(step.indices, epoch_order(len(data), seed=0, epoch=0)[:8])
    assert np.array_equal(step.grouped, epoch_order(len(data), seed=0, epoch=0, group=4)[:8])
    frames = [len(data.batch(indices)["frame_id"]) for indices in (step.indices, step.grouped)]
    assert frames[1] < frames[0]


# Data ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_samples_are_the_same_windows_in_full(tmp_path, dtype):
    buffer = tiny.replay_buffer()
    root = zarr.open_group(str(tmp_path / "data.zarr"), mode="w")
    state = np.concatenate([buffer.arrays["agent_pos"], np.ones((buffer.num_frames, 3), np.float32)], axis=1)
    arrays = {"img": buffer.arrays["image"].astype(dtype), "state": state.astype(np.float64), "action": buffer.arrays["action"]}  # fmt: skip  # noqa: E501
    for name, array in arrays.items():
        root.create_array(f"data/{name}", data=array, chunks=(7, *array.shape[1:]))
    root.create_array("meta/episode_ends", data=buffer.episode_ends)
    shape_meta = tiny.policy_config(images=True)["task"]["shape_meta"]
    sources = {"image": {"source": "img"}, "agent_pos": {"source": "state", "columns": [0, 1]}}
    shape_meta["obs"] = {key: spec | sources[key] for key, spec in shape_meta["obs"].items()}
    shape_meta["action"]["source"] = "action"
    plain = PlainDataset.open(tmp_path / "data.zarr", shape_meta, horizon=8, obs_steps=2, pad_after=3)
    assert {array.dtype for array in plain.arrays.values()} == {np.dtype(np.float32)}
    ours = ReplayBuffer.open(tmp_path / "data.zarr", {**shape_meta["obs"], "action": shape_meta["action"]})
    data = tiny.window_data(tiny.policy_config(images=True), ours)
    assert len(plain) == len(data) and np.array_equal(plain.windows, data.windows)
    batch = data.batch(np.arange(len(data)))
    for (index, sample), window in zip(enumerate(plain), data.windows, strict=True):
        np.testing.assert_array_equal(sample["action"], batch["action"][index])
        assert sample["obs"]["image"].shape == (8, 3, 12, 12) and sample["obs"]["image"].dtype == np.float32
        np.testing.assert_allclose(sample["obs"]["image"] * 255, np.moveaxis(ours.arrays["image"][window], -1, 1), rtol=1e-6)  # fmt: skip  # noqa: E501
        for key, values in batch["obs"].items():
            scale = 255 if key == "image" else 1
            np.testing.assert_allclose(sample["obs"][key][:2] * scale, values[batch["frame"][index]], rtol=1e-6)


def test_samples_fit_torch_and_what_a_buffer_holds():
    buffer = tiny.replay_buffer()
    config = tiny.policy_config(images=True)
    data = tiny.window_data(config, buffer)
    plain = PlainDataset(buffer.arrays, data.windows, config["task"]["shape_meta"]["obs"])
    (batch, *_) = DataLoader(plain, batch_size=4)
    assert batch["obs"]["image"].dtype == torch.float32 and 0.9 < batch["obs"]["image"].max() <= 1
    assert torch.equal(batch["action"], default_collate([plain[i] for i in range(4)])["action"])
