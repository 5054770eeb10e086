"""Sampling: tables against diffusers' schedulers, the order of DPM-Solver++, warm starts, what is computed once."""

import math

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm

from policy.build import build_model
from policy.denoiser.loop import DenoisingLoop, GraphedCall
from policy.denoiser.samplers import PREDICTIONS, SAMPLERS, diffusers_scheduler, sampling_steps
from policy.training.batches import to_tensors

NOISE = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}


def noise_config(**changes):
    return DDPMScheduler(**{**NOISE, "prediction_type": "epsilon", **changes}).config


def fitted(*, seed=0, **options):
    """A tiny policy in evaluation mode, the normaliser fitted to its windows, and these."""
    config = tiny.policy_config(**options)
    torch.manual_seed(seed)
    policy = build_model(config).eval()
    data = tiny.window_data(config, tiny.replay_buffer(images=bool(policy.encoder.cameras)))
    policy.fit_normalizer(data)
    return policy, data


def observations(batch=3, seed=0):
    return {"agent_pos": np.random.default_rng(seed).uniform(0, 512, (batch, 2, 2)).astype(np.float32)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chunk_of(policy, **options):
    return policy.sample(observations(), generator=seeded(), **options)


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


def with_diffusers(monkeypatch, name, config, count, start, noise):
    """The same with diffusers' own scheduler object, its table of alphas in double precision, and the same draws."""
    scheduler = diffusers_scheduler(name, config)
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
        expected, timesteps = with_diffusers(monkeypatch, name, config, count, start, noise)
        assert seen == timesteps == [step.timestep for step in steps] and len(steps) == count
        # diffusers rounds what its DPM-Solver holds to single precision in every step.
        tolerance = 1e-5 if name == "dpmpp_2m" else 1e-10
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=f"{count} steps")


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
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps: got 0, allowed: 1 to 20 training steps"),
        ({"num_inference_steps": -3}, "num_inference_steps: got -3, allowed: 1 to 20"),
        ({"num_inference_steps": 21}, "num_inference_steps: got 21, allowed: 1 to 20"),
        ({"name": "euler"}, "sampler: got 'euler', allowed: ddim, ddpm, dpmpp_2m"),
        ({"name": "dpmp_2m"}, "sampler: got 'dpmp_2m' .did you mean 'dpmpp_2m'"),
        ({"name": "dpmpp_2m", "num_inference_steps": 20}, "got 20, allowed with dpmpp_2m: fewer than 20"),
    ],
)
def test_impossible_samplers_are_refused_and_change_nothing(arguments, message):
    policy, _ = fitted()
    before = chunk_of(policy)
    with pytest.raises(ValueError, match=message):
        policy.set_sampler(**arguments)
    assert (policy.sampler, policy.num_inference_steps) == ("ddim", 4) and torch.equal(chunk_of(policy), before)
    with pytest.raises(ValueError, match="got 100, allowed with dpmpp_2m: fewer than 100"):
        sampling_steps("dpmpp_2m", noise_config(), 100)


def test_clipping_is_that_of_training():
    torch.manual_seed(0)
    for clip in (True, False):
        noise = tiny.policy_config()["model"]["noise"] | {"clip_sample": clip}
        policy, _ = fitted(model={"noise": noise})
        policy.denoiser.out[1].bias.data.fill_(9.0)
        normal = policy.normalizer.normalize("action", chunk_of(policy, num_inference_steps=1))
        assert bool((normal.abs() <= 1.001).all()) == clip


# Warm starts -------------------------------------------------------------------------------------------------------


def previous_chunk(policy, batch=3):
    return policy.sample(observations(batch, seed=7), generator=seeded(7))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_warm_start_by_hand(sampler, relative):
    """SDEdit: the rest of the chunk, its last action repeated, is noised to the level of the first step taken."""
    policy, _ = fitted(sampler=sampler, relative=relative)
    previous, obs = previous_chunk(policy), observations()
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


