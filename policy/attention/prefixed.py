"""What sparse mechanisms share: prefix (class) tokens that meet all tokens."""

import torch
import torch.nn.functional as F

from policy.attention.base import MultiHeadAttention


class PrefixedAttention(MultiHeadAttention):
    """The P first tokens attend to all tokens and are attended by all; the others attend as the mechanism says.

    A mechanism defines ``attend_patches(q, k, v, *, key_padding_mask)``: q (B, H, n, D) of the n tokens after the
    prefix, k and v (B, H, P+n, D) of all -> (B, H, n, D). ``whole``: all N patches must be there, else the first n of
    them may come alone.
    """

    whole = False

    def __init__(self, *, num_patches, prefix_tokens, **common):
        super().__init__(**common)
        self.num_patches, self.prefix_tokens = num_patches, prefix_tokens

    def attend(self, q, k, v, *, key_padding_mask=None, is_causal=False):
        """q, k, v (B, H, P+n, D) -> (B, H, P+n, D); ValueError for a wrong number of tokens."""
        tokens, most = q.shape[2], self.prefix_tokens + self.num_patches
        if tokens > most or self.whole and tokens != most:
            raise ValueError(f"tokens: got {tokens}, allowed: {most}{'' if self.whole else ' or fewer'}")
        prefix, patches = q[:, :, : self.prefix_tokens], q[:, :, self.prefix_tokens :]
        parts = []
        if self.prefix_tokens:
            mask = None if key_padding_mask is None else ~key_padding_mask[:, None, None]
            parts.append(F.scaled_dot_product_attention(prefix, k, v, attn_mask=mask, dropout_p=self.dropout_p))
        if patches.shape[2]:
            parts.append(self.attend_patches(patches, k, v, key_padding_mask=key_padding_mask))
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
