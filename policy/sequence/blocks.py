"""Pre-norm transformer blocks around any attention mechanism, run over whole sequences or token by token."""

from typing import NamedTuple

import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from policy.attention import ATTENTIONS, build_attention
from policy.sequence.stepping import step


class Memory(NamedTuple):
    """What a block reads of an encoded source: keys and values (B, H, S, D), and which are tokens (B, 1, 1, S)."""

    keys: Tensor
    values: Tensor
    real: Tensor


class State(NamedTuple):
    """What decoding keeps: how many tokens it has seen, the state of each block's attention, and their memories."""

    place: int
    blocks: tuple
    memories: tuple


class CrossAttention(nn.Module):
    """Dense attention of x (B, T, C) to a ``Memory`` (arXiv 1706.03762, section 3.2) -> (B, T, C)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def read(self, encoded, padding):
        """The ``Memory`` of encoded (B, S, C), whose tokens in padding (B, S) bool are none."""
        keys, values = self.kv(encoded).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return Memory(keys, values, ~padding[:, None, None])

    def forward(self, x, memory):
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, memory.keys, memory.values, attn_mask=memory.real)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Self-attention, with ``cross`` attention to a memory, and an MLP, each on its normalised input and added to it.

    dropout: of what each of the three adds, in training. x (B, T, C) -> (B, T, C).
    """

    def __init__(self, attention, *, dim, num_heads, mlp_ratio, dropout, cross):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(dim), attention
        self.cross_norm = nn.LayerNorm(dim) if cross else None
        self.cross = CrossAttention(dim, num_heads) if cross else None
        self.mlp_norm, self.mlp = nn.LayerNorm(dim), Mlp(dim, int(dim * mlp_ratio))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, *, is_causal=False, key_padding_mask=None, memory=None):
        """memory: of a block with ``cross``."""
        out = self.attention(self.attention_norm(x), is_causal=is_causal, key_padding_mask=key_padding_mask)
        return self._after_attention(x + self.dropout(out), memory)

    def step(self, x, state, memory=None):
        """The next token x (B, C) -> (its output (B, C), the new state of the attention)."""
        out, state = step(self.attention, self.attention_norm(x), state)
        return self._after_attention((x + self.dropout(out))[:, None], memory)[:, 0], state

    def _after_attention(self, x, memory):
        if self.cross is not None:
            x = x + self.dropout(self.cross(self.cross_norm(x), memory))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Blocks(nn.Module):
    """``depth`` blocks and a final norm, over up to ``length`` tokens. x (B, T, C) -> (B, T, C).

    attention: {"name": ..., options} of ``build_attention``; causal: each token sees those before it and itself.
    Raises ValueError for a mechanism without a causal form where one is needed.
    """

    def __init__(
        self, attention, *, length, depth, dim, num_heads, mlp_ratio=4.0, dropout=0.0, causal=False, cross=False
    ):
        super().__init__()
        if not 0 <= dropout < 1 or min(length, depth) < 1:
            raise ValueError(
                f"dropout, length, depth: got {dropout}, {length}, {depth}, allowed: 0 to below 1, and >= 1 twice"
            )
        if causal and not ATTENTIONS[attention["name"]].causal:
            allowed = [name for name in ATTENTIONS if ATTENTIONS[name].causal]
            raise ValueError(f"attention: got {attention['name']!r}, allowed for a decoder: {', '.join(allowed)}")
        self.causal = causal
        geometry = {"num_patches": length, "grid": (1, length), "prefix_tokens": 0, "depth": depth}
        self.blocks = nn.ModuleList(
            Block(
                build_attention(**attention, dim=dim, num_heads=num_heads, layer=layer, **geometry),
                dim=dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                dropout=dropout,
                cross=cross,
            )
            for layer in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def read(self, encoded, padding):
        """What each block reads of encoded (B, S, C), padding (B, S) bool: a tuple of ``Memory``."""
        return tuple(block.cross.read(encoded, padding) for block in self.blocks)

    def forward(self, x, *, key_padding_mask=None, memories=None):
        """key_padding_mask (B, T) bool: True for what is no token; memories: from ``read``, where blocks ``cross``."""
        for block, memory in zip(self.blocks, memories or [None] * len(self.blocks), strict=True):
            x = block(x, is_causal=self.causal, key_padding_mask=key_padding_mask, memory=memory)
        return self.norm(x)

    def start(self, memories=None):
        """The ``State`` before the first token."""
        nothing = (None,) * len(self.blocks)
        return State(0, nothing, nothing if memories is None else memories)

    def step(self, x, state):
        """The next token x (B, C) -> (its output (B, C), the new ``State``)."""
        states = []
        for block, own, memory in zip(self.blocks, state.blocks, state.memories, strict=True):
            x, own = block.step(x, own, memory)
            states.append(own)
        return self.norm(x), State(state.place + 1, tuple(states), state.memories)


class Embedding(nn.Module):
    """Tokens (B, T) -> (B, T, C), each with a learned code of its place.

    The weights of tokens, which may also make scores, start so that the scores of others are around 1; as inputs they
    are scaled by sqrt(C) (arXiv 1706.03762, section 3.4).
    """

    def __init__(self, tokens, places, dim):
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, dim), nn.Embedding(places, dim)
        self.scale = dim**0.5
        for part in (self.tokens, self.places):
            nn.init.normal_(part.weight, std=1 / self.scale)

    def forward(self, tokens):
        return self.tokens(tokens) * self.scale + self.places.weight[: tokens.shape[1]]

    def step(self, tokens, place):
        """Tokens (B,) at ``place`` -> (B, C); ValueError beyond the last place."""
        if place >= self.places.num_embeddings:
            raise ValueError(f"tokens: got more than {place}, allowed: {self.places.num_embeddings}")
        return self.tokens(tokens) * self.scale + self.places.weight[place]
