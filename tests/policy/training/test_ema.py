"""The moving average of the weights, from its formula and from the step alone."""

import numpy as np
import pytest
import torch
from torch import nn

from policy.training.ema import EMA


def test_ema_decay_formula():
    ema = EMA(nn.Linear(1, 1), power=0.75, max_decay=0.9999)
    assert ema.decay(0) == 0
    for step in (1, 2, 10, 1000, 50_000):
        assert ema.decay(step) == pytest.approx(1 - 1 / (1 + step) ** 0.75)
    assert ema.decay(215_444) == pytest.approx(0.9999, abs=1e-6) and ema.decay(10**9) == 0.9999
    assert EMA(nn.Linear(1, 1), power=2 / 3, max_decay=0.5).decay(1) == pytest.approx(1 - 2 ** (-2 / 3))
    assert EMA(nn.Linear(1, 1), power=2 / 3, max_decay=0.5).decay(7) == 0.5


class Averaged(nn.Module):
    """A parameter, a frozen one and a buffer that all move with the step."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.full((2,), 4.0), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def move(self, step):
        with torch.no_grad():
            self.weight.copy_(torch.tensor([1.0, -2.0, 0.5]) * (step + 1) ** 2)
            self.seen.fill_(step)


def test_ema_follows_the_weights():
    model = Averaged()
    ema = EMA(model, power=0.75, max_decay=0.9)
    assert not any(p.requires_grad for p in ema.model.parameters()) and not ema.model.training
    expected = np.zeros(3)
    for step in range(40):
        model.move(step)
        ema.update(model, step)
        decay = min(0.9, 1 - (1 + step) ** -0.75)
        expected = decay * expected + (1 - decay) * np.array([1.0, -2.0, 0.5]) * (step + 1) ** 2
        np.testing.assert_allclose(ema.model.weight.numpy(), expected, rtol=1e-5)
        assert ema.model.seen == step
    assert torch.equal(ema.model.frozen, model.frozen)
    assert model.weight.requires_grad and model.weight.grad is None


def test_ema_continues_from_the_step_alone():
    """A new object with the averaged weights goes on exactly: nothing is counted inside."""
    model = Averaged()
    straight = EMA(model, power=0.75, max_decay=0.9999)
    for step in range(30):
        model.move(step)
        straight.update(model, step)
        if step == 14:
            resumed = EMA(Averaged(), power=0.75, max_decay=0.9999)
            resumed.model.load_state_dict(straight.model.state_dict())
        if step > 14:
            resumed.update(model, step)
    assert torch.equal(resumed.model.weight, straight.model.weight)
