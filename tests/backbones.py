"""Encoders of any size in evaluation mode, and pictures for them."""

import torch

from policy.encoder.pvt import PVTEncoder
from policy.encoder.vit import ViTEncoder

SOFTMAX = {"name": "softmax"}
FIBOTTENTION = {"name": "fibottention", "variant": "robot"}
IMAGE_SIZES = (32, 84, 96, 224)


def vit(arch="deit_tiny_patch16_224", *, image_size=32, attention=SOFTMAX, **options):
    torch.manual_seed(0)
    options = {"depth": 1, "drop_remainder": True, **options}
    return ViTEncoder(arch=arch, image_size=image_size, attention=attention, **options).eval()


def pyramid(*, image_size=32, attention=FIBOTTENTION, **options):
    torch.manual_seed(0)
    return PVTEncoder(image_size=image_size, attention=attention, **options).eval()


def parameter_count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def sharpened(encoder):
    """``encoder`` with attention that is far from uniform, so that it matters which."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(("qkv.weight", "q.weight", "kv.weight")):
                parameter.mul_(10)
    return encoder


def pictures(size, count=2, **options):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1), **options) * 2 - 1
