"""Sampling as a robot uses it: seeds, observations, warm starts, one observation at a time."""

import numpy as np
import pytest
import tiny
import torch
from policies import fitted, observations, seeded

from policy.build import build_model
from policy.denoiser.samplers import SAMPLERS, sampling_steps


def chunk_of(policy, **options):
    return policy.sample(observations(policy), generator=seeded(), **options)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("images", [False, True])
def test_samples_depend_on_the_seed_alone(images, sampler):
    policy, _ = fitted(images=images, sampler=sampler)
    obs = observations(policy)
    first = policy.sample(obs, generator=seeded(1))
    assert first.shape == (3, 8, 2) and torch.isfinite(first).all() and not first.requires_grad
    torch.manual_seed(5)
    assert torch.equal(policy.sample(obs, generator=seeded(1)), first)
    assert (policy.sample(obs, generator=seeded(2)) - first).abs().max() > 1
    together = policy.sample(obs, generator=[seeded(seed) for seed in (7, 8, 9)])
    for row, seed in enumerate((7, 8, 9)):
        alone = policy.sample({key: value[row : row + 1] for key, value in obs.items()}, generator=seeded(seed))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-3)  # actions of up to 50


@pytest.mark.parametrize(
    ("asked", "share", "taken"),
    [(None, None, 4), (1, None, 1), (7, None, 7), (20, None, 20)]
    + [(10, 1, 10), (10, 0.5, 5), (10, 0.01, 1), (10, 0.21, 3), (1, 0.5, 1)],
)
def test_number_of_denoising_steps(asked, share, taken):
    """share: of a warm start; without a chunk to start from it has no effect."""
    policy, _ = fitted()
    policy.loop.packed_weights = None
    calls = []
    policy.denoiser.out.register_forward_hook(lambda *arguments: calls.append(1))
    options = {} if share is None else {"warm_start": share}
    policy.sample(observations(policy), num_inference_steps=asked, **options)
    assert len(calls) == (asked or 4)
    if share is not None:
        policy.sample(
            observations(policy), num_inference_steps=asked, previous=torch.zeros(3, 8, 2), elapsed=0, **options
        )
        assert len(calls) == asked + taken


def test_act_is_the_executed_part_of_the_chunk():
    policy, _ = fitted()
    obs = observations(policy)
    chunk = policy.sample(obs, generator=seeded(3))
    assert torch.equal(policy.act(obs, generator=seeded(3)), chunk[:, 1:5])
    three = tiny.policy(model={"obs_steps": 3, "action_steps": 5})
    obs = {"agent_pos": np.zeros((2, 3, 2), np.float32)}
    assert torch.equal(three.act(obs, generator=seeded(3)), three.sample(obs, generator=seeded(3))[:, 2:7])


def test_image_types_and_crop_in_evaluation():
    """uint8 and float 0..255 agree; evaluation crops the centre; float64 low-dim observations are welcome."""
    policy, _ = fitted(images=True, crop=8)
    obs = observations(policy)
    expected = policy.sample(obs, generator=seeded())
    other = {"image": obs["image"].astype(np.float32), "agent_pos": obs["agent_pos"].astype(np.float64)}
    assert torch.equal(policy.sample(other, generator=seeded()), expected)
    assert torch.equal(policy.sample({**other, "unused": None}, generator=seeded()), expected)
    border = obs["image"].copy()
    border[..., :2, :], border[..., 10:, :], border[..., :2], border[..., 10:] = 0, 9, 255, 128
    assert torch.equal(policy.sample({**obs, "image": border}, generator=seeded()), expected)
    border[..., 2, 2] ^= 255
    assert not torch.equal(policy.sample({**obs, "image": border}, generator=seeded()), expected)


def test_observations_matter():
    policy, _ = fitted(images=True)
    obs = observations(policy)
    expected = policy.sample(obs, generator=seeded())
    for key in obs:
        for step in (0, 1):  # both observed steps
            changed = {k: v.copy() for k, v in obs.items()}
            changed[key][:, step] = 255 - changed[key][:, step]
            assert not torch.allclose(policy.sample(changed, generator=seeded()), expected)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda obs: obs.pop("image"), "image"),
        (lambda obs: obs.update(image=obs["image"][..., :11]), "image"),
        (lambda obs: obs.update(agent_pos=obs["agent_pos"][0]), "agent_pos"),
        (lambda obs: obs.update(agent_pos=obs["agent_pos"][:, :1]), "obs"),
        (lambda obs: obs.update({k: v[:, :1] for k, v in obs.items()}), "obs"),
    ],
)
def test_observation_errors(change, key):
    policy = tiny.policy(images=True)
    obs = observations(policy)
    change(obs)
    with pytest.raises(ValueError, match=key):
        policy.sample(obs)


