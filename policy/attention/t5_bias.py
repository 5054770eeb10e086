"""Relative position bias with logarithmic buckets (T5, arXiv 1910.10683, section 2.1)."""

import torch
from torch import nn


def relative_position_bucket(offset, *, causal, num_buckets, max_distance):
    """Bucket of a key that stands ``offset`` places after its query, 0 to num_buckets - 1.

    Half of the buckets hold one distance each, the others distances that grow in equal ratios up to ``max_distance``;
    beyond, all share the last one. Both directions have their half of all buckets; with ``causal`` there is the past
    only, and what lies ahead counts as distance 0.
    """
    first, distance = 0, max(-offset, 0)
    if not causal:
        num_buckets //= 2
        first, distance = (num_buckets if offset > 0 else 0), abs(offset)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    # log(distance / exact) / log(max_distance / exact) in integers: rounded logarithms miss the edges of buckets.
    steps, reached = num_buckets - exact, 0
    while (
        reached < steps - 1 and distance**steps * exact ** (reached + 1) >= max_distance ** (reached + 1) * exact**steps
    ):
        reached += 1
    return first + exact + reached


class T5RelativePositionBias(nn.Module):
    """A learned score for every head and bucket of distances, summed over the axes along which tokens lie.

    offsets (w, K, A) of each key from each query along A axes, in tokens, on the CPU. Buckets: half as many as the
    reach (the longest distance + 1), 16 at least and 64 at most. Tables start as normal numbers of deviation 0.02;
    scores of attention are divided by the root of the head width, this bias is not.
    """

    def __init__(self, num_heads, offsets, *, causal=False):
        super().__init__()
        reach = int(offsets.abs().max()) + 1
        rule = {"causal": causal, "num_buckets": max(min(reach // 2, 64), 16), "max_distance": max(reach, 16)}
        buckets = [relative_position_bucket(offset, **rule) for offset in range(-reach, reach + 1)]
        self.table = nn.Parameter(0.02 * torch.randn(offsets.shape[-1], rule["num_buckets"], num_heads))
        places = torch.tensor(buckets, device="cpu")[offsets + reach].to(self.table.device)
        self.register_buffer("buckets", places, persistent=False)  # (w, K, A)

    def forward(self):
        """-> (H, 1, w, K) to be added to scores (B, H, W, w, K)."""
        axes = torch.arange(len(self.table), device=self.table.device)
        return self.table[axes, self.buckets].sum(dim=2).permute(2, 0, 1)[:, None]
