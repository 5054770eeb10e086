"""95 % confidence intervals of means and rates."""

import math

import numpy as np

Z95 = 1.959963984540054


def mean_interval(values, *, resamples=10_000):
    """Bootstrap percentile interval (low, high) of the mean of ``values`` (n,), with a fixed seed.

    Scores pile up at 1, where a normal interval would leave the range. Source: Efron 1979, doi:10.1214/aos/1176344552.
    """
    values = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    return [float(bound) for bound in np.quantile(values[draws].mean(axis=1), [0.025, 0.975])]


def rate_interval(successes, trials):
    """Wilson score interval (low, high) of a success rate. Source: Wilson 1927, doi:10.1080/01621459.1927.10502953."""
    rate, z2 = successes / trials, Z95**2 / trials
    centre = (rate + z2 / 2) / (1 + z2)
    half = Z95 / (1 + z2) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials))
    return [max(centre - half, 0.0), min(centre + half, 1.0)]
