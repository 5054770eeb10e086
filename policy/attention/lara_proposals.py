"""Where linear randomized attention draws its samples: around pooled queries and keys (arXiv 2204.04667, section 4)."""

import math

import torch
from torch import nn

from policy.registry import at_least, choose

PROPOSALS = ("pool", "no_param_pool", "adaptive_1d")
MIXES = ("none", "mixed", "vmixed")
POOL_MODULES = ("light", "dense")
SAMPLINGS = ("single", "multisample", "antithetics")


def pool(x, grid, size, real=None):
    """Adaptive average pooling of the real tokens of a grid to ``size`` landmarks, bins as of torch's.

    x (B, H, N, D), grid and size (rows, columns), real (B, N) bool -> means (B, H, C, D), tokens in each (B, 1, C, 1)
    with C = rows x columns of ``size``. A landmark without a real token has mean 0.
    """
    if real is None:
        real = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device)
    real = real[:, None, :, None]
    # A padded token may hold anything, and 0 * NaN is NaN.
    sums = _sum_bins(x.masked_fill(~real, 0), grid, size)
    counts = _sum_bins(real.to(torch.promote_types(x.dtype, torch.float32)), grid, size)
    return (sums / counts.clamp(min=1)).to(x.dtype), counts


def _sum_bins(x, grid, size):
    rows, columns = (_bins(n, count, x) for n, count in zip(grid, size, strict=True))
    x = (rows @ x.unflatten(2, grid).flatten(3)).unflatten(3, (grid[1], -1))
    return (columns @ x).flatten(2, 3)


def _bins(tokens, count, like):
    """Which tokens each bin holds, (count, tokens) of 0 and 1 in the type of ``like``."""
    first, token = torch.arange(count, device=like.device)[:, None], torch.arange(tokens, device=like.device)
    start, end = first * tokens // count, -(-(first + 1) * tokens // count)
    return ((token >= start) & (token < end)).to(like.dtype)


class Proposals(nn.Module):
    """Landmarks: C pooled queries and C pooled keys; their sums are the centres of the proposals.

    Options as ``LinearRandomizedAttention`` describes them; ``grid``: (rows, columns) of all patches.
    """

    def __init__(self, *, proposal, mix, pool_module, num_landmarks, grid, num_heads, head_dim):
        super().__init__()
        choose("proposal", proposal, PROPOSALS)
        choose("mix", mix, MIXES)
        choose("pool_module", pool_module, POOL_MODULES)
        if proposal == "no_param_pool" and pool_module != "light":
            raise ValueError(
                f"pool_module: got {pool_module!r}, allowed with no_param_pool: light (nothing is learned)"
            )
        at_least(1, num_landmarks=num_landmarks)
        self.in_row = proposal == "adaptive_1d" or grid[0] == 1
        if not self.in_row and math.isqrt(num_landmarks) ** 2 != num_landmarks:
            raise ValueError(f"num_landmarks: got {num_landmarks}, allowed on an image: a square number")
        self.proposal, self.mix, self.pool_module, self.num_landmarks = proposal, mix, pool_module, num_landmarks
        self.grid = tuple(grid)
        width = head_dim * (num_heads if pool_module == "dense" else 1)
        self.of_queries, self.of_keys = (self._layers(width) for _ in range(2))

    def _layers(self, width):
        if self.proposal == "no_param_pool":
            return nn.Identity()
        linear = nn.Linear(width, width)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(linear, nn.LayerNorm(width))

    def forward(self, q, k, v, real=None):
        """q, k, v (B, H, N, D) of the patches, real (B, N) -> pooled queries and keys, each (B, H, C, D)."""
        q_bar, k_bar = self._landmarks(q, self.of_queries, real), self._landmarks(k, self.of_keys, real)
        if self.mix != "none":
            k_bar = self._mixed(k_bar, v, real)
        return q_bar, k_bar

    def pool(self, x, real=None):
        """x (B, H, N, D), real (B, N) -> means (B, H, C, D) and tokens in each (B, 1, C, 1); C is at most N."""
        tokens, (rows, columns) = x.shape[2], self.grid
        if self.in_row:
            return pool(x, (1, tokens), (1, min(self.num_landmarks, tokens)), real)
        side = math.isqrt(self.num_landmarks)
        return pool(x, self.grid, (min(side, rows), min(side, columns)), real)

    def _landmarks(self, x, transform, real):
        if self.proposal == "adaptive_1d":
            return self.pool(self._transformed(transform, x), real)[0]
        return self._transformed(transform, self.pool(x, real)[0])

    def _transformed(self, transform, x):
        """``transform`` on each head of x (B, H, T, D), or on all heads together."""
        if self.pool_module == "light":
            return transform(x)
        heads = x.shape[1]
        return transform(x.transpose(1, 2).flatten(2)).unflatten(2, (heads, -1)).transpose(1, 2)

    def _mixed(self, k_bar, v, real):
        """Each pooled key becomes a softmax mean of all; "vmixed" weighs them by the norms of pooled values, too."""
        scores = k_bar @ k_bar.transpose(-2, -1) * k_bar.shape[-1] ** -0.5
        if self.mix == "vmixed":
            norms = torch.linalg.vector_norm(self.pool(v, real)[0], dim=-1)
            scores = scores + (norms + 1e-4).log()[:, :, None]
        return scores.softmax(dim=-1) @ k_bar


def draw(centres, sampling, noise):
    """Samples w ~ N(centre, noise^2) from torch's global generator: centres (B, H, C, D) -> (B, H, R C, D).

    One round ("single", R = 1) or two, of independent ("multisample") or opposite noise ("antithetics").
    """
    if sampling == "single":
        return centres + noise * torch.randn_like(centres)
    first = torch.randn_like(centres)
    second = -first if sampling == "antithetics" else torch.randn_like(centres)
    return torch.cat([centres + noise * first, centres + noise * second], dim=2)
