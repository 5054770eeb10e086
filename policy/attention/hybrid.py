"""Hybrid attention: dilated windows, which are sparse and sharp, gated with linear attention, which is global.

The windows are those of atrous attention (ACC-ViT, arXiv 2406.08859), the linear branch is arXiv 2006.16236, section
3.2. Fusing the two by one gate a head is this toolkit's choice.
"""

import torch
import torch.nn.functional as F
from torch import nn

from policy.attention.prefixed import PrefixedAttention
from policy.attention.windows import attend_in_windows, make_windows


class HybridAttention(PrefixedAttention):
    """g_h S_h + (1 - g_h) L_h for each head h, with a learned gate g_h = sigmoid(gate_h). x (B, P+N, C) -> (B, P+N, C).

    S: softmax attention of a patch to its window and to the P prefix tokens; prefix tokens attend to all. Each
    dilation d has a group of consecutive heads, as equal as can be: a window holds window_size patches along each
    axis, d apart, so that d x d windows interleave.
    L: every token, prefix or not, attends to all with weights phi(q) . phi(k) / sum_k phi(q) . phi(k), where
    phi(x) = elu(x) + 1; no scale.

    attn_2d: windows are squares of the grid; without it the grid is read row by row as a sequence and n <= N patches
    may be given. A grid that d x window_size does not divide is padded with masked keys. gate_init: gate_h at the
    start. Linear in N. Raises ValueError for sizes below 1, more dilations than heads, or
    attn_drop > 0, as L forms no weights.
    """

    drops = False

    def __init__(
        self,
        *,
        grid,
        window_size=4,
        attn_2d=True,
        dilations=(1, 2, 3),
        gate_init=0.0,
        **common,
    ):
        super().__init__(**common)
        self.whole = attn_2d and grid[0] > 1
        if not 1 <= len(dilations) <= self.num_heads:
            raise ValueError(f"dilations: got {len(dilations)} of them, allowed: 1 to the {self.num_heads} heads")
        self.windows = [make_windows(grid, window_size, attn_2d=attn_2d, dilation=step) for step in dilations]
        self.gate = nn.Parameter(torch.full((self.num_heads,), float(gate_init)))

    def attend(self, q, k, v, *, key_padding_mask=None, is_causal=False):
        """q, k, v (B, H, P+n, D) -> (B, H, P+n, D)."""
        sparse = super().attend(q, k, v, key_padding_mask=key_padding_mask)
        gate = self.gate.sigmoid()[:, None, None].to(q.dtype)
        return gate * sparse + (1 - gate) * linear_attention(q, k, v, key_padding_mask)

    def attend_patches(self, q, k, v, *, key_padding_mask):
        """The sparse branch: q (B, H, n, D), k and v (B, H, P+n, D) -> (B, H, n, D)."""
        groups = zip(*(x.tensor_split(len(self.windows), dim=1) for x in (q, k, v)), strict=True)
        parts = [
            attend_in_windows(
                windows.resized(q.shape[2]),
                *group,
                prefix=self.prefix_tokens,
                key_padding_mask=key_padding_mask,
            )
            for windows, group in zip(self.windows, groups, strict=True)
        ]
        return torch.cat(parts, dim=1)


def linear_attention(q, k, v, key_padding_mask=None):
    """Weights phi(q) . phi(k), phi(x) = elu(x) + 1, divided by their sum (arXiv 2006.16236, section 3.2), in float32.

    q, k (B, H, T, D), v (B, H, T, E) -> (B, H, T, E); key_padding_mask (B, T) bool: True = no token. A row without
    keys gives 0.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q, k = (_elu_plus_one(x.to(dtype)) for x in (q, k))
        if key_padding_mask is not None:
            k = k.masked_fill(key_padding_mask[:, None, :, None], 0)
        total = q @ k.sum(dim=2)[..., None]  # (B, H, T, 1)
        # Not clamped, as gradients over the smallest number are inf, and NaN for all weights.
        total = total.masked_fill(total < torch.finfo(dtype).tiny, 1.0)
        out = q @ (k.transpose(-2, -1) @ v.to(dtype)) / total
    return out.to(v.dtype)


def _elu_plus_one(x):
    """e^x below 0, where elu(x) + 1 would cancel to nothing; the clamp keeps the unused e^x finite in the gradient."""
    return F.relu(x) + x.clamp(max=0).exp()
