"""Dense softmax attention, the baseline (arXiv 1706.03762, section 3.2), through torch's fused kernels."""

from functools import partial

import torch
import torch.nn.functional as F

from policy.attention.base import MultiHeadAttention
from policy.attention.windows import masked_softmax


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
        mask = self._mask(q, key_padding_mask, is_causal)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout_p)

    def attention_map(self, x, is_causal=False, key_padding_mask=None):
        """Weights (B, H, T, T) that each query gives to each key."""
        q, k, _ = self.split(x)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return masked_softmax(scores, self._mask(q, key_padding_mask, is_causal))

    @staticmethod
    def _mask(q, key_padding_mask, is_causal):
        """Pairs (B or 1, 1, T, T) that may attend."""
        tokens = q.shape[2]
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=q.device)
        if is_causal:
            mask = mask.tril()
        return mask if key_padding_mask is None else mask & ~key_padding_mask[:, None, None]