WRONG_VALUES = {  # key, values from what the policy can use
    "image in [0, 1]": ("image", lambda x: (x / 255).astype(np.float32), r"got values in \[0, 1\], allowed: 0..255"),
    "half image": ("image", lambda x: (x / 255).astype(np.float16), r"got values in \[0, 1\], allowed: 0..255"),
    "bool image": ("image", lambda x: x > 128, "bool, allowed: 0..255"),
    "image in [-1, 1]": ("image", lambda x: (x / 127.5 - 1).astype(np.float32), "allowed: 0..255"),
    "16-bit image": ("image", lambda x: x.astype(np.uint16) * 257, "allowed: 0..255"),
    "int image": ("image", lambda x: x.astype(np.int64) - 1, "allowed: 0..255"),
    "one bright pixel": ("image", lambda x: _with(x, 256.0), "256"),
    "complex image": ("image", lambda x: x.astype(np.complex64), "complex"),
    "NaN in an image": ("image", lambda x: _with(x, np.nan), "NaN"),
    "inf in an image": ("image", lambda x: _with(x, np.inf), "inf"),
    "NaN": ("agent_pos", lambda x: _with(x, np.nan), "NaN"),
    "inf": ("agent_pos", lambda x: _with(x, -np.inf), "inf"),
    "too large for float32": ("agent_pos", lambda x: _with(x.astype(np.float64), 1e300), "inf"),
    "complex": ("agent_pos", lambda x: x.astype(np.complex128), "complex"),
    "text": ("agent_pos", lambda x: x.astype(str), "got no array of numbers"),
    "nothing": ("agent_pos", lambda x: None, "got no array of numbers"),
}


def _with(values, wrong):
    """``values`` with ``wrong`` in the place of the last number."""
    values = values.astype(np.result_type(values.dtype, np.float32))
    values.flat[-1] = wrong
    return values


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_values_that_a_policy_was_not_trained_on_are_refused_by_key(case):
    """By every way to ask for actions, and nothing of them is kept."""
    key, change, text = WRONG_VALUES[case]
    policy, _ = fitted(images=True)
    right = observations(policy)
    obs = {**right, key: change(right[key])}
    for ask in (policy.sample, policy.act):
        with pytest.raises(ValueError, match=f"obs '{key}': .*{text}"):
            ask(obs)
    now = {name: None if values is None else values[-1, -1] for name, values in obs.items()}
    first = {name: values[0, 0] for name, values in right.items()}
    expected = policy.select_action(first, generator=seeded())
    policy.reset()
    with pytest.raises(ValueError, match=f"obs '{key}': .*{text}"):
        policy.select_action(now)
    assert torch.equal(policy.select_action(first, generator=seeded()), expected)


def test_values_that_look_odd_but_are_right():
    """A black picture, one in float64, one that a resize took a little beyond white, whole numbers of any type."""
    policy, _ = fitted(images=True)
    obs = observations(policy)
    expected = policy.sample(obs, generator=seeded())
    for kind in (np.float64, np.float16, np.int16, np.int64):
        assert torch.equal(policy.sample({**obs, "image": obs["image"].astype(kind)}, generator=seeded()), expected)
    for image in (np.zeros_like(obs["image"], dtype=np.float32), np.full(obs["image"].shape, 255.001, np.float32)):
        assert policy.sample({**obs, "image": image}).isfinite().all()
    assert policy.sample({**obs, "agent_pos": obs["agent_pos"] > 0}).isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_generator_for_every_row_or_one(count):
    policy = tiny.policy()
    with pytest.raises(ValueError, match="generator"):
        policy.sample(observations(policy), generator=[seeded()] * count)


@pytest.mark.parametrize(
    "noise",
    [{"clip_sample": "yes"}, {"beta_schedule": "none"}, {"beta_schedule": "linear", "beta_end": 1.0}, {"betas": 3}]
    + [{"beta_schedule": "linear", "beta_start": -1.0}, {"num_train_timesteps": 0}, {"prediction_type": "noise"}],
    ids=str,
)
def test_noise_without_a_falling_signal_is_refused(noise):
    config = tiny.policy_config()
    config["model"]["noise"] |= noise
    with pytest.raises(ValueError, match="noise"):
        build_model(config)


# Warm starts -------------------------------------------------------------------------------------------------------


