"""Softmax attention over given pairs, and windows pair by pair, in float64: what tests of mechanisms share."""

import math

import torch


def qkv(tokens, *, batch=2, heads=2, width=4, scale=1.0, seed=0):
    """Random q, k, v, each (B, H, T, D)."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(3, batch, heads, tokens, width, generator=generator, dtype=torch.float64)).unbind(0)


def softmax_attention(q, k, v, mask=True, bias=0.0):
    """Over the pairs of ``mask``, broadcast to (B, H, T, T); a row without any gives 0."""
    weights = torch.exp(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias) * mask
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-300) @ v


def with_prefix(pairs, prefix):
    """pairs (H, N, N) -> (H, P+N, P+N) with full rows and columns of the prefix."""
    mask = torch.ones(len(pairs), prefix + pairs.shape[1], prefix + pairs.shape[1], dtype=torch.bool)
    mask[:, prefix:, prefix:] = pairs
    return mask


def window_pairs(grid, window, reach=0, attn_2d=False, dilation=1):
    """Pairs (N, N) of patches of which the second lies in the window of the first, patch by patch."""
    rows, columns = grid if attn_2d else (1, grid[0] * grid[1])

    def near(query, key):
        if query % dilation != key % dilation:
            return False
        first = query // dilation // window * window
        return first - reach <= key // dilation < first + window + reach

    n = rows * columns
    pairs = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            same_row = rows == 1 or near(i // columns, j // columns)
            pairs[i, j] = same_row and near(i % columns, j % columns)
    return pairs
