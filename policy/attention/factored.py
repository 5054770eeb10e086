"""What the approximations of softmax attention by thin factors share."""

import torch

from policy.attention.base import MultiHeadAttention, unit_values


class FactoredAttention(MultiHeadAttention):
    """Attention that is linear in the values and never forms its weights (T, T). x (B, T, C) -> (B, T, C).

    ``drops`` says that a factor has weights for dropout; elsewhere ``attn_drop`` above 0 raises ValueError.
    """

    drops = False

    def __init__(self, **common):
        super().__init__(**common)
        if self.attn_drop and not self.drops:
            name = type(self).__name__
            raise ValueError(f"attn_drop: got {self.attn_drop}, allowed with {name}: 0 (it forms no weights)")

    def attention_map(self, x, is_causal=False, key_padding_mask=None):
        """Weights (B, H, T, T), negative ones among them: what ``attend`` makes of unit vectors in place of values."""
        q, k, _ = self.split(x)
        return self.attend(q, k, unit_values(q), key_padding_mask=key_padding_mask, is_causal=is_causal)


def at_least_one(name, value):
    """Raise ValueError unless ``value`` is 1 or more."""
    if value < 1:
        raise ValueError(f"{name}: got {value}, allowed: 1 or more")


def without_padding(key_padding_mask, *tensors):
    """Each (B, H, T, D), with zeros for the tokens of ``key_padding_mask`` (B, T) or None."""
    if key_padding_mask is None:
        return tensors
    return tuple(x.masked_fill(key_padding_mask[:, None, :, None], 0.0) for x in tensors)


def segment_means(real, segments, dtype=torch.float32):
    """Matrix (B, S, T) that averages the tokens of each of S segments; ``real`` (B, T) bool says which tokens count.

    Segments are runs of real tokens whose lengths differ by one at most; with fewer tokens than segments, some are
    empty and their rows zero.
    """
    rank = real.cumsum(dim=1) - 1
    count = real.sum(dim=1, keepdim=True).clamp(min=1)
    segment = torch.where(real, rank * segments // count, segments)  # (B, T)
    member = (segment[:, None] == torch.arange(segments, device=real.device)[:, None]).to(dtype)
    return member / member.sum(dim=-1, keepdim=True).clamp(min=1)
