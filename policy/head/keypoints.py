"""Learning to see: regress known keypoints of rendered scenes, to pre-train an encoder for a policy.

Independent random scenes teach position and angle far faster than demonstrations do through the noise-prediction
loss; the encoder's own read-out is the prediction, so nothing is thrown away afterwards.
"""

import torch
import torch.nn.functional as F
from torch import nn

from policy.encoder.observation import ObservationEncoder
from policy.normalizer import Normalizer

BETA = 0.02  # of the smooth L1 loss, in units of the targets: quadratic within 5 px of 512, or 5 mm of 250


class KeypointRegressor(nn.Module):
    """images -> keypoint coordinates, through encoders each of whose out_dim numbers are its camera's reading of all.

    shape_meta: {"obs": {camera: {"type": "rgb", "shape"}}, "keypoint": {"shape": [K]}}. Targets are points in the image
    plane (x, y) with ``px_per_unit`` world px per unit, or in space (x, y, z) with ``mm_per_unit``: the mean distance
    is reported in that unit.
    """

    def __init__(self, *, shape_meta, crop, encoder, attention, px_per_unit=None, mm_per_unit=None):
        super().__init__()
        if crop is not None:
            raise ValueError(f"crop: got {crop}, allowed: null (a crop would move the keypoints)")
        if (px_per_unit is None) == (mm_per_unit is None):
            raise ValueError(f"px_per_unit, mm_per_unit: got {px_per_unit}, {mm_per_unit}, allowed: exactly one")
        (size,) = shape_meta["keypoint"]["shape"]
        cameras = {key: spec for key, spec in shape_meta["obs"].items() if spec["type"] == "rgb"}
        self.encoder = ObservationEncoder(
            shape_meta=cameras, crop=None, encoder=encoder, attention=attention, normalizer=Normalizer({})
        )
        wrong = {key: e.out_dim for key, e in self.encoder.encoders.items() if e.out_dim != size}
        if wrong:
            raise ValueError(f"encoder.out_dim: got {wrong}, allowed: {size}, the number of targets")
        self.size = size
        self.unit, self.per_unit, self.dims = ("px", px_per_unit, 2) if px_per_unit else ("mm", mm_per_unit, 3)
        if size % self.dims:
            raise ValueError(f"keypoint: got {size} targets, allowed: a multiple of {self.dims}")

    def compile_training(self):
        """Compile what a training step spends its time in (torch.compile)."""
        self.encoder.compile_cameras()

    def randomness(self, count, generator):
        """This loss draws nothing."""
        return {}

    def forward(self, batch, randomness):
        """{"loss", "px" or "mm": mean distance, with several cameras also "mm_CAMERA"}.

        batch: {"obs": {camera: (B, C, h, w)}, "keypoint": (B, K)}.
        """
        predicted = self.encoder(batch["obs"]).unflatten(1, (-1, self.size))  # (B, cameras, K)
        target = batch["keypoint"][:, None].expand_as(predicted)
        losses = {"loss": F.smooth_l1_loss(predicted, target, beta=BETA)}
        with torch.no_grad():
            distance = (predicted - target).unflatten(2, (-1, self.dims)).norm(dim=-1) * self.per_unit
        losses[self.unit] = distance.mean()
        if len(self.encoder.cameras) > 1:
            losses |= {f"{self.unit}_{key}": distance[:, i].mean() for i, key in enumerate(self.encoder.cameras)}
        return losses