def previous_chunk(policy):
    return policy.sample(observations(policy, seed=7), generator=seeded(7))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_warm_start_by_hand(sampler, relative):
    """SDEdit: the rest of the chunk, its last action repeated, is noised to the level of the first step taken."""
    policy, _ = fitted(sampler=sampler, relative=relative)
    previous, obs = previous_chunk(policy), observations(policy)
    got = policy.sample(obs, generator=seeded(), num_inference_steps=5, previous=previous, elapsed=3, warm_start=0.5)

    guess = torch.stack([previous[:, min(t + 3, 7)] for t in range(8)], dim=1)
    now = torch.from_numpy(obs["agent_pos"][:, -1:]) if relative else 0.0
    steps = sampling_steps(sampler, policy.noise_scheduler.config, 5)[2:]  # 3 of 5, as half is rounded up
    if sampler == "dpmpp_2m":  # whose first step has no step before it
        steps = sampling_steps(sampler, policy.noise_scheduler.config, 5, first=2)
        assert steps[0].last_weight == 0 and steps[1:] == sampling_steps(sampler, policy.noise_scheduler.config, 5)[3:]
    generator = seeded()
    level = policy.noise_scheduler.alphas_cumprod[steps[0].timestep]
    noise = torch.randn(3, 8, 2, generator=generator)
    x = level.sqrt() * policy.normalizer.normalize("action", guess - now) + (1 - level).sqrt() * noise
    with torch.no_grad():
        condition = policy.encoder({"agent_pos": torch.from_numpy(obs["agent_pos"]).flatten(0, 1)}).reshape(3, -1)
        last = None
        for step in steps:
            clean0 = step.keep * x + step.predict * policy.denoiser(x, torch.full((3,), step.timestep), condition)
            clean = clean0.clamp(-1, 1)
            x = step.x_weight * x + step.clean_weight * clean + step.raw_weight * clean0
            if step.last_weight:
                x = x + step.last_weight * last
            if step.noise_weight:
                x = x + step.noise_weight * torch.randn(3, 8, 2, generator=generator)
            last = clean
        expected = policy.normalizer.denormalize("action", x) + now
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_a_warm_start_stays_near_its_guess():
    """The fewer steps, the nearer; another previous chunk, elapsed time or share gives another one."""
    policy, _ = fitted(model={"sampler": {"name": "ddim", "num_inference_steps": 20}})
    previous = previous_chunk(policy)
    options = {"previous": previous, "elapsed": 0}
    near, far = (chunk_of(policy, **options, warm_start=share) - previous for share in (0.05, 0.8))
    assert near.abs().mean() < far.abs().mean() / 2
    default = chunk_of(policy, **options)
    assert torch.equal(chunk_of(policy, **options, warm_start=0.5), default)
    assert torch.equal(chunk_of(policy, previous=previous.numpy(), elapsed=0), default)
    for change in ({"elapsed": 4}, {"warm_start": 0.8}, {"previous": previous + 20}):
        assert not torch.allclose(chunk_of(policy, **{**options, **change}), default, atol=1e-3)
    assert torch.equal(policy.act(observations(policy), generator=seeded(), **options), default[:, 1:5])


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"elapsed": None}, "elapsed"),
        ({"elapsed": -1}, "elapsed"),
        ({"elapsed": 8}, "elapsed"),
        ({"previous": torch.zeros(2, 8, 2)}, "previous"),
        ({"previous": torch.zeros(3, 4, 2)}, "previous"),
        ({"previous": torch.full((3, 8, 2), torch.nan)}, "previous"),
        ({"elapsed": 1.5}, "elapsed"),
        ({"warm_start": 0}, "warm_start"),
        ({"warm_start": 1.5}, "warm_start"),
    ],
)
def test_impossible_warm_starts_are_refused(options, key):
    policy, _ = fitted()
    with pytest.raises(ValueError, match=key):
        chunk_of(policy, **{"previous": torch.zeros(3, 8, 2), "elapsed": 0, **options})


# On a robot --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [False, True])
def test_a_robot_acts_one_observation_at_a_time(images):
    """Chunks of four actions, each planned from the last two observations, the first one repeated."""
    policy, _ = fitted(images=images)
    stream = {key: values[:, 0] for key, values in observations(policy, batch=11).items()}
    driver = {key: np.empty_like(values[0]) for key, values in stream.items()}  # writes into the same memory
    for _ in range(2):  # two episodes
        policy.reset()
        drawn, taken = seeded(3), []
        for step in range(11):
            for key, values in stream.items():
                driver[key][...] = values[step]
            taken.append(policy.select_action(driver, generator=drawn))
        assert taken[0].shape == (2,)
        expected, drawn = [], seeded(3)
        for pair in ((0, 0), (3, 4), (7, 8)):
            obs = {key: values[list(pair)][None] for key, values in stream.items()}
            expected += policy.act(obs, generator=drawn)[0]
        assert torch.equal(torch.stack(taken), torch.stack(expected[:11]))


def test_a_robot_is_told_of_a_wrong_observation_at_once():
    policy, _ = fitted(images=True)
    obs = {key: values[0, 0] for key, values in observations(policy).items()}
    policy.select_action(obs)
    for wrong in ({"image": obs["image"]}, {**obs, "agent_pos": np.zeros(3)}):
        with pytest.raises(ValueError, match="agent_pos"):
            policy.select_action(wrong)
