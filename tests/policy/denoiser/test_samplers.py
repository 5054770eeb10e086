"""Samplers: tables against diffusers' schedulers, the order of DPM-Solver++, and choosing one."""

import math

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from policies import fitted, observations, seeded

from policy.denoiser.loop import DenoisingLoop
from policy.denoiser.samplers import PREDICTIONS, SAMPLERS, diffusers_scheduler, sampling_steps

NOISE = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}


def noise_config(**changes):
    return DDPMScheduler(**{**NOISE, "prediction_type": "epsilon", **changes}).config


def chunk_of(policy, **options):
    return policy.sample(observations(policy), generator=seeded(), **options)


# Tables ----------------------------------------------------------------------------------------------------------


class Wave:
    """A prediction that depends on every number of its input and on the step, and has no weights."""

    def __init__(self):
        self.seen = []

    def parameters(self):
        return []

    def observation_films(self, condition):
        return [condition]

    def step_films(self, timesteps):
        return [timesteps.double()[:, None]]

    def denoise(self, x, films):
        self.seen.append(films[0][0, 0].item())
        return torch.tanh(x) + torch.sin(films[0] / 10)[..., None]


class Double(torch.Tensor):
    """A tensor whose ``float()`` stays in double precision, so that a whole loop runs in it."""

    def float(self):
        return self


def loop_in_double(steps, start, noise, *, clip):
    loop, wave = DenoisingLoop(clip=clip), Wave()
    loop.packed_weights = None
    end = loop(wave, torch.zeros(len(start), 1), start.as_subclass(Double), noise, steps)
    return end.as_subclass(torch.Tensor), wave.seen


