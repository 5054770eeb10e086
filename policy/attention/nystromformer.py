"""Nystromformer: softmax attention through landmarks (arXiv 2102.03902, section 3)."""

import torch
import torch.nn.functional as F
from torch import nn

from policy.attention.base import MultiHeadAttention
from policy.attention.padding import segment_means, without_padding
from policy.registry import at_least


def pseudo_inverse(matrix, iterations):
    """Moore-Penrose inverse of each (..., S, S) by the iteration of order 3 of equations 14 and 15 of the paper.

    The start is scaled for each matrix by itself: over the whole batch, as published, samples would depend on others.
    """
    norms = matrix.abs().sum(-2).amax(-1) * matrix.abs().sum(-1).amax(-1)
    inverse = matrix.transpose(-2, -1) / norms[..., None, None]
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(iterations):
        product = matrix @ inverse
        inner = 15 * identity - product @ (7 * identity - product)
        inverse = 0.25 * inverse @ (13 * identity - product @ inner)
    return inverse


class NystromformerAttention(MultiHeadAttention):
    """softmax(q k~^T) softmax(q~ k~^T)^+ softmax(q~ k^T) v, scores over sqrt(D). x (B, T, C) -> (B, T, C).

    The landmarks q~ and k~ (B, H, S, D) are means over segments, runs of tokens whose lengths differ by one at most.
    num_landmarks: S; up to S tokens attend exactly, by softmax. iterations: of the pseudo-inverse, which is taken in
    float32 or better. conv_kernel: odd length of a depth-wise convolution of the values along the tokens, one for each
    head, that is added (33 in the paper), or None. Any number of tokens, all treated alike, prefix tokens too; padded
    tokens are in no segment, and if all are, the output is zero. Tokens may be dropped unless there is a convolution.
    attn_drop above 0 raises ValueError, as other options do.
    """

    drops = False

    def __init__(self, *, num_landmarks=64, iterations=6, conv_kernel=None, **common):
        super().__init__(**common)
        at_least(1, num_landmarks=num_landmarks, iterations=iterations)
        self.num_landmarks, self.iterations = num_landmarks, iterations
        self.any_tokens = conv_kernel is None
        self.conv = None
        if conv_kernel is not None:
            if conv_kernel < 1 or conv_kernel % 2 == 0:
                raise ValueError(f"conv_kernel: got {conv_kernel}, allowed: an odd number >= 1, or null")
            heads, padding = self.num_heads, (conv_kernel // 2, 0)
            self.conv = nn.Conv2d(heads, heads, (conv_kernel, 1), padding=padding, groups=heads, bias=False)

    def attend(self, q, k, v, *, key_padding_mask=None, is_causal=False):
        """q, k, v (B, H, T, D) -> (B, H, T, D)."""
        q, k, v = without_padding(key_padding_mask, q, k, v)
        real, mask = torch.ones(1, q.shape[2], dtype=torch.bool, device=q.device), None
        if key_padding_mask is not None:
            # A sample without tokens attends to all its values, which are zero: no row is left without a key.
            real = ~key_padding_mask | key_padding_mask.all(dim=1, keepdim=True)
            mask = real[:, None, None]
        if q.shape[2] <= self.num_landmarks:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            out = self._through_landmarks(q, k, v, real, mask)
        return out if self.conv is None else out + self.conv(v)

    def _through_landmarks(self, q, k, v, real, mask):
        with torch.autocast(q.device.type, enabled=False):
            dtype = torch.promote_types(q.dtype, torch.float32)
            pool = segment_means(real, self.num_landmarks, dtype)[:, None]  # (B, 1, S, T)
            q_mean, k_mean = pool @ q.to(dtype), pool @ k.to(dtype)
            filled = pool.any(dim=-1, keepdim=True)  # (B, 1, S, 1): fewer tokens than landmarks leave some empty
            scores = q_mean @ k_mean.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = scores.masked_fill(~filled.transpose(-2, -1), -torch.inf).softmax(dim=-1)
            inverse = pseudo_inverse(weights * filled, self.iterations)
        values = F.scaled_dot_product_attention(q_mean.to(q.dtype), k, v, attn_mask=mask)
        values = (inverse @ values.to(dtype)).to(v.dtype)
        mask = None if mask is None else filled.transpose(-2, -1)
        return F.scaled_dot_product_attention(q, k_mean.to(q.dtype), values, attn_mask=mask)
