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


def t_quantile(degrees):
    """97.5 % quantile of Student's t with a whole number of ``degrees`` of freedom >= 1.

    By bisection of the finite sums for P(|T| < t): Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom: got {degrees}, allowed: >= 1")

    def inside(angle):  # t = sqrt(degrees) tan(angle)
        term, total = (math.cos(angle) if degrees % 2 else 1.0), 0.0
        for k in range(2 + degrees % 2, degrees + 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (k - 1) / k
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if degrees % 2 else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def seed_interval(values, limits=(-math.inf, math.inf)):
    """95 % t-interval (low, high) of the mean of ``values``, one a seed, two or more; cut to ``limits``."""
    half = t_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = float(np.mean(values))
    return [max(mean - half, limits[0]), min(mean + half, limits[1])]