def with_diffusers(monkeypatch, name, scheduler, count, start, noise):
    """The same with a scheduler object of diffusers, its table of alphas in double precision, and the same draws."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if name != "dpmpp_2m":
        scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
        scheduler.alphas, scheduler.betas = scheduler.alphas.double(), scheduler.betas.double()
    scheduler.set_timesteps(count)
    if name == "dpmpp_2m":  # it keeps sigmas in single precision
        levels = scheduler.alphas_cumprod[scheduler.timesteps]
        scheduler.sigmas = torch.cat([((1 - levels) / levels).sqrt(), torch.zeros(1, dtype=torch.float64)])
    wave, draws, x, timesteps = Wave(), iter(noise), start, scheduler.timesteps.tolist()
    for t in timesteps:
        predicted = wave.denoise(x, [torch.full((len(x), 1), t, dtype=torch.float64)])
        if name == "ddpm":
            monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **options: next(draws))
        x = scheduler.step(predicted, t, x).prev_sample
    return x, timesteps


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_tables_equal_the_schedulers_of_diffusers(name, prediction, clip, monkeypatch):
    config = noise_config(prediction_type=prediction, clip_sample=clip)
    generator = seeded()
    start = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    for count in (1, 2, 3, 4, 5, 7, 10, 16, 25, 33, 34, 50, 51, 67, 99) + (() if name == "dpmpp_2m" else (100,)):
        noise = torch.randn(count, 2, 3, 2, generator=generator, dtype=torch.float64)
        steps = sampling_steps(name, config, count)
        got, seen = loop_in_double(steps, start, noise, clip=clip)
        expected, timesteps = with_diffusers(monkeypatch, name, diffusers_scheduler(name, config), count, start, noise)
        assert seen == timesteps == [step.timestep for step in steps] and len(steps) == count
        # diffusers rounds what its DPM-Solver holds to single precision in every step.
        tolerance = 1e-5 if name == "dpmpp_2m" else 1e-10
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=f"{count} steps")


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize(
    ("spacing", "counts"), [("leading", (10, 14, 16, 20, 25, 50, 100)), ("trailing", (1, 2, 4, 5))], ids=str
)
def test_published_counts_are_plain_diffusers(kind, spacing, counts, monkeypatch):
    """As diffusers comes, where its own steps start in the last tenth, or end at the clean actions."""
    name = {DDPMScheduler: "ddpm", DDIMScheduler: "ddim"}[kind]
    config, generator = noise_config(), seeded()
    start = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    for count in counts:
        noise = torch.randn(count, 2, 3, 2, generator=generator, dtype=torch.float64)
        plain = kind.from_config(config, timestep_spacing=spacing)
        expected, timesteps = with_diffusers(monkeypatch, name, plain, count, start, noise)
        got, seen = loop_in_double(sampling_steps(name, config, count), start, noise, clip=True)
        assert seen == timesteps
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=f"{count} steps")
    assert [step.timestep for step in sampling_steps("ddim", config, 10)] == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear"])
@pytest.mark.parametrize("total", [20, 97, 100, 1000])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_count_starts_in_the_last_tenth_or_is_refused(name, total, schedule):
    """Noise alone is no sample of an earlier step; of the 51 steps of DDIM the first was 50 of 100."""
    config = noise_config(num_train_timesteps=total, beta_schedule=schedule)
    refused = []
    for count in range(1, total + 1) if total < 1000 else (1, 2, 3, 9, 10, 33, 501, 600, 999):
        try:
            timesteps = [step.timestep for step in sampling_steps(name, config, count)]
        except ValueError as error:
            assert f"num_inference_steps: got {count}, allowed" in str(error)
            refused.append(count)
            continue
        assert len(timesteps) == count and total > timesteps[0] >= 0.9 * total - 1 and timesteps[-1] >= 0
        widths = -np.diff([*timesteps, -1])
        assert widths.min() >= 1 and widths.max() <= total / count + 2
        warm = sampling_steps(name, config, count, first=count // 2)  # from the previous chunk, noised to its level
        assert [step.timestep for step in warm] == timesteps[count // 2 :]
    assert refused in ([], [total])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_model_gives_the_distribution_of_the_data_with_every_count(name):
    """Clean values N(0.3, 0.5^2), predicted perfectly: samples have that mean; the spread, too, with some steps."""
    config = noise_config(clip_sample=False, prediction_type="sample")
    levels = diffusers_scheduler(name, config).alphas_cumprod.double()
    errors = {}
    for count in range(1, 100):
        gain, offset, noise, last = 1.0, 0.0, 0.0, (0.0, 0.0)  # x = gain start + offset + noise z
        for step in sampling_steps(name, config, count):
            level = levels[step.timestep].item()
            slope = level**0.5 * 0.25 / (level * 0.25 + 1 - level)  # E[clean | x] = 0.3 + slope (x - level**0.5 0.3)
            clean = (slope * gain, slope * (offset - level**0.5 * 0.3) + 0.3)
            weight = step.clean_weight + step.raw_weight
            noise = ((step.x_weight + weight * slope) ** 2 * noise**2 + step.noise_weight**2) ** 0.5
            gain = step.x_weight * gain + weight * clean[0] + step.last_weight * last[0]
            offset = step.x_weight * offset + weight * clean[1] + step.last_weight * last[1]
            last = clean
        errors[count] = abs(offset - 0.3), abs((gain**2 + noise**2) ** 0.5 - 0.5)
    assert max(mean for mean, _ in errors.values()) < 0.025
    assert max(spread for count, (_, spread) in errors.items() if count >= 10) < 0.12


@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_are_those_of_diffusers_for_every_number(name):
    config = noise_config()
    for count in range(1, 100 if name == "dpmpp_2m" else 101):
        scheduler = diffusers_scheduler(name, config)
        scheduler.set_timesteps(count)
        steps = sampling_steps(name, config, count)
        assert [step.timestep for step in steps] == scheduler.timesteps.tolist() and len(steps) == count
        assert sampling_steps(name, config, count, first=count // 2)[0].timestep == steps[count // 2].timestep
        assert all(math.isfinite(number) for step in steps for number in step)


@pytest.mark.parametrize("name", SAMPLERS)
def test_tables_do_not_depend_on_the_default_device(name):
    """As where a model is built without memory."""
    expected = sampling_steps(name, noise_config(), 7)
    with torch.device("meta"):
        assert sampling_steps(name, noise_config(), 7) == expected


# The order of DPM-Solver++ -----------------------------------------------------------------------------------------


def gaussian_error(name, count):
    """Distance to the exact solution where clean values are Gaussian, N(0.3, 0.5^2), and predicted perfectly.

    The probability-flow solution then keeps the quantile: (x - mean) / spread is the same at every noise level. The
    noise levels here are even in log(alpha / sigma), so that the solver's steps halve where their number doubles.
    """
    mean, spread = 0.3, 0.5
    ratio = torch.linspace(-1.5, 2.5, count + 1, dtype=torch.float64)  # log(alpha / sigma)
    levels = torch.sigmoid(2 * ratio).numpy()
    timesteps = np.arange(count, 0, -1)
    table, _ = SAMPLERS[name]
    steps = list(table(timesteps, levels[:-1], levels[1:], "sample"))

    def at(level):  # mean and spread of the noisy values
        return level**0.5 * mean, (level * spread**2 + 1 - level) ** 0.5

    def clean(x, level):
        center, wide = at(level)
        return mean + level**0.5 * spread**2 / wide**2 * (x - center)

    x, last = at(levels[0])[0] + at(levels[0])[1] * 0.8, 0.0
    for step, level in zip(steps, levels, strict=False):
        predicted = step.keep * x + step.predict * clean(x, level)
        x, last = (
            step.x_weight * x + (step.clean_weight + step.raw_weight) * predicted + step.last_weight * last,
            predicted,
        )
    center, wide = at(levels[-1])
    return abs(x - (center + 0.8 * wide))


def test_dpmpp_is_of_second_order_and_ddim_of_first():
    for name, order in (("ddim", 1), ("dpmpp_2m", 2)):
        errors = [gaussian_error(name, count) for count in (16, 32, 64, 128)]
        orders = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]
        assert all(abs(got - order) < 0.25 for got in orders), (name, orders)
    assert gaussian_error("dpmpp_2m", 16) < gaussian_error("ddim", 16) / 4


# Choosing one ------------------------------------------------------------------------------------------------------


def test_a_sampler_is_chosen_after_training():
    """Another sampler or number of steps equals a policy that was built with it; weights stay as they are."""
    policy, _ = fitted(sampler="ddpm")
    weights = {key: value.clone() for key, value in policy.state_dict().items()}
    for name in SAMPLERS:
        for count in (3, 7):
            policy.set_sampler(name, count)
            model = {"sampler": {"name": name, "num_inference_steps": count}}
            other, _ = fitted(model=model, seed=5)
            other.load_state_dict(weights)
            assert torch.equal(chunk_of(policy), chunk_of(other))
            assert torch.equal(chunk_of(policy, num_inference_steps=5), chunk_of(other, num_inference_steps=5))
    assert all(torch.equal(value, weights[key]) for key, value in policy.state_dict().items())
    policy.set_sampler("ddim", 5)
    expected = chunk_of(policy)
    policy.set_sampler("ddpm")
    assert policy.num_inference_steps == 5 and not torch.equal(chunk_of(policy), expected)
    policy.set_sampler(num_inference_steps=4)
    assert policy.sampler == "ddpm" and policy.num_inference_steps == 4


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": -3}, "num_inference_steps"),
        ({"num_inference_steps": 21}, "num_inference_steps"),
        ({"name": "euler"}, "sampler"),
        ({"name": "dpmpp_2m", "num_inference_steps": 20}, "num_inference_steps"),  # two of its steps would be one
    ],
)
def test_impossible_samplers_are_refused_and_change_nothing(arguments, key):
    policy, _ = fitted()
    before = chunk_of(policy)
    with pytest.raises(ValueError, match=key):
        policy.set_sampler(**arguments)
    assert (policy.sampler, policy.num_inference_steps) == ("ddim", 4) and torch.equal(chunk_of(policy), before)


def test_clipping_is_that_of_training():
    torch.manual_seed(0)
    for clip in (True, False):
        noise = tiny.policy_config()["model"]["noise"] | {"clip_sample": clip}
        policy, _ = fitted(model={"noise": noise})
        policy.denoiser.out[1].bias.data.fill_(9.0)
        normal = policy.normalizer.normalize("action", chunk_of(policy, num_inference_steps=1))
        assert bool((normal.abs() <= 1.001).all()) == clip
