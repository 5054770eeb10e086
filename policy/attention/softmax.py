"""Dense softmax attention, the baseline (arXiv 1706.03762, section 3.2), through torch's fused kernels."""

from functools import partial

import torch
import torch.nn.functional as F

from policy.attention.base import MultiHeadAttention


class SoftmaxAttention(MultiHeadAttention):
    """Every token attends to all. x (B, P+N, C) -> (B, P+N, C)."""

    causal = any_tokens = True

    def forward(self, x, attn_mask=None, is_causal=False, kept=None, key_padding_mask=None):
        """As of the base class; attn_mask (T, T) or (B, H, T, T) may be given, but alone."""
        if attn_mask is None:
            return super().forward(x, is_causal=is_causal, kept=kept, key_padding_mask=key_padding_mask)
        if is_causal or kept is not None or key_padding_mask is not None:
            raise ValueError("attn_mask: got one beside is_causal, kept or key_padding_mask, allowed: alone")
        return self.project(x, partial(F.scaled_dot_product_attention, attn_mask=attn_mask, dropout_p=self.dropout_p))

    def attend(self, q, k, v, *, key_padding_mask=None, is_causal=False):
        """q, k, v (B, H, T, D) -> (B, H, T, D)."""
        if key_padding_mask is None:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_p, is_causal=is_causal)
        mask = allowed_pairs(q, key_padding_mask, is_causal)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout_p)


def allowed_pairs(q, key_padding_mask, is_causal):
    """Pairs (B or 1, 1, T, T) that may attend."""
    tokens = q.shape[2]
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=q.device)
    if is_causal:
        mask = mask.tril()
    return mask if key_padding_mask is None else mask & ~key_padding_mask[:, None, None]
