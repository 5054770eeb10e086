"""Dense softmax attention, the baseline (arXiv 1706.03762, section 3.2), through torch's fused kernels."""

import torch.nn.functional as F
from torch import nn


class SoftmaxAttention(nn.Module):
    """Multi-head self-attention of a ViT block; parameters are named as timm's ``Attention``.

    x (B, P+N, C) -> (B, P+N, C).
    """

    def __init__(self, *, dim, num_heads, qkv_bias=True, attn_drop=0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, allowed: a divisor of dim {dim}")
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None, is_causal=False, kept=None):
        """x (B, P+N, C) -> (B, P+N, C); which patch tokens are ``kept`` does not matter here: all that are attend."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, P+N, D)
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))
