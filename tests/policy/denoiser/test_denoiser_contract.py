"""What every registered denoiser promises to the policy, the loop, the decoders and the export."""

import pytest
import torch

from policy.denoiser import build_denoiser, list_denoisers
from policy.denoiser.unet1d import ConditionalUNet1D

OPTIONS = {"unet1d": {"widths": [8, 16], "kernel_size": 3, "groups": 4, "step_dim": 8}}
every_denoiser = pytest.mark.parametrize("name", list_denoisers())


def build(name):
    torch.manual_seed(0)
    return build_denoiser(name, action_dim=3, condition_dim=5, **OPTIONS.get(name, {})).eval()


def inputs(batch=4, horizon=16):
    generator = torch.Generator().manual_seed(1)
    actions = torch.randn(batch, horizon, 3, generator=generator)
    return actions, torch.arange(batch) * 7, torch.randn(batch, 5, generator=generator)


@every_denoiser
def test_films_are_sums_of_a_part_of_the_step_and_one_of_the_observation(name):
    """As the loop makes them, and as training does for several steps of one observation."""
    denoiser, (actions, steps, condition) = build(name), inputs()
    expected = denoiser(actions, steps, condition)
    of_steps, of_observation = denoiser.step_films(steps), denoiser.observation_films(condition)
    films = [ours + theirs for ours, theirs in zip(of_steps, of_observation, strict=True)]
    torch.testing.assert_close(denoiser.denoise(actions, films), expected)
    twice = denoiser.films(torch.stack([steps, steps.flip(0)], dim=1), condition)
    again = denoiser.denoise(actions.repeat_interleave(2, dim=0), twice).unflatten(0, (4, 2))
    torch.testing.assert_close(again[:, 0], expected)
    torch.testing.assert_close(again[:, 1], denoiser(actions, steps.flip(0), condition))


@every_denoiser
def test_shapes_and_bottleneck(name):
    denoiser, (actions, steps, condition) = build(name), inputs()
    out, bottleneck = denoiser.denoise_and_bottleneck(actions, denoiser.films(steps[:, None], condition))
    assert out.shape == actions.shape and bottleneck.shape == (4, denoiser.widths[-1], 16 // denoiser.multiple)
    assert torch.equal(out, denoiser(actions, steps, condition))


@every_denoiser
def test_all_inputs_and_parameters_count_and_samples_do_not_meet(name):
    denoiser, (actions, steps, condition) = build(name), inputs()
    actions.requires_grad_()
    condition.requires_grad_()
    out = denoiser(actions, steps, condition)
    torch.testing.assert_close(denoiser(actions[:1], steps[:1], condition[:1]), out[:1])
    assert (denoiser(actions, steps + 5, condition) - out).abs().amax(dim=(1, 2)).min() > 1e-5
    (out * torch.randn_like(out)).sum().backward()
    for label, tensor in [("actions", actions), ("condition", condition), *denoiser.named_parameters()]:
        assert tensor.grad is not None and tensor.grad.abs().max() > 0, label


def test_checkpoints_that_name_no_denoiser_have_the_unet():
    assert isinstance(build_denoiser(action_dim=2, condition_dim=3, widths=[8, 16]), ConditionalUNet1D)


def test_wrong_names_and_options():
    with pytest.raises(ValueError, match="denoiser: got 'unet' .*allowed: .*unet1d"):
        build_denoiser("unet", action_dim=2, condition_dim=3)
    with pytest.raises(ValueError, match="width"):
        build_denoiser(action_dim=2, condition_dim=3, width=8)
