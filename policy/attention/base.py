"""What all attention mechanisms share: projections, heads, checks, maps; a mechanism is its ``attend``."""

import contextlib
from functools import partial

import torch
from torch import nn


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention; parameters are named as timm's ``Attention``. x (B, P+N, C) -> (B, P+N, C).

    A mechanism defines ``attend(q, k, v, *, key_padding_mask, is_causal)``: q, k (B, H, T, D), v (B, H, T, E) ->
    (B, H, T, E). fp32: attention itself in float32 under autocast. attn_drop: dropout of attention weights, in training
    (``dropout_p``). Attributes say what a mechanism can do.
    """

    causal = False  # is_causal may be asked for
    always_causal = False  # nothing looks ahead, whatever is asked for
    any_tokens = False  # tokens may be missing: their places do not matter, or ``attend_kept`` knows them
    drops = True  # there are weights for ``attn_drop``
    has_map = True  # outputs are sums of the values, so that weights can be read off
    quadratic = False  # numbers for all pairs of tokens are kept

    def __init__(self, *, dim, num_heads, qkv_bias=True, attn_drop=0.0, fp32=False):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, allowed: a divisor of dim {dim}")
        if attn_drop and not self.drops:
            raise ValueError(f"attn_drop: got {attn_drop}, allowed with {self._name()}: 0 (it forms no weights)")
        self.num_heads, self.attn_drop, self.fp32 = num_heads, attn_drop, fp32
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None, is_causal=False, kept=None, key_padding_mask=None):
        """x (B, T, C) -> (B, T, C); timm's blocks pass the two switches. Raises ValueError for what is not defined.

        kept (B, n): the patch tokens that x holds, where others were dropped. key_padding_mask (B, T) bool: True for
        keys that are no tokens, as of torch's ``MultiheadAttention``.
        """
        if attn_mask is not None:
            raise ValueError(f"attn_mask: got one, allowed with {self._name()}: none (its pattern is fixed)")
        if is_causal and not self.causal:
            raise ValueError(f"is_causal: got True, allowed with {self._name()}: False (no causal form)")
        if key_padding_mask is not None and key_padding_mask.shape != x.shape[:2]:
            raise ValueError(f"key_padding_mask: got {tuple(key_padding_mask.shape)}, allowed: {tuple(x.shape[:2])}")
        if kept is not None:
            return self.project(x, partial(self.attend_kept, kept=kept, key_padding_mask=key_padding_mask))
        return self.project(x, partial(self.attend, key_padding_mask=key_padding_mask, is_causal=is_causal))

    def project(self, x, attend):
        """x (B, T, C) -> (B, T, C) through the projections, with attend(q, k, v) in between."""
        q, k, v = self.split(x)
        dtype = q.dtype
        with self.precision(x.device):
            if self.fp32:
                q, k, v = q.float(), k.float(), v.float()
            out = attend(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2).to(dtype))

    def attend_kept(self, q, k, v, kept, *, key_padding_mask=None):
        """q, k, v (B, H, P+n, D) of the patch tokens ``kept`` (B, n) -> (B, H, P+n, D)."""
        if not self.any_tokens:
            allowed = "all (it needs their places)"
            raise ValueError(f"kept: got some of the tokens, allowed with {self._name()}: {allowed}")
        return self.attend(q, k, v, key_padding_mask=key_padding_mask)

    def precision(self, device):
        """The context of attention itself: without autocast where ``fp32`` asks for it."""
        return torch.autocast(device.type, enabled=False) if self.fp32 else contextlib.nullcontext()

    def split(self, x):
        """x (B, T, C) -> q, k, v, each (B, H, T, D)."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    @property
    def dropout_p(self):
        """Dropout of attention weights, in training."""
        return self.attn_drop if self.training else 0.0

    def attention_map(self, x, **switches):
        """Weights (B, H, T, T) that each query gives to each key, without dropout; switches: as of ``attend``.

        They are what ``attend`` makes of unit vectors in place of the values; of what is random it shows one draw.
        Raises ValueError where outputs are no sums of the values.
        """
        if not self.has_map:
            raise ValueError(f"attention map: got {self._name()}, which has none; allowed: mechanisms with weights")
        q, k, _ = self.split(x)
        units = torch.eye(q.shape[2], dtype=q.dtype, device=q.device).expand(*q.shape[:3], -1)
        dropped, self.attn_drop = self.attn_drop, 0.0
        try:
            return self.attend(q, k, units, **switches)
        finally:
            self.attn_drop = dropped

    def _name(self):
        return type(self).__name__
