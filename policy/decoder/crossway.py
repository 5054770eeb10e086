"""Crossway's state decoders: they reconstruct the observation from the policy's features (arXiv 2307.01849).

Types a, b and c read the bottleneck of the U-Net: its first position, the first half of its channels, or all of it.
Type d reads the condition vector, before the U-Net. The published robot code of Fibottention trains type a for b and c.
"""

import math

import torch.nn.functional as F
from torch import nn

from policy.decoder.parts import ImageDecoder, low_dim_decoder
from policy.registry import at_least


class StateDecoder(nn.Module):
    """bottleneck (B, C, T') and condition (B, To, K) -> every decoded key, normalised, as (B, To, *shape).

    shape_meta: {key: {"type", "shape"}}; obs_steps: To; bottleneck: (C, T'); condition_dim: K. weight: of every key's
    mean squared error in the loss; weights: {key: weight} for others than that; a key of weight 0 is not decoded.
    image_size: reconstruct images at that size (h = w, px), their own by default. every: reconstruct one in so many
    windows of a batch, to save time. start_channels, channels, code_channels: of an image's first pixels, of the
    convolutions, and of the position code.

    A type says in ``start`` and ``start_size`` what an image ("pixel") and a low-dim key ("vector") are decoded from.
    Raises ValueError for sizes that do not divide, unknown keys, or when nothing is left to decode.
    """

    projects = False  # whether a pixel's channels are mapped to start_channels
    low_dim = True  # whether low-dim keys are decoded

    def __init__(
        self,
        *,
        shape_meta,
        obs_steps,
        bottleneck,
        condition_dim,
        weight,
        weights,
        image_size,
        every,
        start_channels,
        channels,
        code_channels,
        kernel_size,
        groups,
    ):
        super().__init__()
        unknown = sorted(set(weights) - set(shape_meta))
        if unknown:
            raise ValueError(f"decoder.weights: got {', '.join(unknown)}, allowed: {', '.join(sorted(shape_meta))}")
        at_least(1, **{"decoder.every": every})
        self.obs_steps, self.every, self.image_size, self.start_channels = obs_steps, every, image_size, start_channels
        self.weights = {key: weights.get(key, weight) for key in shape_meta}
        negative = {key: value for key, value in self.weights.items() if not value >= 0}
        if negative:
            raise ValueError(f"decoder weight: got {negative}, allowed: >= 0")
        decodable = {key: spec for key, spec in shape_meta.items() if self.low_dim or spec["type"] == "rgb"}
        decoded = {key: spec for key, spec in decodable.items() if self.weights[key] > 0}
        if not decoded:
            kinds = "images and low-dim keys" if self.low_dim else "images"
            raise ValueError(
                f"decoder: got no key to decode, allowed: a type that decodes {kinds} with at least one of them of"
                f" positive weight (weights here: {self.weights})"
            )
        size = self.start_size(bottleneck, condition_dim)
        image = {"channels": channels, "code_channels": code_channels, "kernel_size": kernel_size, "groups": groups}
        if self.projects:
            image["project"] = start_channels
        self.shapes = {key: self._shape(spec) for key, spec in decoded.items()}
        self.decoders = nn.ModuleDict(
            {
                key: ImageDecoder(size["pixel"], self.shapes[key], **image)
                if spec["type"] == "rgb"
                else low_dim_decoder(size["vector"], self.shapes[key][0])
                for key, spec in decoded.items()
            }
        )

    def _shape(self, spec):
        channels, *size = spec["shape"]
        return (channels, *([self.image_size] * 2 if size and self.image_size else size))

    def start_size(self, bottleneck, condition_dim):
        """{"pixel": channels of a pixel, "vector": entries for low-dim keys}; checks that the sizes divide."""
        raise NotImplementedError

    def start(self, bottleneck, condition):
        """{"pixel": (B * To, pixel, r, r), "vector": (B * To, vector)}."""
        raise NotImplementedError

    def forward(self, bottleneck, condition):
        """{key: (B, To, *shape)}, normalised."""
        start = self.start(bottleneck, condition)
        result = {}
        for key, decoder in self.decoders.items():
            decoded = decoder(start["pixel" if isinstance(decoder, ImageDecoder) else "vector"])
            result[key] = decoded.float().unflatten(0, (-1, self.obs_steps))
        return result

    def targets(self, observed):
        """What to reconstruct of normalised ``observed`` {key: (B, To, *shape)}: images at the decoder's size."""
        return {key: self._resized(observed[key], shape) for key, shape in self.shapes.items()}

    def _resized(self, values, shape):
        if tuple(values.shape[2:]) == shape:
            return values
        return F.interpolate(values.flatten(0, 1), shape[1:], mode="bilinear", antialias=True).unflatten(
            0, values.shape[:2]
        )

    def losses(self, reconstructed, targets):
        """{key: mean squared error times the key's weight}."""
        return {key: self.weights[key] * F.mse_loss(value, targets[key]) for key, value in reconstructed.items()}


def _divide(what, size, divisor):
    if size % divisor:
        raise ValueError(f"decoder: got {size} {what}, allowed: a multiple of {divisor}")
    return size // divisor


class DecoderA(StateDecoder):
    """The first position of the bottleneck; its channels are cut by observed step, then into 2x2 pixels."""

    def start_size(self, bottleneck, condition_dim):
        vector = _divide("bottleneck channels", bottleneck[0], 4 * self.obs_steps) * 4
        return {"pixel": vector // 4, "vector": vector}

    def start(self, bottleneck, condition):
        vector = bottleneck[:, :, 0].unflatten(1, (self.obs_steps, -1)).flatten(0, 1)  # (B * To, C / To)
        return {"pixel": vector.unflatten(1, (-1, 2, 2)), "vector": vector}


class DecoderC(StateDecoder):
    """All channels, cut by observed step; the positions of the bottleneck are the pixels."""

    projects = True
    divisor = 1  # of the channels, the first part of which is read

    def start_size(self, bottleneck, condition_dim):
        channels = _divide("bottleneck channels", bottleneck[0], self.divisor * self.obs_steps)
        self.side = math.isqrt(bottleneck[1])
        if self.side**2 != bottleneck[1]:
            raise ValueError(
                f"decoder: got {bottleneck[1]} positions in the bottleneck, allowed: a square number, as 4"
            )
        return {"pixel": channels, "vector": channels}

    def start(self, bottleneck, condition):
        kept = bottleneck[:, : bottleneck.shape[1] // self.divisor]
        kept = kept.unflatten(1, (self.obs_steps, -1)).flatten(0, 1)  # (B * To, C / divisor / To, T')
        return {"pixel": kept.unflatten(2, (self.side, self.side)), "vector": kept.mean(dim=2)}


class DecoderB(DecoderC):
    """As c, of the first half of the channels."""

    divisor = 2


class DecoderD(StateDecoder):
    """The condition vector of each observed step, past the U-Net; images only."""

    low_dim = False

    def __init__(self, *, condition_dim, **options):
        super().__init__(condition_dim=condition_dim, **options)
        self.reduce = nn.Sequential(nn.Linear(condition_dim, self.start_channels), nn.ReLU())

    def start_size(self, bottleneck, condition_dim):
        return {"pixel": self.start_channels, "vector": None}

    def start(self, bottleneck, condition):
        pixel = self.reduce(condition.flatten(0, 1))
        return {"pixel": pixel[..., None, None].expand(-1, -1, 2, 2), "vector": None}