@pytest.mark.parametrize(
    ("share", "count", "taken"), [(1, 10, 10), (0.5, 10, 5), (0.01, 10, 1), (0.21, 10, 3), (0.5, 1, 1)]
)
def test_how_many_steps_a_warm_start_takes(share, count, taken):
    policy, _ = fitted()
    policy.loop.packed_weights = None
    calls = []
    policy.denoiser.out.register_forward_hook(lambda *arguments: calls.append(1))
    previous = torch.zeros(3, 8, 2)
    policy.sample(observations(), num_inference_steps=count, previous=previous, elapsed=0, warm_start=share)
    assert len(calls) == taken
    calls.clear()
    policy.sample(observations(), num_inference_steps=count, warm_start=share)  # nothing to start from
    assert len(calls) == count


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
    assert torch.equal(policy.act(observations(), generator=seeded(), **options), default[:, 1:5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"elapsed": None}, r"previous, elapsed: got \(3, 8, 2\), None, allowed: \(3, 8, 2\) .B, T, Da., 0 to 7"),
        ({"elapsed": -1}, "got .*, -1, allowed"),
        ({"elapsed": 8}, "got .*, 8, allowed"),
        ({"previous": torch.zeros(2, 8, 2)}, r"got \(2, 8, 2\), 0, allowed: \(3, 8, 2\)"),
        ({"previous": torch.zeros(3, 4, 2)}, r"got \(3, 4, 2\)"),
        ({"warm_start": 0}, "warm_start: got 0, allowed: above 0, to 1"),
        ({"warm_start": 1.5}, "warm_start: got 1.5"),
    ],
)
def test_impossible_warm_starts_are_refused(options, message):
    policy, _ = fitted()
    with pytest.raises(ValueError, match=message):
        policy.sample(observations(), **{"previous": torch.zeros(3, 8, 2), "elapsed": 0, **options})


# The loop ----------------------------------------------------------------------------------------------------------


def change_by_optimizer(policy):
    optimizer = torch.optim.AdamW(policy.denoiser.parameters(), lr=0.1)
    policy.denoiser(torch.ones(1, 8, 2), torch.ones(1), torch.ones(1, 4)).square().sum().backward()
    optimizer.step()


