"""The loss of the diffusion policy against formulas written out here (arXiv 2303.04137, 2006.11239)."""

import copy
import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from policies import fitted, observations, seeded
from torch import nn

from policy.build import build_model
from policy.dataset.features import cache_features
from policy.training.batches import to_tensors

# Loss ------------------------------------------------------------------------------------------------------------


def alphas_cumprod(steps):
    """Of the squared-cosine schedule, with betas capped at 0.999 (arXiv 2102.09672, equation 17), in float64."""

    def bar(t):
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - bar(t + 1) / bar(t), 0.999) for t in range(steps)]
    return np.cumprod([1 - beta for beta in betas])


def by_hand(array, values):
    """Normalisation of ``array`` (..., D) by the range of ``values`` (n, D) to [-1, 1]."""
    low, high = values.min(axis=0).astype(np.float64), values.max(axis=0).astype(np.float64)
    return 2 * (array.astype(np.float64) - low) / (high - low) - 1


@pytest.mark.parametrize("relative", [False, True])
def test_loss_by_hand(relative):
    """Low-dim policy: windows, normalisation, noise, network and mean square, step by step in float64."""
    policy, data = fitted(relative=relative)
    indices = np.array([0, 3, 17, 18, len(data) - 1])
    randomness = policy.randomness(5, seeded(1))
    assert randomness["noise"].shape == (5, 1, 8, 2) and randomness["steps"].shape == (5, 1)
    got = policy(to_tensors(data.batch(indices), "cpu"), randomness)

    place, action = data.buffer.arrays["agent_pos"], data.buffer.arrays["action"]
    chunks = action[data.windows].astype(np.float64)  # (W, T, Da)
    if relative:
        chunks -= place[data.windows[:, 1]][:, None]  # the last of two observed steps
        target = np.stack([by_hand(chunks[:, t], chunks[:, t]) for t in range(8)], axis=1)[indices]
    else:
        target = by_hand(chunks, chunks.reshape(-1, 2))[indices]
    observed = place[data.windows[:, :2]]
    condition = by_hand(observed[indices], observed.reshape(-1, 2)).reshape(5, 4)
    noise, steps = randomness["noise"][:, 0].double().numpy(), randomness["steps"][:, 0].numpy()
    kept = alphas_cumprod(20)[steps][:, None, None]
    noisy = np.sqrt(kept) * target + np.sqrt(1 - kept) * noise
    network = copy.deepcopy(policy.denoiser).double()
    predicted = network(torch.from_numpy(noisy), randomness["steps"][:, 0], torch.from_numpy(condition))
    expected = ((predicted.detach().numpy() - noise) ** 2).mean()
    assert got["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert got["diffusion"].item() == got["loss"].item() and not got["diffusion"].requires_grad


def test_loss_with_images_by_hand():
    """The frames that two windows share are encoded once; each window sees its own two in order."""
    policy, data = fitted(images=True, crop=8)
    indices = np.array([4, 5, 20])
    batch = to_tensors(data.batch(indices), "cpu")
    batch["crop"] = torch.rand(len(batch["frame_id"]), 2)
    randomness = policy.randomness(3, seeded(1))
    got = policy(batch, randomness)["loss"].item()

    place = by_hand(
        data.buffer.arrays["agent_pos"], data.buffer.arrays["agent_pos"][data.windows[:, :2]].reshape(-1, 2)
    )
    corner = {frame: crop for frame, crop in zip(batch["frame_id"].tolist(), batch["crop"].tolist(), strict=True)}
    condition = []
    for window in data.windows[indices]:
        for frame in window[:2]:
            top, left = (int(part * 5) for part in corner[frame])
            pixels = data.buffer.arrays["image"][frame, top : top + 8, left : left + 8].transpose(2, 0, 1) / 127.5 - 1
            seen = policy.encoder.encoders["image"](torch.from_numpy(pixels[None]).float())[0]
            condition.append(torch.cat([seen, torch.from_numpy(place[frame]).float()]))
    condition = torch.stack(condition).reshape(3, -1)
    actions = data.buffer.arrays["action"]
    target = torch.from_numpy(by_hand(actions[data.windows[indices]], actions[data.windows].reshape(-1, 2)))
    noise, steps = randomness["noise"][:, 0], randomness["steps"][:, 0]
    kept = torch.from_numpy(alphas_cumprod(20))[steps][:, None, None]
    noisy = (kept.sqrt() * target + (1 - kept).sqrt() * noise).float()
    expected = F.mse_loss(policy.denoiser(noisy, steps, condition), noise).item()
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("relative", [False, True])
def test_several_diffusion_steps_are_the_mean_of_separate_losses(relative):
    one, data = fitted(images=True, relative=relative)
    several, _ = fitted(images=True, relative=relative, model={"timesteps_per_sample": 3})
    batch = to_tensors(data.batch(np.array([0, 5, 11, 20])), "cpu")
    batch["crop"] = torch.rand(len(batch["frame_id"]), 2, generator=seeded())
    randomness = several.randomness(4, seeded())
    assert randomness["noise"].shape == (4, 3, 8, 2) and randomness["steps"].shape == (4, 3)
    encoded = []
    several.encoder.register_forward_hook(lambda *arguments: encoded.append(1))
    losses = [one(batch, {k: v[:, s : s + 1] for k, v in randomness.items()})["loss"] for s in range(3)]
    together = several(batch, randomness)["loss"]
    torch.testing.assert_close(together, sum(losses) / 3)
    assert len(encoded) == 1
    together.backward(), (sum(losses) / 3).backward()
    for got, expected in zip(several.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-5)


def test_randomness_is_a_function_of_the_generator():
    policy = tiny.policy()
    draws = [policy.randomness(500, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    for key in ("noise", "steps"):
        assert torch.equal(draws[0][key], draws[1][key]) and not torch.equal(draws[0][key], draws[2][key])
    assert set(draws[0]["steps"].flatten().tolist()) == set(range(20))


def test_cached_features_give_the_same_loss():
    policy, data = fitted(images=True, crop=8)
    other = tiny.window_data(tiny.policy_config(images=True), data.buffer, episodes=[1])
    indices = np.arange(0, len(data), 3)
    randomness = policy.randomness(len(indices), seeded())
    from_images = policy(to_tensors(data.batch(indices), "cpu"), randomness)["loss"]
    held_out = policy(to_tensors(other.batch(indices[:2]), "cpu"), {k: v[:2] for k, v in randomness.items()})["loss"]
    cache_features(policy, [data, other], batch_size=7)
    assert "image" not in data.buffer.arrays
    batch = data.batch(indices)
    assert set(batch["obs"]) == {"features", "agent_pos"}
    torch.testing.assert_close(policy(to_tensors(batch, "cpu"), randomness)["loss"], from_images)
    again = policy(to_tensors(other.batch(indices[:2]), "cpu"), {k: v[:2] for k, v in randomness.items()})["loss"]
    torch.testing.assert_close(again, held_out)


def test_every_policy_parameter_gets_a_gradient():
    policy, data = fitted(images=True)
    batch = to_tensors(data.batch(np.arange(12)), "cpu")
    policy(batch, policy.randomness(12, seeded()))["loss"].backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


# A perfect predictor ---------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """The noise that leads from ``target`` (normalised chunk) to what the sampler holds."""

    def __init__(self, target):
        super().__init__()
        self.target, self.kept, self.steps = target, alphas_cumprod(20), []
        self.unused = nn.Parameter(torch.zeros(()))  # tells the device

    # "FiLM" is the step itself.
    def step_films(self, steps):
        return [steps[:, None]]

    def observation_films(self, condition):
        return [torch.zeros(len(condition), 1)]

    def films(self, steps, condition):
        return [steps.flatten()[:, None]]

    def denoise(self, chunk, films):
        steps = films[0][:, 0].int().tolist()
        self.steps.append(steps[0])
        kept = torch.tensor([self.kept[step] for step in steps], dtype=torch.float32)[:, None, None]
        return self.predict(kept, (chunk - kept**0.5 * self.target) / (1 - kept) ** 0.5)

    def predict(self, kept, noise):
        return noise

    def denoise_and_bottleneck(self, chunk, films):
        return self.denoise(chunk, films), None


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(
    ("sampler", "steps"), [("ddim", 1), ("ddim", 5), ("ddim", 20), ("ddpm", 20), ("ddpm", 5), ("dpmpp_2m", 4)]
)
def test_a_perfect_noise_predictor_leads_to_the_target(sampler, steps, relative):
    policy, _ = fitted(sampler=sampler, relative=relative)
    target = torch.rand(3, 8, 2) * 1.8 - 0.9
    policy.denoiser = Oracle(target)
    obs = observations(policy)
    chunk = policy.sample(obs, generator=seeded(), num_inference_steps=steps)
    assert len(policy.denoiser.steps) == steps and policy.denoiser.steps == sorted(policy.denoiser.steps)[::-1]
    scale, offset = policy.normalizer.action_scale, policy.normalizer.action_offset
    expected = (target - offset) / scale
    if relative:
        expected = expected + torch.from_numpy(obs["agent_pos"][:, -1:])
    torch.testing.assert_close(chunk, expected, rtol=1e-4, atol=0.05)


class OtherOracle(Oracle):
    """What a U-Net predicts that was trained on the clean actions or the velocity instead of the noise."""

    def __init__(self, target, prediction):
        super().__init__(target)
        self.prediction = prediction

    def predict(self, kept, noise):
        return self.target if self.prediction == "sample" else kept**0.5 * noise - (1 - kept) ** 0.5 * self.target


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_other_predictions_train_and_sample_alike(prediction):
    noise = tiny.policy_config()["model"]["noise"] | {"prediction_type": prediction}
    policy, data = fitted(model={"noise": noise})
    batch = to_tensors({k: v for k, v in data.batch(np.arange(3)).items() if k != "frame_id"}, "cpu")
    randomness = policy.randomness(3, seeded())
    target = policy.normalizer.normalize("action", batch["action"])
    assert policy.loss(batch, randomness)["loss"] > 0.1
    policy.denoiser = OtherOracle(target, prediction)
    assert policy.loss(batch, randomness)["loss"] < 1e-8
    chunk = policy.sample(observations(policy), generator=seeded(), num_inference_steps=20)
    torch.testing.assert_close(chunk, batch["action"], rtol=1e-4, atol=0.05)


# Actions: normalised, relative, scaled ------------------------------------------------------------------------------


def test_the_normalizer_is_fitted_to_the_training_windows():
    """Whatever a window may hold lies in [-1, 1] and touches both ends; relative chunks step by step."""
    for relative in (False, True):
        policy, data = fitted(relative=relative)
        actions = torch.from_numpy(data.buffer.arrays["action"][data.windows])
        if relative:
            actions = actions - torch.from_numpy(data.buffer.arrays["agent_pos"][data.windows[:, 1]])[:, None]
        normal = policy.normalizer.normalize("action", actions)
        axes = 0 if relative else (0, 1)
        torch.testing.assert_close(normal.amax(dim=axes), torch.ones(normal.shape[1:] if relative else 2))
        torch.testing.assert_close(normal.amin(dim=axes), -torch.ones(normal.shape[1:] if relative else 2))
        torch.testing.assert_close(policy.normalizer.denormalize("action", normal), actions, rtol=0, atol=1e-2)


def pose_policy(**action):
    """A policy of actions (3,), and windows whose "agent_pos" (2,) is what the first two are relative to."""
    config = tiny.policy_config()
    config["task"]["shape_meta"]["action"] = {"type": "low_dim", "shape": [3], **action}
    buffer = tiny.replay_buffer(images=False)
    grip = np.where(np.arange(buffer.num_frames) % 2, 0.25, -1).astype(np.float32)[:, None]
    buffer.arrays["action"] = np.concatenate([buffer.arrays["action"], grip], axis=1)
    data = tiny.window_data(config, buffer)
    model = build_model(config).eval()
    model.fit_normalizer(data)
    return model, data


def test_columns_that_are_not_scaled_stay_as_they_are():
    for relative in (None, "agent_pos"):
        policy, data = pose_policy(scaled=[0, 1], relative_to=relative)
        actions = torch.from_numpy(data.buffer.arrays["action"][data.windows])
        normal = policy.normalizer.normalize("action", actions)
        assert torch.equal(normal[..., 2], actions[..., 2]) and not torch.equal(normal[..., :2], actions[..., :2])
    with pytest.raises(ValueError, match="action.scaled"):
        pose_policy(scaled=[0, 3])


def test_a_key_shorter_than_the_action_shifts_its_first_columns():
    policy, data = pose_policy(relative_to="agent_pos")
    now = data.buffer.arrays["agent_pos"][data.windows[:, 1]]
    actions = data.buffer.arrays["action"][data.windows].astype(np.float64)
    actions[:, :, :2] -= now[:, None]
    low, high = policy.normalizer.denormalize("action", torch.tensor([-1.0, 1.0])[:, None, None].expand(2, 8, 3))
    np.testing.assert_allclose(low, actions.min(axis=0), atol=1e-3)
    np.testing.assert_allclose(high, actions.max(axis=0), atol=1e-3)
    obs = {"agent_pos": torch.tensor([[[9.0, 9.0], [100.0, 7.0]]])}
    chunk = policy.sample(obs, generator=seeded())
    policy.relative_to = None
    moved = chunk - policy.sample(obs, generator=seeded())
    torch.testing.assert_close(moved, torch.tensor([100.0, 7.0, 0.0]).expand(1, 8, 3), rtol=0, atol=1e-3)


def test_the_loss_sees_actions_from_the_position_now():
    """What the U-Net is trained on: the action minus the position now in its first columns, normalised."""
    policy, data = pose_policy(relative_to="agent_pos")
    batch = to_tensors(data.batch(np.arange(6)), "cpu")
    drawn = policy.randomness(6, seeded())
    seen = []
    policy.noise_scheduler.add_noise = lambda actions, noise, steps: seen.append(actions) or actions
    policy(batch, drawn)
    now = batch["obs"]["agent_pos"][batch["frame"][:, -1]]
    expected = batch["action"].clone()
    expected[..., :2] -= now[:, None]
    torch.testing.assert_close(seen[0], policy.normalizer.normalize("action", expected))


# Building ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ({"obs_steps": 0}, "obs_steps"),
        ({"action_steps": 0}, "action_steps"),
        ({"action_steps": 8}, "action_steps"),
        ({"horizon": 9}, "horizon"),
        ({"sampler": {"name": "ddm", "num_inference_steps": 4}}, "sampler"),
        ({"sampler": {"name": "ddim", "num_inference_steps": 21}}, "num_inference_steps"),
        ({"noise": tiny.policy_config()["model"]["noise"] | {"prediction_type": "epsilom"}}, "prediction_type"),
        ({"timesteps_per_sample": 0}, "timesteps_per_sample"),
        ({"name": "difusion"}, "model.name"),
    ],
)
def test_impossible_models_are_refused(model, key):
    with pytest.raises(ValueError, match=key):
        tiny.policy(model=model)


@pytest.mark.parametrize("key", ["image", "speed", "nothing"])
def test_relative_actions_need_a_matching_key(key):
    config = tiny.policy_config(images=True)
    config["task"]["shape_meta"]["obs"]["speed"] = {"type": "low_dim", "shape": [3]}
    config["task"]["shape_meta"]["action"]["relative_to"] = key
    with pytest.raises(ValueError, match="relative_to"):
        build_model(config)
