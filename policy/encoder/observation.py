"""Several cameras and low-dimensional keys to one vector per observed frame."""

import math

import torch
from torch import nn

from policy.encoder import build_encoder
from policy.registry import choose

IMAGE_VALUES = "0..255, uint8 or float"
HALF_LEVEL = 0.5  # that a resized image may be beyond these


def crop_images(images, size, *, position=None):
    """Crop (U, C, h, w) to (U, C, size, size): at ``position`` (U, 2) in [0, 1), or the centre when None."""
    rows, columns = images.shape[-2] - size, images.shape[-1] - size
    if position is None:
        top, left = rows // 2, columns // 2
        return images[..., top : top + size, left : left + size]
    span = torch.tensor([rows + 1, columns + 1], device=position.device)
    corner = (position * span).long().to(images.device)  # (U, 2)
    steps = torch.arange(size, device=images.device)
    row = (corner[:, :1] + steps)[:, None, :, None]  # (U, 1, size, 1)
    column = (corner[:, 1:] + steps)[:, None, None, :]  # (U, 1, 1, size)
    frame = torch.arange(len(images), device=images.device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return images[frame, channel, row, column]


def to_unit(images):
    """Images of 0..255 as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


class ObservationEncoder(nn.Module):
    """obs {key: (U, ...)} of U frames -> (U, out_dim): every camera's features, then the low-dim keys.

    shape_meta: {key: {"type": "rgb" | "low_dim", "shape": ...}}; images (U, C, h, w) are uint8 or float in 0..255,
    low-dim keys are raw and normalised by ``normalizer``. Each camera has an encoder of its own. crop: side of the
    random (training, at ``crop_position``) or centre (evaluation) crop in px, None for none. An obs that holds
    "features" (U, feature_dim), computed before by ``encode_images``, needs no images.
    """

    def __init__(self, *, shape_meta, crop, encoder, attention, normalizer):
        super().__init__()
        for key, spec in shape_meta.items():
            choose(f"shape_meta.obs.{key}.type", spec["type"], ("rgb", "low_dim"))
        self.cameras = [key for key, spec in shape_meta.items() if spec["type"] == "rgb"]
        self.low_dim = [key for key, spec in shape_meta.items() if spec["type"] == "low_dim"]
        self.shapes = {key: tuple(spec["shape"]) for key, spec in shape_meta.items()}
        self.crop = crop
        self.normalizer = normalizer
        encoders = {}
        for key in self.cameras:
            _, height, width = self.shapes[key]
            if crop is not None and not 1 <= crop <= min(height, width):
                raise ValueError(f"crop: got {crop} px, allowed: 1 to {min(height, width)}, the size of {key!r}")
            if crop is None and height != width:
                raise ValueError(f"{key!r}: got {height}x{width} px without a crop, allowed: square images or a crop")
            encoders[key] = build_encoder(**encoder, image_size=crop or height, attention=attention)
        self.encoders = nn.ModuleDict(encoders)
        self.feature_dim = sum(encoder.out_dim for encoder in encoders.values())
        self.out_dim = self.feature_dim + sum(self.shapes[key][0] for key in self.low_dim)

    def compile_cameras(self):
        """Compile every camera's encoder; how many distinct frames a batch holds varies."""
        for encoder in self.encoders.values():
            encoder.compile(dynamic=True)

    def encode_images(self, obs, crop_position=None):
        """Camera part (U, feature_dim) of ``obs``."""
        features = []
        for key in self.cameras:
            images = obs[key]
            if self.crop is not None and self.crop < min(images.shape[-2:]):
                images = crop_images(images, self.crop, position=crop_position)
            features.append(self.encoders[key](to_unit(images)).float())
        return torch.cat(features, dim=-1)

    def forward(self, obs, crop_position=None):
        """obs {key: (U, ...)} -> (U, out_dim)."""
        parts = []
        if self.cameras:
            parts.append(obs["features"] if "features" in obs else self.encode_images(obs, crop_position))
        parts += [self.normalizer.normalize(key, obs[key].float()) for key in self.low_dim]
        return torch.cat(parts, dim=-1)

    def check(self, obs):
        """Raise ValueError unless ``obs`` {key: tensor} holds every key as (B, To, *shape), finite, images in 0..255.

        Returns (B, To). Costs no look at uint8 images, one at the other values and one wait for the device.
        """
        missing = [key for key in self.shapes if key not in obs]
        if missing:
            raise ValueError(f"obs: got keys {sorted(obs)}, allowed: {sorted(self.shapes)} (missing {missing})")
        lead = {key: tuple(obs[key].shape[: obs[key].ndim - len(shape)]) for key, shape in self.shapes.items()}
        for key, shape in self.shapes.items():
            if tuple(obs[key].shape[len(lead[key]) :]) != shape or len(lead[key]) != 2:
                raise ValueError(f"obs {key!r}: got shape {tuple(obs[key].shape)}, allowed: (B, To, *{shape})")
        if len(set(lead.values())) != 1:
            raise ValueError(f"obs: got leading shapes {lead}, allowed: one (B, To) for all keys")
        self._check_values({key: obs[key] for key in self.shapes})
        return next(iter(lead.values()))

    def _check_values(self, obs):
        for key, values in obs.items():
            if values.is_complex() or (key in self.cameras and values.dtype == torch.bool):
                allowed = IMAGE_VALUES if key in self.cameras else "real numbers"
                raise ValueError(f"obs {key!r}: got {values.dtype}, allowed: {allowed}")
        obs = {key: values for key, values in obs.items() if values.numel() and values.dtype != torch.uint8}
        if not obs:
            return
        ranges = [torch.stack(values.float().aminmax()) for values in obs.values()]
        ranges = torch.stack([found.to(ranges[0].device) for found in ranges]).tolist()
        for (key, values), (low, high) in zip(obs.items(), ranges, strict=True):
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"obs {key!r}: got NaN or inf, allowed: finite numbers")
            if key not in self.cameras:
                continue
            if low < -HALF_LEVEL or high > 255 + HALF_LEVEL:
                raise ValueError(f"obs {key!r}: got values in [{low:.3g}, {high:.3g}], allowed: {IMAGE_VALUES}")
            if high <= 1 and values.is_floating_point() and bool((values % 1 != 0).any()):
                raise ValueError(f"obs {key!r}: got values in [0, 1], allowed: {IMAGE_VALUES} (multiply by 255)")
