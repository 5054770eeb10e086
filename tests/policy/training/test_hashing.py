"""Hashed random numbers against a plain integer reference."""

import numpy as np
import pytest

from policy.training.hashing import hashed_uniform


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
