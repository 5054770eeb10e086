"""Linformer: keys and values projected along the token axis (arXiv 2006.04768, section 4)."""

import torch
import torch.nn.functional as F
from torch import nn

from policy.attention.base import MultiHeadAttention
from policy.attention.padding import segment_means, without_padding
from policy.attention.random_features import layer_generator
from policy.registry import at_least, choose, lookup

SHARES = ("none", "heads", "kv")


def _normal(heads, rank, tokens, generator):
    """Entries of variance 1 / rank, as in the proof of the paper's theorem 2."""
    return torch.randn(heads, rank, tokens, generator=generator) * rank**-0.5


def _mean(heads, rank, tokens, generator):
    """Means of runs of tokens; the identity at full rank."""
    return segment_means(torch.ones(1, tokens, dtype=torch.bool), rank).repeat(heads, 1, 1)


INITS = {"normal": _normal, "mean": _mean}


class LinformerAttention(MultiHeadAttention):
    """softmax(q (E k)^T / sqrt(D)) (F v) with learned E and F of shape (rank, P+N). x (B, P+N, C) -> (B, P+N, C).

    rank: projected tokens, at most P+N are used. share: "none" (E and F for each head), "heads" (E and F for all
    heads) or "kv" (one E = F for all heads), as in the paper; it is per layer here. init: "normal" or "mean" (of runs
    of tokens; exact softmax attention where rank reaches P+N). seed: of the initial values, together with the layer.
    All tokens are treated alike, prefix tokens too; each has its column of E and F, so that T tokens up to P+N may
    come, which use the first T columns. Padded keys and values are left out of the projections. Dropout acts on the
    weights (T, rank). The map is these weights times F. Raises ValueError for other options and for more tokens.
    """

    def __init__(self, *, num_patches, prefix_tokens, layer, rank=64, share="heads", init="normal", seed=0, **common):
        super().__init__(**common)
        at_least(1, rank=rank)
        choose("share", share, SHARES)
        initial = lookup("init", init, INITS)
        tokens = prefix_tokens + num_patches
        shape = (self.num_heads if share == "none" else 1, min(rank, tokens), tokens)
        generator = layer_generator(seed, layer)
        self.key_projection = nn.Parameter(initial(*shape, generator))
        self.value_projection = None if share == "kv" else nn.Parameter(initial(*shape, generator))

    def attend(self, q, k, v, *, key_padding_mask=None, is_causal=False):
        """q, k, v (B, H, T, D) -> (B, H, T, D)."""
        tokens, most = q.shape[2], self.key_projection.shape[-1]
        if tokens > most:
            raise ValueError(f"tokens: got {tokens}, allowed: at most {most}, prefix and patches")
        k, v = without_padding(key_padding_mask, k, v)
        of_values = self.key_projection if self.value_projection is None else self.value_projection
        keys = self.key_projection[..., :tokens] @ k  # (B, H, rank, D)
        values = of_values[..., :tokens] @ v
        return F.scaled_dot_product_attention(q, keys, values, dropout_p=self.dropout_p)
