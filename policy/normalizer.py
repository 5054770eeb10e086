"""Per-key linear normalisation of low-dimensional data to [-1, 1], saved with the weights."""

import torch
from torch import nn

RESOLUTION = 1e-5  # share of its largest value that a column must move by, about a hundred steps of float32
ROUNDING = 1e-14  # the same of the largest value of all columns: a simulator's 1e-17 beside 1 is a rounded 0


class Normalizer(nn.Module):
    """Maps the range seen in training to [-1, 1] for each key; x -> x * scale + offset.

    shapes: {key: shape}; scale and offset of a key are buffers of that shape, so they travel with ``state_dict``.
    A column that moves by less than ``RESOLUTION`` is only centred. The unit of the data changes nothing.
    constant: "KEY[COLUMN]" of those columns, since the last ``fit`` of each key.
    """

    def __init__(self, shapes):
        super().__init__()
        for key, shape in shapes.items():
            self.register_buffer(f"{key}_scale", torch.ones(tuple(shape)))
            self.register_buffer(f"{key}_offset", torch.zeros(tuple(shape)))
        self._still = {}  # {key: columns}

    @property
    def constant(self):
        return [f"{key}[{column}]" for key, columns in self._still.items() for column in columns]

    def fit(self, key, data, columns=None):
        """Use the minimum and maximum over the first axis of ``data`` (F, *shape).

        columns: entries of the last axis that this is for, all by default; the others are left as they are. Raises
        ValueError for data that are not finite.
        """
        low, high = data.amin(dim=0), data.amax(dim=0)
        spread, size = high - low, torch.maximum(low.abs(), high.abs())
        if not spread.isfinite().all():
            raise ValueError(f"{key}: got NaN or inf in the training data, allowed: finite numbers")
        least = torch.maximum(RESOLUTION * size, ROUNDING * size.max())
        moves = spread > least.clamp_min(torch.finfo(torch.float32).tiny)
        scale = 2.0 / torch.where(moves, spread, 2.0)
        offset = -scale * (low + high) / 2
        scaled = torch.zeros(data.shape[-1], dtype=torch.bool)
        scaled[slice(None) if columns is None else list(columns)] = True
        scale[..., ~scaled], offset[..., ~scaled] = 1.0, 0.0
        self.get_buffer(f"{key}_scale").copy_(scale)
        self.get_buffer(f"{key}_offset").copy_(offset)
        moves = moves.reshape(-1, data.shape[-1]).any(dim=0)
        self._still[key] = (scaled & ~moves).nonzero().flatten().tolist()

    def check(self, tensors, name):
        """Raise ValueError that begins with ``name`` for a scale among ``tensors``, a state_dict, that no data have."""
        for key in (key for key in self.state_dict() if key.endswith("_scale")):
            scale = tensors[key].float()
            if not ((scale > 0) & scale.reciprocal().isfinite()).all():
                raise ValueError(f"{name}{key}: got a scale that is not above 0, allowed: those of a fitted normaliser")

    def normalize(self, key, x):
        """x (..., *shape) raw units -> [-1, 1]."""
        return x * self.get_buffer(f"{key}_scale") + self.get_buffer(f"{key}_offset")

    def denormalize(self, key, x):
        """x (..., *shape) in [-1, 1] -> raw units."""
        return (x - self.get_buffer(f"{key}_offset")) / self.get_buffer(f"{key}_scale")
