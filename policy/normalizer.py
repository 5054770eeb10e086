"""Per-key linear normalisation of low-dimensional data to [-1, 1], saved with the weights."""

import torch
from torch import nn

MIN_RANGE = 1e-4  # a dimension that moves less than this is only centred, as in Diffusion Policy's normaliser


class Normalizer(nn.Module):
    """Maps the range seen in training to [-1, 1] for each key; x -> x * scale + offset.

    shapes: {key: shape}; scale and offset of a key are buffers of that shape, so they travel with ``state_dict``.
    """

    def __init__(self, shapes):
        super().__init__()
        for key, shape in shapes.items():
            self.register_buffer(f"{key}_scale", torch.ones(tuple(shape)))
            self.register_buffer(f"{key}_offset", torch.zeros(tuple(shape)))

    def fit(self, key, data, columns=None):
        """Use the minimum and maximum over the first axis of ``data`` (F, *shape).

        columns: entries of the last axis that this is for, all by default; the others are left as they are.
        """
        low, high = data.amin(dim=0), data.amax(dim=0)
        spread = high - low
        moves = spread > MIN_RANGE
        scale = torch.where(moves, 2.0 / spread.clamp_min(MIN_RANGE), 1.0)
        offset = -scale * (low + high) / 2
        if columns is not None:
            kept = torch.ones(data.shape[-1], dtype=torch.bool)
            kept[list(columns)] = False
            scale[..., kept], offset[..., kept] = 1.0, 0.0
        self.get_buffer(f"{key}_scale").copy_(scale)
        self.get_buffer(f"{key}_offset").copy_(offset)

    def normalize(self, key, x):
        """x (..., *shape) raw units -> [-1, 1]."""
        return x * self.get_buffer(f"{key}_scale") + self.get_buffer(f"{key}_offset")

    def denormalize(self, key, x):
        """x (..., *shape) in [-1, 1] -> raw units."""
        return (x - self.get_buffer(f"{key}_offset")) / self.get_buffer(f"{key}_scale")
