"""The U-Net and the diffusion policy against formulas written out here (arXiv 2303.04137, 2006.11239, 2010.02502)."""

import copy
import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from policy.build import build_model, cache_features
from policy.denoiser.unet1d import ConditionalUNet1D, SinusoidalEmbedding
from policy.training.trainer import to_tensors

# U-Net -----------------------------------------------------------------------------------------------------------


def unet(**options):
    torch.manual_seed(0)
    defaults = {"action_dim": 3, "condition_dim": 7, "widths": [8, 16, 24], "kernel_size": 3, "groups": 4}
    return ConditionalUNet1D(**{**defaults, "step_dim": 16, **options})


def unet_inputs(batch=4, horizon=8):
    generator = torch.Generator().manual_seed(0)
    actions = torch.randn(batch, horizon, 3, generator=generator)
    return actions, torch.arange(batch) * 7, torch.randn(batch, 7, generator=generator)


def reference_unet(model, actions, steps, condition, *, groups):
    """The published forward pass from the weights alone."""
    w = model.state_dict()

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def conv_block(x, name):
        x = F.conv1d(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"], padding=w[f"{name}.0.weight"].shape[-1] // 2)
        grouped = x.unflatten(1, (groups, -1))
        mean = grouped.mean(dim=(2, 3), keepdim=True)
        spread = (grouped.var(dim=(2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = ((grouped - mean) / spread).flatten(1, 2)
        return mish(x * w[f"{name}.1.weight"][:, None] + w[f"{name}.1.bias"][:, None])

    def mish(x):
        return x * torch.tanh(torch.log1p(torch.exp(x)))

    def residual(x, name):
        film = linear(mish(features), f"{name}.film.1")
        channels = film.shape[1] // 2
        out = conv_block(x, f"{name}.first") * film[:, :channels, None] + film[:, channels:, None]
        out = conv_block(out, f"{name}.second")
        if f"{name}.skip.weight" in w:
            x = F.conv1d(x, w[f"{name}.skip.weight"], w[f"{name}.skip.bias"])
        return out + x

    half = model.step_embedding[0].frequencies.numel()
    angles = steps[:, None].double() * 10000.0 ** (-torch.arange(half).double() / (half - 1))
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    embedding = linear(mish(linear(embedding, "step_embedding.1")), "step_embedding.3")
    features = torch.cat([embedding, condition], dim=1)

    x, skips, levels = actions.transpose(1, 2), [], len(model.down)
    for level in range(levels):
        x = residual(residual(x, f"down.{level}.0"), f"down.{level}.1")
        skips.append(x)
        if level < levels - 1:
            x = F.conv1d(x, w[f"down.{level}.2.weight"], w[f"down.{level}.2.bias"], stride=2, padding=1)
    x = residual(residual(x, "middle.0"), "middle.1")
    for level in range(levels - 1):
        x = torch.cat([x, skips[-1 - level]], dim=1)
        x = residual(residual(x, f"up.{level}.0"), f"up.{level}.1")
        x = F.conv_transpose1d(x, w[f"up.{level}.2.weight"], w[f"up.{level}.2.bias"], stride=2, padding=1)
    x = conv_block(x, "out.0")
    return F.conv1d(x, w["out.1.weight"], w["out.1.bias"]).transpose(1, 2)


@pytest.mark.parametrize(("widths", "kernel_size"), [([8, 16, 24], 3), ([8, 12], 5), ([16], 1)])
def test_unet_equals_the_published_forward_pass(widths, kernel_size):
    model = unet(widths=widths, kernel_size=kernel_size).double()
    actions, steps, condition = unet_inputs()
    out = model(actions.double(), steps, condition.double())
    expected = reference_unet(model, actions.double(), steps, condition.double(), groups=4)
    assert out.shape == (4, 8, 3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)  # the module's step frequencies are float32


def test_unet_of_the_paper_has_the_published_size():
    """Widths 512/1024/2048, kernel 5, 8 groups, step embedding 128; two observed steps of 768 + 2 features."""
    with torch.device("meta"):
        model = ConditionalUNet1D(action_dim=2, condition_dim=1540, widths=[512, 1024, 2048])
    assert sum(p.numel() for p in model.parameters()) == 291_882_114
    assert model(*(torch.zeros(s, device="meta") for s in ((1, 16, 2), (1,), (1, 1540)))).shape == (1, 16, 2)


def test_every_unet_parameter_gets_a_gradient():
    model = unet()
    (model(*unet_inputs()) * torch.randn(4, 8, 3)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_actions_step_and_condition_matter_and_samples_do_not_mix():
    model = unet()
    actions, steps, condition = unet_inputs()
    out = model(actions, steps, condition)
    for changed in ((actions + 0.1, steps, condition), (actions, steps + 1, condition), (actions, steps, -condition)):
        assert (model(*changed) - out).abs().amax(dim=(1, 2)).min() > 1e-4
    mixed = [torch.cat([x[:1], x[:1], x[2:]]) for x in (actions, steps, condition)]
    torch.testing.assert_close(model(*mixed)[[0, 2, 3]], out[[0, 2, 3]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [4, 64, 128])
def test_sinusoidal_embedding(dim):
    steps = torch.tensor([0, 1, 17, 99])
    out = SinusoidalEmbedding(dim)(steps)
    assert out.shape == (4, dim)
    for row, step in enumerate(steps.tolist()):
        for i in range(dim // 2):
            angle = step * math.exp(-math.log(10000) * i / (dim // 2 - 1))
            assert out[row, i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert out[row, dim // 2 + i].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_unet_errors():
    for options in ({"kernel_size": 4}, {"widths": [8, 18]}):
        with pytest.raises(ValueError, match="kernel_size, widths: got .*allowed: odd, multiples of groups 4"):
            unet(**options)


# Loss ------------------------------------------------------------------------------------------------------------


def alphas_cumprod(steps):
    """Of the squared-cosine schedule, with betas capped at 0.999 (arXiv 2102.09672, equation 17), in float64."""

    def bar(t):
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - bar(t + 1) / bar(t), 0.999) for t in range(steps)]
    return np.cumprod([1 - beta for beta in betas])


def fitted(policy, buffer=None):
    """``policy`` with a fitted normaliser and its windows."""
    config = tiny.policy_config(images=bool(policy.encoder.cameras), relative=bool(policy.relative_to))
    data = tiny.window_data(config, buffer or tiny.replay_buffer(images=bool(policy.encoder.cameras)))
    policy.fit_normalizer(data)
    return policy, data


def by_hand(array, values):
    """Normalisation of ``array`` (..., D) by the range of ``values`` (n, D) to [-1, 1]."""
    low, high = values.min(axis=0).astype(np.float64), values.max(axis=0).astype(np.float64)
    return 2 * (array.astype(np.float64) - low) / (high - low) - 1


@pytest.mark.parametrize("relative", [False, True])
def test_loss_by_hand(relative):
    """Low-dim policy: windows, normalisation, noise, network and mean square, step by step in float64."""
    torch.manual_seed(0)
    policy, data = fitted(tiny.policy(relative=relative))
    indices = np.array([0, 3, 17, 18, len(data) - 1])
    randomness = policy.randomness(5, torch.Generator().manual_seed(1))
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
    torch.manual_seed(0)
    policy, data = fitted(tiny.policy(images=True, crop=8))
    indices = np.array([4, 5, 20])
    batch = to_tensors(data.batch(indices), "cpu")
    batch["crop"] = torch.rand(len(batch["frame_id"]), 2)
    randomness = policy.randomness(3, torch.Generator().manual_seed(1))
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


def test_randomness_is_a_function_of_the_generator():
    policy = tiny.policy()
    draws = [policy.randomness(500, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    for key in ("noise", "steps"):
        assert torch.equal(draws[0][key], draws[1][key]) and not torch.equal(draws[0][key], draws[2][key])
    assert set(draws[0]["steps"].flatten().tolist()) == set(range(20))


def test_cached_features_give_the_same_loss():
    torch.manual_seed(0)
    policy, data = fitted(tiny.policy(images=True, crop=8))
    other = tiny.window_data(tiny.policy_config(images=True), data.buffer, episodes=[1])
    indices = np.arange(0, len(data), 3)
    randomness = policy.randomness(len(indices), torch.Generator().manual_seed(0))
    from_images = policy(to_tensors(data.batch(indices), "cpu"), randomness)["loss"]
    held_out = policy(to_tensors(other.batch(indices[:2]), "cpu"), {k: v[:2] for k, v in randomness.items()})["loss"]
    cache_features(policy, [data, other], batch_size=7)
    assert "image" not in data.buffer.arrays
    batch = data.batch(indices)
    assert set(batch["obs"]) == {"features", "agent_pos"}
    torch.testing.assert_close(policy(to_tensors(batch, "cpu"), randomness)["loss"], from_images)
    again = policy(to_tensors(other.batch(indices[:2]), "cpu"), {k: v[:2] for k, v in randomness.items()})["loss"]
    torch.testing.assert_close(again, held_out)


# Sampling --------------------------------------------------------------------------------------------------------


def observations(policy, batch=3, seed=0):
    rng = np.random.default_rng(seed)
    obs = {"agent_pos": rng.uniform(0, 512, (batch, 2, 2)).astype(np.float32)}
    if policy.encoder.cameras:
        obs["image"] = rng.integers(0, 256, (batch, 2, 3, 12, 12), dtype=np.uint8)
    return obs


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("images", [False, True])
def test_samples_depend_on_the_seed_alone(images, sampler):
    torch.manual_seed(0)
    policy, _ = fitted(tiny.policy(images=images, sampler=sampler))
    obs = observations(policy)
    first = policy.sample(obs, generator=generators(1)[0])
    assert first.shape == (3, 8, 2) and torch.isfinite(first).all() and not first.requires_grad
    torch.manual_seed(5)
    assert torch.equal(policy.sample(obs, generator=generators(1)[0]), first)
    assert (policy.sample(obs, generator=generators(2)[0]) - first).abs().max() > 1
    together = policy.sample(obs, generator=generators(7, 8, 9))
    for row, seed in enumerate((7, 8, 9)):
        alone = policy.sample({key: value[row : row + 1] for key, value in obs.items()}, generator=generators(seed))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-3)  # actions of up to 50


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
    policy, _ = fitted(tiny.policy(sampler=sampler, relative=relative))
    target = torch.rand(3, 8, 2) * 1.8 - 0.9
    policy.denoiser = Oracle(target)
    obs = observations(policy)
    chunk = policy.sample(obs, generator=generators(0)[0], num_inference_steps=steps)
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
    policy, data = fitted(tiny.policy(model={"noise": noise}))
    batch = to_tensors({k: v for k, v in data.batch(np.arange(3)).items() if k != "frame_id"}, "cpu")
    randomness = policy.randomness(3, generators(0)[0])
    target = policy.normalizer.normalize("action", batch["action"])
    assert policy.loss(batch, randomness)["loss"] > 0.1
    policy.denoiser = OtherOracle(target, prediction)
    assert policy.loss(batch, randomness)["loss"] < 1e-8
    chunk = policy.sample(observations(policy), generator=generators(0)[0], num_inference_steps=20)
    torch.testing.assert_close(chunk, batch["action"], rtol=1e-4, atol=0.05)


def test_number_of_denoising_steps():
    policy, _ = fitted(tiny.policy())
    calls = []
    policy.loop.packed_weights = None
    policy.denoiser.out.register_forward_hook(lambda *arguments: calls.append(1))
    for asked, expected in ((None, 4), (1, 1), (7, 7), (20, 20)):
        calls.clear()
        policy.sample(observations(policy), num_inference_steps=asked)
        assert len(calls) == expected
    for wrong in (0, 21, -1):
        with pytest.raises(ValueError, match=f"num_inference_steps: got {wrong}, allowed: 1 to 20"):
            policy.sample(observations(policy), num_inference_steps=wrong)
        sampler = {"name": "ddim", "num_inference_steps": wrong}
        with pytest.raises(ValueError, match=f"num_inference_steps: got {wrong}, allowed: 1 to 20"):
            tiny.policy(model={"sampler": sampler})


def test_act_is_the_executed_part_of_the_chunk():
    policy, _ = fitted(tiny.policy())
    obs = observations(policy)
    chunk = policy.sample(obs, generator=generators(3)[0])
    assert torch.equal(policy.act(obs, generator=generators(3)[0]), chunk[:, 1:5])
    three = tiny.policy(model={"obs_steps": 3, "action_steps": 5})
    obs = {"agent_pos": np.zeros((2, 3, 2), np.float32)}
    assert torch.equal(
        three.act(obs, generator=generators(3)[0]), three.sample(obs, generator=generators(3)[0])[:, 2:7]
    )


def test_image_types_and_crop_in_evaluation():
    """uint8 and float 0..255 agree; evaluation crops the centre; float64 low-dim observations are welcome."""
    torch.manual_seed(0)
    policy, _ = fitted(tiny.policy(images=True, crop=8))
    obs = observations(policy)
    expected = policy.sample(obs, generator=generators(0)[0])
    other = {"image": obs["image"].astype(np.float32), "agent_pos": obs["agent_pos"].astype(np.float64)}
    assert torch.equal(policy.sample(other, generator=generators(0)[0]), expected)
    assert torch.equal(policy.sample({**other, "unused": None}, generator=generators(0)[0]), expected)
    border = obs["image"].copy()
    border[..., :2, :], border[..., 10:, :], border[..., :2], border[..., 10:] = 0, 9, 255, 128
    assert torch.equal(policy.sample({**obs, "image": border}, generator=generators(0)[0]), expected)
    border[..., 2, 2] ^= 255
    assert not torch.equal(policy.sample({**obs, "image": border}, generator=generators(0)[0]), expected)


def test_observations_matter():
    torch.manual_seed(0)
    policy, _ = fitted(tiny.policy(images=True))
    obs = observations(policy)
    expected = policy.sample(obs, generator=generators(0)[0])
    for key in obs:
        for step in (0, 1):  # both observed steps
            changed = {k: v.copy() for k, v in obs.items()}
            changed[key][:, step] = 255 - changed[key][:, step]
            assert not torch.allclose(policy.sample(changed, generator=generators(0)[0]), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda obs: obs.pop("image"), r"got keys \['agent_pos'\], allowed: .*missing \['image'\]"),
        (lambda obs: obs.update(image=obs["image"][..., :11]), r"'image': got shape .*allowed: \(B, To, \*\(3, 12, 12"),
        (lambda obs: obs.update(agent_pos=obs["agent_pos"][0]), r"'agent_pos': got shape \(2, 2\)"),
        (lambda obs: obs.update(agent_pos=obs["agent_pos"][:, :1]), r"got leading shapes .*allowed: one \(B, To\)"),
        (lambda obs: obs.update({k: v[:, :1] for k, v in obs.items()}), "got 1 steps, allowed: 2"),
    ],
)
def test_observation_errors(change, message):
    policy = tiny.policy(images=True)
    obs = observations(policy)
    change(obs)
    with pytest.raises(ValueError, match=message):
        policy.sample(obs)


def test_a_generator_for_every_row_or_one():
    policy = tiny.policy()
    for seeds in ((1,), (1, 2), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match=f"generator: got a list of {len(seeds)}, allowed: one, or a list of 3"):
            policy.sample(observations(policy), generator=generators(*seeds))


# Building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"obs_steps": 0}, "obs_steps: got 0"),
        ({"action_steps": 0}, "action_steps: got 0"),
        ({"action_steps": 8}, "action_steps: got 8, allowed: 1 to 7"),
        ({"horizon": 9}, "horizon: got 9, allowed: a multiple of 2"),
        ({"sampler": {"name": "ddm", "num_inference_steps": 4}}, "sampler: got 'ddm' .did you mean 'dd.m'"),
        (
            {"noise": tiny.policy_config()["model"]["noise"] | {"prediction_type": "epsilom"}},
            "prediction_type: got 'epsilom', allowed: epsilon, sample, v_prediction",
        ),
        ({"name": "difusion"}, "model.name: got 'difusion' .did you mean 'diffusion'"),
    ],
)
def test_impossible_models_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        tiny.policy(model=model)


@pytest.mark.parametrize("key", ["image", "speed", "nothing"])
def test_relative_actions_need_a_matching_key(key):
    config = tiny.policy_config(images=True)
    config["task"]["shape_meta"]["obs"]["speed"] = {"type": "low_dim", "shape": [3]}
    config["task"]["shape_meta"]["action"]["relative_to"] = key
    with pytest.raises(ValueError, match=f"action.relative_to: got '{key}', allowed: null or one of .'agent_pos'."):
        build_model(config)


def test_the_normalizer_is_fitted_to_the_training_windows():
    """Whatever a window may hold lies in [-1, 1] and touches both ends; relative chunks step by step."""
    for relative in (False, True):
        policy, data = fitted(tiny.policy(relative=relative))
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
    with pytest.raises(ValueError, match=r"action.scaled: got \[0, 3\], allowed: null or columns below 3"):
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
    chunk = policy.sample(obs, generator=torch.Generator().manual_seed(0))
    policy._origin = lambda now: torch.zeros(1, 1, 3)
    moved = chunk - policy.sample(obs, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved, torch.tensor([100.0, 7.0, 0.0]).expand(1, 8, 3), rtol=0, atol=1e-3)


def test_the_loss_sees_actions_from_the_position_now():
    """What the U-Net is trained on: the action minus the position now in its first columns, normalised."""
    policy, data = pose_policy(relative_to="agent_pos")
    batch = to_tensors(data.batch(np.arange(6)), "cpu")
    drawn = policy.randomness(6, torch.Generator().manual_seed(0))
    seen = []
    policy.noise_scheduler.add_noise = lambda actions, noise, steps: seen.append(actions) or actions
    policy(batch, drawn)
    now = batch["obs"]["agent_pos"][batch["frame"][:, -1]]
    expected = batch["action"].clone()
    expected[..., :2] -= now[:, None]
    torch.testing.assert_close(seen[0], policy.normalizer.normalize("action", expected))


def test_every_policy_parameter_gets_a_gradient():
    torch.manual_seed(0)
    policy, data = fitted(tiny.policy(images=True))
    batch = to_tensors(data.batch(np.arange(12)), "cpu")
    policy(batch, policy.randomness(12, torch.Generator().manual_seed(0)))["loss"].backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
