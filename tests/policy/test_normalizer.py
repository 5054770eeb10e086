"""Normalisation against float64 numpy."""

import numpy as np
import pytest
import torch

from policy.normalizer import Normalizer


def raw_data(shape, frames=500, seed=0):
    """(F, *shape) float64 numbers in ranges that differ by dimension and lie far from 0."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(-600, 600, shape)
    return low + rng.uniform(0.5, 400, shape) * rng.random((frames, *shape))


def fitted(data):
    normalizer = Normalizer({"x": data.shape[1:]})
    normalizer.fit("x", torch.from_numpy(data).float())
    return normalizer


@pytest.mark.parametrize("shape", [(2,), (16, 2), (1,)])
def test_normalised_values_equal_float64_numpy(shape):
    data = raw_data(shape)
    low, high = data.min(axis=0), data.max(axis=0)
    expected = 2 * (data - low) / (high - low) - 1
    normalised = fitted(data).normalize("x", torch.from_numpy(data).float()).numpy()
    # float32 knows x to 6e-8 * 1000; a spread of 0.5 turns that into 2.4e-4.
    np.testing.assert_allclose(normalised, expected, rtol=0, atol=3e-4)
    np.testing.assert_allclose(normalised.min(axis=0), -1, rtol=0, atol=3e-4)
    np.testing.assert_allclose(normalised.max(axis=0), 1, rtol=0, atol=3e-4)


def test_denormalize_inverts_normalize_in_and_beyond_the_range():
    data = raw_data((3,))
    normalizer = fitted(data)
    beyond = torch.from_numpy(np.concatenate([data, data + 1000, data - 1000])).float().reshape(3, 500, 3)
    back = normalizer.denormalize("x", normalizer.normalize("x", beyond))
    np.testing.assert_allclose(back.numpy(), beyond.numpy(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("jitter", [0.0, 5e-5])
def test_a_constant_dimension_is_centred_not_blown_up(jitter):
    data = raw_data((3,), seed=1)
    data[:, 1] = 7 + jitter * np.linspace(-0.5, 0.5, len(data))
    normalizer = fitted(data)
    normalised = normalizer.normalize("x", torch.from_numpy(data).float())
    assert normalizer.constant == ["x[1]"]
    assert normalised[:, 1].abs().max() <= 5e-5
    np.testing.assert_allclose(normalised[:, [0, 2]].amax(0).numpy(), 1, rtol=0, atol=1e-3)
    np.testing.assert_allclose(normalizer.denormalize("x", torch.zeros(3))[1].item(), 7, rtol=0, atol=1e-4)


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("middle", [0.0, 0.3])
def test_the_unit_changes_nothing(middle, unit):
    """A range of 80 um, in metres, millimetres, micrometres and others, beside a column of another unit."""
    fine = middle + 8e-5 * np.random.default_rng(0).random(500)
    data = np.stack([fine * unit, np.full(500, 0.7 * unit), raw_data((1,))[:, 0]], axis=1)
    normalizer = fitted(data)
    x = torch.from_numpy(data).float()
    normalised = normalizer.normalize("x", x)
    expected = 2 * (fine - fine.min()) / (fine.max() - fine.min()) - 1
    np.testing.assert_allclose(normalised[:, 0].numpy(), expected, rtol=0, atol=3e-3)
    back = normalizer.denormalize("x", normalised)[:, 0]
    np.testing.assert_allclose(back.numpy() / unit, fine, rtol=0, atol=8e-5 * 3e-3)
    assert normalizer.constant == ["x[1]"] and (normalised[:, 1].abs() <= 1e-6 * 0.7 * unit).all()


def test_what_is_constant_is_named_once_and_rounding_is_no_motion():
    """Of the last fit of each key; a column is constant where it is at every step of a chunk; 1e-17 beside 1 is 0."""
    rng = np.random.default_rng(0)
    normalizer = Normalizer({"x": (2,), "quaternion": (4,), "action": (4, 3)})
    quaternion = torch.from_numpy(np.stack([np.ones(50), 1e-17 * rng.normal(size=50), *rng.random((2, 50))], axis=1))
    normalizer.fit("quaternion", quaternion.float())
    actions = torch.from_numpy(rng.random((50, 4, 3))).float()
    actions[:, 0], actions[..., 2] = 0.0, 5.0  # where the chunk starts; the last column
    normalizer.fit("x", torch.zeros(50, 2))
    normalizer.fit("x", torch.arange(100.0).reshape(50, 2))
    normalizer.fit("action", actions, [0, 2])
    assert normalizer.constant == ["quaternion[0]", "quaternion[1]", "action[2]"]
    assert normalizer.normalize("quaternion", quaternion.float())[:, :2].abs().max() < 1e-6


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_data_that_are_not_finite_are_refused_by_key(wrong):
    data = torch.rand(20, 2)
    data[3, 1] = wrong
    with pytest.raises(ValueError, match="speed: got NaN or inf"):
        Normalizer({"speed": (2,)}).fit("speed", data)


def test_keys_are_independent_and_unfitted_ones_change_nothing():
    normalizer = Normalizer({"x": (2,), "y": (2,)})
    y = torch.randn(5, 2)
    normalizer.fit("x", torch.from_numpy(raw_data((2,))).float())
    torch.testing.assert_close(normalizer.normalize("y", y), y, rtol=0, atol=0)
    torch.testing.assert_close(normalizer.denormalize("y", y), y, rtol=0, atol=0)


def test_the_ranges_survive_state_dict():
    data = raw_data((4, 2))
    normalizer, restored = fitted(data), Normalizer({"x": (4, 2)})
    restored.load_state_dict(normalizer.state_dict())
    x = torch.from_numpy(data).float()
    torch.testing.assert_close(restored.normalize("x", x), normalizer.normalize("x", x), rtol=0, atol=0)
    assert not torch.equal(restored.normalize("x", x), x)
    assert not list(normalizer.parameters())  # an optimizer never touches them
