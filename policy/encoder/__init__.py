"""Vision encoders behind one interface; a new one is one file here, one line below and one config."""

import inspect

from policy.encoder.pvt import PVTEncoder
from policy.encoder.resnet import ResNet18Encoder
from policy.encoder.vit import ViTEncoder
from policy.registry import check_options, lookup

__all__ = ["build_encoder", "list_encoders"]

ENCODERS = {"pvt_v2": PVTEncoder, "resnet18": ResNet18Encoder, "vit": ViTEncoder}


def list_encoders():
    """Names that ``build_encoder`` and ``encoder.name`` accept."""
    return sorted(ENCODERS)


def build_encoder(name, *, image_size, attention, **options):
    """An encoder of one camera: a module images (B, 3, h, w) in [-1, 1] -> (B, out_dim), with ``out_dim``.

    image_size: h = w after cropping; attention: {"name": ..., options}, for encoders that have one.
    Raises ValueError for an unknown name or option.
    """
    encoder = lookup("encoder", name, ENCODERS)
    check_options("encoder", name, options, encoder, without=("image_size", "attention"))
    if "attention" in inspect.signature(encoder).parameters:
        options["attention"] = attention
    return encoder(image_size=image_size, **options)
