"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch with its reverse, as timm pairs them."""

import numpy as np
import torch
import torch.nn.functional as F


def draw_mixing(count, generator, *, mixup, cutmix):
    """{"share", "cut", "row", "column"}, each (B,): what ``mix_images`` does to each of ``count`` images.

    mixup, cutmix: parameters of the Beta distribution of an image's share in the mix, 0 for none; with both, each
    image takes one or the other with even chances.
    """
    seed = int(torch.randint(2**31, (), generator=generator))
    rng = np.random.default_rng(seed)
    cut = rng.random(count) < (0.5 if mixup > 0 and cutmix > 0 else float(cutmix > 0))
    shares = {alpha: rng.beta(alpha, alpha, count) if alpha > 0 else np.ones(count) for alpha in (mixup, cutmix)}
    drawn = {
        "share": np.where(cut, shares[cutmix], shares[mixup]),
        "cut": cut,
        "row": rng.random(count),
        "column": rng.random(count),
    }
    return {key: torch.from_numpy(value if key == "cut" else value.astype(np.float32)) for key, value in drawn.items()}


def mix_images(images, drawn):
    """(images (B, C, h, w) mixed as ``draw_mixing`` says, share (B,) of its own content that each kept)."""
    height, width = images.shape[-2:]
    other, share, cut = images.flip(0), drawn["share"], drawn["cut"]
    side = (1 - share).sqrt()
    inside = _within(drawn["row"], side, height)[:, :, None] & _within(drawn["column"], side, width)[:, None]
    kept = torch.where(cut[:, None, None], (~inside).to(images.dtype), share[:, None, None].to(images.dtype))
    mixed = kept[:, None] * images + (1 - kept[:, None]) * other
    return mixed, kept.mean(dim=(1, 2)).expand(len(images))


def _within(centre, side, length):
    """Pixels (B, length) within a box of ``side`` times the length around ``centre`` (B,), cut at the borders."""
    pixels = torch.arange(length, device=centre.device)
    middle, half = (centre * length).floor(), (side * length / 2).floor()
    return (pixels >= (middle - half)[:, None]) & (pixels < (middle + half)[:, None])


def soft_targets(labels, num_classes, *, smoothing, share=None):
    """Targets (B, K): smoothed one-hot ``labels`` (B,), mixed with those of the reversed batch by ``share``."""
    target = F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes
    if share is None:
        return target
    return share[:, None] * target + (1 - share[:, None]) * target.flip(0)
