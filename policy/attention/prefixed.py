"""What sparse mechanisms share: prefix (class) tokens that meet all tokens, and maps of their weights."""

import torch
import torch.nn.functional as F

from policy.attention.base import MultiHeadAttention, unit_values


class PrefixedAttention(MultiHeadAttention):
    """The P first tokens attend to all tokens and are attended by all; the others attend as the mechanism says.

    A mechanism defines ``attend_patches(q, k, v, *, key_padding_mask, dropout_p)``: q (B, H, n, D) of the n tokens
    after the prefix, k and v (B, H, P+n, D) of all -> (B, H, n, D). It must be linear in v, which is what the map of
    weights is read off with. ``whole``: all N patches must be there, else the first n of them may come alone.
    """

    whole = False

    def __init__(self, *, num_patches, prefix_tokens, **common):
        super().__init__(**common)
        self.num_patches, self.prefix_tokens = num_patches, prefix_tokens

    def attend(self, q, k, v, *, key_padding_mask=None, is_causal=False):
        """q, k, v (B, H, P+n, D) -> (B, H, P+n, D); ValueError for a wrong number of tokens."""
        return self._attend(q, k, v, key_padding_mask, self.dropout_p)

    def _attend(self, q, k, v, key_padding_mask, dropout_p):
        tokens, most = q.shape[2], self.prefix_tokens + self.num_patches
        if tokens > most or self.whole and tokens != most:
            raise ValueError(f"tokens: got {tokens}, allowed: {most}{'' if self.whole else ' or fewer'}")
        parts = []
        if self.prefix_tokens:
            mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None]
            prefix = q[:, :, : self.prefix_tokens]
            parts.append(F.scaled_dot_product_attention(prefix, k, v, attn_mask=mask, dropout_p=dropout_p))
        if tokens > self.prefix_tokens:
            patches = q[:, :, self.prefix_tokens :]
            parts.append(self.attend_patches(patches, k, v, key_padding_mask=key_padding_mask, dropout_p=dropout_p))
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]

    def attention_map(self, x, key_padding_mask=None):
        """Weights (B, H, T, T) that each query gives to each key, without dropout."""
        q, k, _ = self.split(x)
        return self._attend(q, k, unit_values(q), key_padding_mask, 0.0)
