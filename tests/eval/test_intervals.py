"""Intervals of rates and means against their equations, by hand and by enumeration."""

import itertools
import math

import numpy as np
import pytest

from eval.shared.intervals import Z95, mean_interval, rate_interval


@pytest.mark.parametrize("trials", [1, 5, 50])
def test_rate_interval_solves_the_score_equation(trials):
    """Wilson: the rates p for which the observed one is exactly z standard errors away."""
    assert math.erf(Z95 / 2**0.5) == pytest.approx(0.95, abs=1e-12)
    for successes in range(trials + 1):
        low, high = rate_interval(successes, trials)
        assert 0 <= low <= successes / trials <= high <= 1
        for bound in (low, high):
            if bound not in (0.0, 1.0) and not (successes == 0 and bound == low):
                error = math.sqrt(bound * (1 - bound) / trials)
                assert abs(successes / trials - bound) == pytest.approx(Z95 * error, abs=1e-9)
    assert rate_interval(0, trials)[0] == pytest.approx(0, abs=1e-12)
    assert rate_interval(0, trials)[1] == pytest.approx(Z95**2 / (trials + Z95**2))
    assert rate_interval(trials, trials)[0] == pytest.approx(trials / (trials + Z95**2))


def test_rate_interval_of_the_usual_evaluation():
    """40 of 50, worked with the formula by hand: centre 0.7786, half width 0.1090."""
    assert rate_interval(40, 50) == pytest.approx([0.6696, 0.8876], abs=2e-4)


def test_mean_interval_of_few_values_by_enumeration():
    """All 4^4 resamples of four values instead of random ones."""
    values = [0.1, 0.35, 0.5, 1.0]
    means = np.array([np.mean(draw) for draw in itertools.product(values, repeat=4)])
    low, high = mean_interval(values, resamples=200_000)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.01)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.01)
    assert mean_interval([0.4, 0.9, 0.6]) == pytest.approx([0.4, 0.9])  # 1 of 27 resamples is all minima


def test_mean_interval_of_many_values():
    """Close to the normal interval where that holds, the same every time, and inside the range of the values."""
    values = np.random.default_rng(1).uniform(0, 1, 400)
    half = 1.96 * values.std() / 20
    interval = mean_interval(values)
    assert interval == pytest.approx([values.mean() - half, values.mean() + half], abs=0.1 * half)
    assert mean_interval(values) == interval and all(type(bound) is float for bound in interval)
    assert mean_interval([1.0] * 9) == [1.0, 1.0] and mean_interval([0.3]) == [0.3, 0.3]
    assert mean_interval([1.0] * 45 + [0.2] * 5)[1] <= 1.0
