"""Random numbers that depend only on what they are for, not on the order in which they are drawn."""

import numpy as np


def hashed_uniform(seed, step, ids, *, columns):
    """Uniform numbers (n, columns) float32 in [0, 1), a function of (seed, step, id, column) alone.

    The crop of a frame is then the same however a batch is cut into micro-batches or over processes.
    SplitMix64 finaliser (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195).
    """
    key = np.array([_mix(np.array([seed], np.uint64))[0] ^ np.uint64(step)], np.uint64)
    ids = np.asarray(ids, dtype=np.uint64)[:, None]
    mixed = _mix(_mix(_mix(key) ^ ids) ^ np.arange(columns, dtype=np.uint64))
    return ((mixed >> np.uint64(40)).astype(np.float64) / (1 << 24)).astype(np.float32)


def _mix(x):
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
