"""Learning to see: regress known keypoints of rendered scenes, to pre-train an encoder for a policy.

Independent random scenes teach position and angle far faster than demonstrations do through the noise-prediction
loss; the encoder's own read-out is the prediction, so nothing is thrown away afterwards.
"""

import torch
import torch.nn.functional as F
from torch import nn

from policy.encoder.observation import ObservationEncoder
from policy.normalizer import Normalizer

BETA = 0.02  # of the smooth L1 loss, in units of half the image side: quadratic within 5 px of 512


class KeypointRegressor(nn.Module):
    """images -> keypoint coordinates in [-1, 1], x and y in turn, through an encoder with out_dim = that many numbers.

    shape_meta: {"obs": {camera: {"type": "rgb", "shape"}}, "keypoint": {"shape": [K]}}; px_per_unit: world px per unit
    of the targets, for the reported error.
    """

    def __init__(self, *, shape_meta, crop, encoder, attention, px_per_unit):
        super().__init__()
        if crop is not None:
            raise ValueError(f"crop: got {crop}, allowed: null (a crop would move the keypoints)")
        (size,) = shape_meta["keypoint"]["shape"]
        cameras = {key: spec for key, spec in shape_meta["obs"].items() if spec["type"] == "rgb"}
        self.encoder = ObservationEncoder(
            shape_meta=cameras, crop=None, encoder=encoder, attention=attention, normalizer=Normalizer({})
        )
        if self.encoder.out_dim != size:
            raise ValueError(f"encoder.out_dim: got {self.encoder.out_dim}, allowed: {size}, the number of targets")
        self.px_per_unit = px_per_unit

    def fit_normalizer(self, dataset):
        """Nothing to fit: images have a fixed range and the targets are normalised by the world's size."""

    def randomness(self, count, generator):
        """This loss draws nothing."""
        return {}

    def forward(self, batch, randomness):
        """{"loss", "px": mean distance} of {"obs": {camera: (B, C, h, w)}, "keypoint": (B, K)}."""
        predicted = self.encoder(batch["obs"])
        loss = F.smooth_l1_loss(predicted, batch["keypoint"], beta=BETA)
        with torch.no_grad():
            distance = (predicted - batch["keypoint"]).unflatten(1, (-1, 2)).norm(dim=-1).mean()
        return {"loss": loss, "px": distance * self.px_per_unit}
