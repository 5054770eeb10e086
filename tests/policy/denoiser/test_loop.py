"""The denoising loop: what it computes once follows the weights, and draws are those of diffusers."""

import copy

import numpy as np
import pytest
import torch
from policies import fitted, observations, seeded
from torch.autograd import forward_ad

from policy.denoiser.loop import GraphedCall, Weights
from policy.denoiser.samplers import SAMPLERS, diffusers_scheduler
from policy.training.batches import to_tensors


def chunk_of(policy, **options):
    return policy.sample(observations(policy), generator=seeded(), **options)


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


CHANGES = [change_by_fused_optimizer, change_by_average, change_in_place, change_by_loading]
CHANGES += [change_the_network, change_a_parameter]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
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
    obs = observations(policy)
    with torch.no_grad():
        condition = policy.encoder({"agent_pos": torch.from_numpy(obs["agent_pos"]).flatten(0, 1)}).reshape(3, -1)
        steps = policy.sampling_steps()
        start, noise = policy.loop.draw((3, 8, 2), steps, generator=seeded(), device="cpu")
        chunk = policy.loop(policy.denoiser, condition, start.double(), noise, steps)
    assert chunk.dtype == torch.float64
    torch.testing.assert_close(policy.normalizer.denormalize("action", chunk).float(), before, rtol=1e-3, atol=1e-2)


def test_what_is_kept_follows_the_precision_of_inference():
    policy, _ = fitted()
    exact = chunk_of(policy)
    policy.set_inference(precision="bf16")
    rough = chunk_of(policy)
    policy.loop.clear()
    assert torch.equal(chunk_of(policy), rough) and not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0, atol=5)  # of actions up to 50
    policy.set_inference()
    assert torch.equal(chunk_of(policy), exact)


def test_replaced_and_moved_weights_are_noticed():
    model = fitted()[0].denoiser
    weights = Weights(model)
    assert weights.are_those_of(model) and not weights.are_those_of(copy.deepcopy(model))
    before = model.out[1].bias
    model.out[1].bias = torch.nn.Parameter(before.data)  # the same numbers in the same memory
    with torch.no_grad():
        while model.out[1].bias._version < before._version:
            model.out[1].bias.add_(1)
    assert not weights.are_those_of(model)
    weights = Weights(model)
    model.double().float()
    assert not weights.are_those_of(model)


def test_packed_weights_may_be_chosen_at_any_time():
    policy, _ = fitted()
    chunks = {}
    for packed in ("float32", "bfloat16", None, "float32"):
        policy.loop.packed_weights = packed
        chunk = chunk_of(policy)
        assert torch.equal(chunk, chunks.setdefault(packed, chunk))
    assert not torch.equal(chunks["float32"], chunks["bfloat16"])


def test_derivatives_of_the_loop_are_those_without_packed_weights():
    """The kernels see no tangents and no gradients of the condition: torch is asked then."""
    policy, _ = fitted()
    policy.requires_grad_(False)
    steps, shape = policy.sampling_steps(), (2, policy.horizon, policy.action_dim)
    start, noise = policy.loop.draw(shape, steps, generator=seeded(), device="cpu")
    condition, direction = torch.randn(2, policy.obs_steps * policy.encoder.out_dim), torch.ones_like(start)

    def run(start, condition):
        return policy.loop(policy.denoiser, condition, start, noise, steps)

    found = []
    for packed in ("float32", None):
        policy.loop.packed_weights = packed
        with forward_ad.dual_level():
            out = run(forward_ad.make_dual(start, direction), condition)
            tangents = [forward_ad.unpack_dual(out).tangent]
        tangents.append(torch.func.jvp(lambda x: run(x, condition), (start,), (direction,))[1])
        tangents.append(torch.func.vmap(lambda x: run(x, condition))(start[None])[0])
        tangents += torch.autograd.grad(run(start, condition.requires_grad_()).sum(), condition)
        found.append(tangents)
    assert all(tangent.abs().max() > 1e-3 for tangent in found[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("seeds", [(0,), (1, 2, 3)])
def test_draws_are_in_the_order_of_diffusers(sampler, seeds):
    """A pipeline of diffusers' own objects that is given the same seeds ends at the same chunk."""
    policy, _ = fitted(sampler=sampler)
    obs = observations(policy)

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
    assert torch.equal(chunk_of(policy), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_graph_of_the_loop_equals_the_loop(sampler):
    policy, _ = fitted(sampler=sampler)
    policy.cuda()
    first, second = chunk_of(policy), policy.sample(observations(policy, seed=1), generator=seeded(1))
    policy.loop.cuda_graph = True
    for _ in range(2):
        torch.testing.assert_close(chunk_of(policy), first, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(
            policy.sample(observations(policy, seed=1), generator=seeded(1)), second, rtol=1e-4, atol=1e-3
        )
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
