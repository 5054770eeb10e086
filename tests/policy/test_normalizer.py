"""Normalisation against float64 numpy, and hashed random numbers against a plain integer reference."""

import numpy as np
import pytest
import torch

from policy.normalizer import Normalizer
from policy.training.hashing import hashed_uniform


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
    assert normalised[:, 1].abs().max() <= 5e-5
    np.testing.assert_allclose(normalised[:, [0, 2]].amax(0).numpy(), 1, rtol=0, atol=1e-3)
    np.testing.assert_allclose(normalizer.denormalize("x", torch.zeros(3))[1].item(), 7, rtol=0, atol=1e-4)


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


# Hashed random numbers -----------------------------------------------------------------------------------------------


def finalise(x):
    """The SplitMix64 finaliser on Python integers; 0 gives its published first output 0xE220A8397B1DCDAF."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_hashed_uniform_equals_integer_arithmetic():
    assert finalise(0) == 0xE220A8397B1DCDAF
    ids = [0, 1, 25649, 2**40, 2**63]
    for seed, step in ((0, 0), (42, 1), (42, 10**6), (2**63, 2**40)):
        expected = [
            [(finalise(finalise(finalise(finalise(seed) ^ step) ^ i) ^ column) >> 40) / 2**24 for column in range(3)]
            for i in ids
        ]
        drawn = hashed_uniform(seed, step, ids, columns=3)
        np.testing.assert_array_equal(drawn, np.array(expected, np.float32), strict=True)


def test_hashed_uniform_depends_on_the_id_alone_not_on_the_batch():
    rng = np.random.default_rng(0)
    ids = rng.choice(10**6, 64, replace=False)
    whole = hashed_uniform(7, 3, ids, columns=2)
    order = rng.permutation(64)
    np.testing.assert_array_equal(hashed_uniform(7, 3, ids[order], columns=2), whole[order])
    halves = [hashed_uniform(7, 3, part, columns=2) for part in np.split(ids, [20])]
    np.testing.assert_array_equal(np.concatenate(halves), whole)
    np.testing.assert_array_equal(hashed_uniform(7, 3, ids, columns=1), whole[:, :1])
    np.random.seed(0)  # noqa: NPY002 (a global generator must not matter)
    np.testing.assert_array_equal(hashed_uniform(7, 3, ids, columns=2), whole)


def test_hashed_uniform_changes_with_every_argument():
    ids = np.arange(1000)
    draws = [hashed_uniform(seed, step, ids, columns=2) for seed in (0, 1, 2) for step in (0, 1, 2)]
    columns = np.concatenate(draws, axis=1)  # (1000, 18)
    correlation = np.corrcoef(columns.T) - np.eye(18)
    assert np.abs(correlation).max() < 0.15  # 4.7 standard errors of 1 / sqrt(1000)
    assert np.abs(np.corrcoef(columns[:-1].T, columns[1:].T)[:18, 18:]).max() < 0.15  # neighbouring ids


@pytest.mark.parametrize("column", [0, 1])
def test_hashed_uniform_is_uniform(column):
    """Kolmogorov-Smirnov over 100,000 neighbouring ids and over 100,000 neighbouring steps, at the 0.1 % level."""
    count = 100_000
    by_id = hashed_uniform(42, 0, np.arange(count), columns=2)[:, column]
    by_step = np.concatenate([hashed_uniform(42, step, np.arange(100), columns=2)[:, column] for step in range(1000)])
    for drawn in (by_id, by_step):
        assert drawn.dtype == np.float32 and drawn.min() >= 0 and drawn.max() < 1
        ordered = np.sort(drawn.astype(np.float64))
        distance = np.abs(ordered - (np.arange(count) + 0.5) / count).max()
        assert distance < 1.95 / np.sqrt(count)
        assert abs(drawn.mean() - 0.5) < 3.3 * np.sqrt(1 / 12 / count)
