"""Exponential moving average of weights with a warm-up of the decay, a function of the step alone."""

import copy

import torch


class EMA:
    """A copy of ``model`` whose weights follow it: decay(step) = min(max_decay, 1 - (1 + step)^-power).

    Source: Diffusion Policy (arXiv 2303.04137), after crowsonkb/k-diffusion. Resuming continues exactly because the
    decay depends on the step that is passed in, not on a counter of its own.
    """

    def __init__(self, model, *, power, max_decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.power = power
        self.max_decay = max_decay

    def decay(self, step):
        """Decay after ``step`` updates; 0 at the first, which copies the weights."""
        return min(self.max_decay, 1.0 - (1.0 + step) ** -self.power)

    @torch.no_grad()
    def update(self, model, step):
        """Move towards ``model``, ``step`` updates having been made before this one."""
        own, new = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(own, new, 1.0 - self.decay(step))
        for buffer, source in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(source)
