"""Tiny video classifiers and random clips."""

import torch
from heads import head_config

from policy.build import build_model

SIZE, FRAMES, CLASSES = 12, 3, 4
PATCHES = 9
SOFTMAX = {"name": "softmax"}
SPACE_TIMES = ("divided", "joint", "space")


def video_config(**options):
    options = {"num_classes": CLASSES, "frames": FRAMES, **options}
    return head_config("video_classifier", size=SIZE, depth=3, **options)


def classifier(*, trained=True, **options):
    """A model in evaluation mode; ``trained``: with weights that let time and attention patterns matter."""
    torch.manual_seed(0)
    model = build_model(video_config(**options)).eval()
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith("head.") or ".fc." in name or "time_embed" in name:
                    parameter.normal_(std=0.3)
                elif name.endswith("qkv.weight"):
                    parameter.mul_(10)
    return model


def clips(count=2, *, lead=(), seed=0):
    return torch.rand(count, *lead, FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def labelled(count=4, **options):
    return {"video": clips(count, **options), "label": torch.arange(count) % CLASSES}
