"""Batches that worker processes make ahead, each a function of its request and its seeds alone."""

import contextlib
import random
import signal

import numpy as np
import torch
from torch.utils.data import DataLoader

GRACE = 30  # s that workers go on after a SIGTERM, while the main process ends its step and saves


def seed_generators(seed, index):
    """Make the global generators of random, numpy and torch (CPU) a function of (seed, index)."""
    words = [int(word) for word in np.random.SeedSequence([seed, index]).generate_state(3)]
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])  # torch.manual_seed would touch those of all devices


@contextlib.contextmanager
def generators_restored():
    """Leave these generators as they were before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def stream_batches(make_batch, requests, *, workers):
    """Yield make_batch(request), arrays as tensors, for each of ``requests`` in order, made ahead by worker processes.

    Raises what make_batch raises, with its message unchanged where that is a ValueError or OSError.
    """
    loader = DataLoader(
        _Batches(make_batch),
        sampler=requests,
        batch_size=None,  # a request is a whole batch
        num_workers=workers,
        worker_init_fn=_leave_signals_to_main,
        generator=torch.Generator(),  # without one it draws from torch's global generator
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


class _Batches:
    """Map from a request to its batch, or to its error, which a DataLoader would wrap in pages of traceback."""

    def __init__(self, make_batch):
        self._make_batch = make_batch

    def __getitem__(self, request):
        try:
            return self._make_batch(request)
        except (ValueError, OSError) as error:
            return error


def _leave_signals_to_main(_worker):
    """What a terminal or cluster sends to all processes is the main one's to answer, which needs batches to do so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
