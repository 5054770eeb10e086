"""Padded tokens in mechanisms that sum over tokens."""

import torch


def without_padding(key_padding_mask, *tensors):
    """Each (B, H, T, D), with zeros for the tokens of ``key_padding_mask`` (B, T) or None."""
    if key_padding_mask is None:
        return tensors
    return tuple(x.masked_fill(key_padding_mask[:, None, :, None], 0.0) for x in tensors)


def segment_means(real, segments, dtype=torch.float32):
    """Matrix (B, S, T) that averages the tokens of each of S segments; ``real`` (B, T) bool says which tokens count.

    Segments are runs of real tokens whose lengths differ by one at most; with fewer tokens than segments, some are
    empty and their rows zero.
    """
    rank = real.cumsum(dim=1) - 1
    count = real.sum(dim=1, keepdim=True).clamp(min=1)
    segment = torch.where(real, rank * segments // count, segments)  # (B, T)
    member = (segment[:, None] == torch.arange(segments, device=real.device)[:, None]).to(dtype)
    return member / member.sum(dim=-1, keepdim=True).clamp(min=1)