def change_by_fused_optimizer(policy):
    """As the trainer does it; torch does not count these changes."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, fused=True)
    data = fitted()[1]
    batch = to_tensors(data.batch(np.arange(3)), "cpu")
    policy(batch, policy.randomness(3, seeded()))["loss"].backward()
    optimizer.step()


def change_by_average(policy):
    """As the moving average of the trainer does it."""
    parameters = list(policy.denoiser.parameters())
    with torch.no_grad():
        torch._foreach_lerp_(parameters, [p + 0.1 for p in parameters], 0.5)


@torch.no_grad()
def change_in_place(policy):
    policy.denoiser.step_embedding[1].weight.mul_(2)


def change_by_loading(policy):
    policy.load_state_dict(fitted(seed=9)[0].state_dict())


def change_the_network(policy):
    policy.denoiser = fitted(seed=9)[0].denoiser


def change_a_parameter(policy):
    linear = policy.denoiser.middle[0].film[1]
    linear.weight = torch.nn.Parameter(torch.ones_like(linear.weight))


@pytest.mark.parametrize(
    "change",
    [
        change_by_optimizer,
        change_by_fused_optimizer,
        change_by_average,
        change_in_place,
        change_by_loading,
        change_the_network,
        change_a_parameter,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("packed", [None, "float32"])
def test_what_is_kept_follows_the_weights(change, packed):
    policy, _ = fitted()
    policy.loop.packed_weights = packed
    before = chunk_of(policy)
    assert torch.equal(chunk_of(policy), before)
    change(policy)
    after = chunk_of(policy)
    policy.loop.clear()
    assert torch.equal(chunk_of(policy), after) and not torch.allclose(after, before, atol=1e-2)


def test_what_is_kept_follows_the_precision_of_the_weights():
    policy, _ = fitted()
    before = chunk_of(policy)
    policy.to(torch.float64)
    policy.loop.packed_weights = None
    obs = observations()
    with torch.no_grad():
        condition = policy.encoder({"agent_pos": torch.from_numpy(obs["agent_pos"]).flatten(0, 1)}).reshape(3, -1)
        steps = sampling_steps("ddim", policy.noise_scheduler.config, 4)
        start, noise = policy.loop.draw((3, 8, 2), steps, generator=seeded(), device="cpu")
        chunk = policy.loop(policy.denoiser, condition, start.double(), noise, steps)
    assert all(
        row.dtype == torch.float64 for tables in policy.loop._tables.values() for table in tables for row in table
    )
    torch.testing.assert_close(policy.normalizer.denormalize("action", chunk).float(), before, rtol=1e-3, atol=1e-2)


def test_what_is_kept_follows_the_precision_of_inference():
    policy, _ = fitted()
    exact = chunk_of(policy)
    policy.precision = "bf16"
    rough = chunk_of(policy)
    policy.loop.clear()
    assert torch.equal(chunk_of(policy), rough) and not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0, atol=5)  # of actions up to 50
    policy.precision = "fp32"
    assert torch.equal(chunk_of(policy), exact)


def test_packed_weights_may_be_chosen_at_any_time():
    policy, _ = fitted()
    chunks = {}
    for packed in ("float32", "bfloat16", None, "float32"):
        policy.loop.packed_weights = packed
        chunk = chunk_of(policy)
        assert torch.equal(chunk, chunks.setdefault(packed, chunk))
    assert not torch.equal(chunks["float32"], chunks["bfloat16"])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("seeds", [(0,), (1, 2, 3)])
def test_draws_are_in_the_order_of_diffusers(sampler, seeds, monkeypatch):
    """A pipeline of diffusers' own objects that is given the same seeds ends at the same chunk."""
    policy, _ = fitted(sampler=sampler)
    obs = observations()

    def generators():
        made = [seeded(seed) for seed in seeds]
        return made if len(seeds) > 1 else made[0]

    got = policy.sample(obs, generator=generators(), num_inference_steps=6)
    scheduler = diffusers_scheduler(sampler, policy.noise_scheduler.config)
    scheduler.set_timesteps(6)
    generator = generators()
    if len(seeds) > 1:
        x = torch.cat([torch.randn(1, 8, 2, generator=one) for one in generator])
    else:
        x = torch.randn(3, 8, 2, generator=generator)
    options = {} if sampler == "dpmpp_2m" else {"generator": generator}
    with torch.no_grad():
        condition = policy.encoder({"agent_pos": torch.from_numpy(obs["agent_pos"]).flatten(0, 1)}).reshape(3, -1)
        for t in scheduler.timesteps:
            predicted = policy.denoiser(x, t.expand(3), condition)
            x = scheduler.step(predicted, t, x, **options).prev_sample
        expected = policy.normalizer.denormalize("action", x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_cuda_graphs_are_for_cuda():
    policy, _ = fitted()
    expected = chunk_of(policy)
    policy.loop.cuda_graph = True
    assert torch.equal(chunk_of(policy), expected) and not policy.loop._graphs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_graph_of_the_loop_equals_the_loop(sampler):
    policy, _ = fitted(sampler=sampler)
    policy.cuda()
    first, second = chunk_of(policy), policy.sample(observations(seed=1), generator=seeded(1))
    policy.loop.cuda_graph = True
    for _ in range(2):
        torch.testing.assert_close(chunk_of(policy), first, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(
            policy.sample(observations(seed=1), generator=seeded(1)), second, rtol=1e-4, atol=1e-3
        )
    assert len(policy.loop._graphs) == 1
    for other in SAMPLERS:  # which may take the same timesteps
        policy.loop.cuda_graph = False
        policy.set_sampler(other)
        expected = chunk_of(policy)
        policy.loop.cuda_graph = True
        torch.testing.assert_close(chunk_of(policy), expected, rtol=1e-4, atol=1e-3)
    policy.set_sampler(sampler)
    change_in_place(policy)
    changed = chunk_of(policy)
    policy.loop.cuda_graph = False
    torch.testing.assert_close(changed, chunk_of(policy), rtol=1e-4, atol=1e-3)
    call = GraphedCall(lambda x, y: x * y, torch.ones(3, device="cuda"), torch.ones(3, device="cuda"))
    assert call(torch.full((3,), 2.0).cuda(), torch.full((3,), 3.0).cuda()).tolist() == [6, 6, 6]


# FiLM in two parts, and several diffusion steps ----------------------------------------------------------------------


def test_both_parts_of_film_add_up_to_the_linear_map_of_both():
    policy, _ = fitted()
    network = policy.denoiser.double()
    steps = torch.tensor([[0, 3], [19, 7], [5, 5]])
    condition = torch.randn(3, 4, generator=seeded(), dtype=torch.float64)
    together = network.films(steps, condition)
    separate = zip(network.step_films(steps.flatten()), network.observation_films(condition), strict=True)
    assert len(together) == len(network.blocks()) == 2 * 2 + 2 + 2
    for block, film, (ours, theirs) in zip(network.blocks(), together, separate, strict=True):
        for row in range(6):
            features = torch.cat([network.step_embedding(steps.flatten()[row : row + 1])[0], condition[row // 2]])
            expected = F.linear(F.mish(features), block.film[1].weight, block.film[1].bias)
            torch.testing.assert_close(film[row], expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(ours[row] + theirs[row // 2], expected, rtol=0, atol=1e-12)


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
    with pytest.raises(ValueError, match="timesteps_per_sample: got 0, allowed: >= 1"):
        fitted(model={"timesteps_per_sample": 0})
