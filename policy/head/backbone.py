"""What models on a policy's vision encoder share: one camera called "image", and its layers."""

from torch import nn

from policy.encoder.observation import ObservationEncoder
from policy.normalizer import Normalizer

CAMERA = "image"


class OnEncoder(nn.Module):
    """A model on the encoder of one camera, held as policies hold theirs: ``load_encoder`` finds it.

    shape_meta: {"obs": {"image": {"type": "rgb", "shape": [3, s, s]}}}; the others are as of ``ObservationEncoder``.
    """

    def __init__(self, *, shape_meta, crop, encoder, attention):
        super().__init__()
        cameras = [key for key, spec in shape_meta["obs"].items() if spec["type"] == "rgb"]
        if cameras != [CAMERA]:
            raise ValueError(f"shape_meta: got cameras {', '.join(cameras) or 'none'}, allowed: {CAMERA} alone")
        self.encoder = ObservationEncoder(
            shape_meta=shape_meta["obs"], crop=crop, encoder=encoder, attention=attention, normalizer=Normalizer({})
        )

    @property
    def vision(self):
        """The encoder of the one camera."""
        return self.encoder.encoders[CAMERA]

    def freeze_reading(self):
        """Do not train what makes features of tokens, where it is not used.

        A parameter that gets no gradient stops a run on several GPUs, and resuming.
        """
        for part in ("readout", "keypoints"):
            getattr(self.vision, part, nn.Identity()).requires_grad_(False)

    @property
    def num_layers(self):
        """Layers for layer-wise learning rates, the head or decoder being the last one's successor."""
        return self.vision.num_layers

    def layer_of(self, name):
        """Layer of the parameter called ``name``: 0 for the input, ``num_layers`` for what is no encoder."""
        prefix = f"encoder.encoders.{CAMERA}."
        return self.vision.layer_of(name.removeprefix(prefix)) if name.startswith(prefix) else self.num_layers


def kept_tokens(order, ratio):
    """Ascending indices (B, n) of the patch tokens that stay, those of the smallest ``order`` (B, N)."""
    count = max(round(order.shape[1] * (1 - ratio)), 1)
    return order.argsort(dim=1)[:, :count].sort(dim=1).values
