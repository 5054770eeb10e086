"""Fibottention: each head attends along a few diagonals at Fibonacci-like distances (arXiv 2406.19391).

Offsets, windows, head shuffle and the masking rule follow the authors' code (Charlotte-CharMLab/Fibottention:
``fibottention.py`` is variant "paper", ``robot_learning/.../vision/exp.py`` is variant "robot"), which differs from
the pseudo-code of its README. Patch token j is joined to j + o and j - o for every offset o of the head; prefix
(class) tokens attend to, and are attended by, all tokens.
"""

import math
import random

import torch
import torch.nn.functional as F
from torch import nn

VARIANTS = ("paper", "robot")
MASKED_SCORES = ("zero", "exclude")
BACKENDS = ("auto", "dense")
MIN_WINDOW = 5  # smallest head window of variant "paper", in tokens


def _choose(name, value, allowed):
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, allowed: {', '.join(map(repr, allowed))}")


def wythoff_offsets(num_tokens, num_heads, *, modified=True, variant="paper"):
    """Diagonal offsets of each head: a generalised Fibonacci sequence that starts at a row of the Wythoff array.

    num_tokens: patch tokens N, num_heads: H -> H tuples of sorted distinct offsets (0 = main diagonal). Head
    i = 1..H starts at a = floor(floor(i phi) phi) and b = a + floor(i phi) and continues a + b, ... up to its window:
    from 5 to N // 3 over the heads ("paper") or N for every head ("robot"). ``modified`` puts the two preceding terms
    2a - b and b - a in front; the robot code leaves its first head unmodified. The first term always stays, also
    beyond the window; an offset of N or more joins no pair.

    Raises ValueError for an unknown variant, num_tokens < 1 or num_heads < 1.
    """
    _choose("variant", variant, VARIANTS)
    if num_tokens < 1 or num_heads < 1:
        raise ValueError(f"num_tokens, num_heads: got {num_tokens}, {num_heads}, allowed: both >= 1")
    phi = (1 + math.sqrt(5)) / 2
    heads = []
    for i in range(1, num_heads + 1):
        row = math.floor(i * phi)
        first = math.floor(row * phi)
        second = first + row  # = floor(row * phi^2)
        if variant == "robot":
            sequence = _fibonacci(first, second, num_tokens)
            if modified and i > 1:
                sequence += [2 * first - second, second - first]  # in front of the window, whatever its size
        else:
            growth = (num_tokens // 3 - MIN_WINDOW) / (num_heads - 1) * (i - 1) if num_heads > 1 else 0
            window = MIN_WINDOW + int(growth)
            if modified:
                first, second = 2 * first - second, second - first
            sequence = _fibonacci(first, second, window)
        heads.append(tuple(sorted(set(sequence))))
    return tuple(heads)


def _fibonacci(first, second, window):
    sequence = [first]
    while second <= window:
        sequence.append(second)
        first, second = second, first + second
    return sequence


def shuffle_heads(offsets, layer):
    """The published order of the heads in layer ``layer`` (0-based): ``random.Random(layer).shuffle``."""
    offsets = list(offsets)
    random.Random(layer).shuffle(offsets)
    return tuple(offsets)


def fibottention_mask(offsets, num_tokens, *, prefix_tokens=1):
    """Attended pairs, bool (H, P+N, P+N), True = attended; rows and columns of the P prefix tokens are full."""
    index = torch.arange(num_tokens)
    distance = (index[:, None] - index[None, :]).abs()
    size = prefix_tokens + num_tokens
    mask = torch.ones(len(offsets), size, size, dtype=torch.bool)
    for head, head_offsets in enumerate(offsets):
        wanted = torch.tensor(head_offsets, dtype=torch.long)
        mask[head, prefix_tokens:, prefix_tokens:] = torch.isin(distance, wanted)
    return mask


def fibottention(
    q, k, v, offsets, *, prefix_tokens=1, masked_score="zero", scale=None, backend="auto", dropout_p=0.0, mask=None
):
    """Attention along the diagonals ``offsets`` of each head.

    q, k, v (B, H, P+N, D) -> (B, H, P+N, D). masked_score "zero" is the published rule: the score of an unattended
    pair is set to 0 and still takes part in the softmax with weight exp(0); "exclude" gives it no weight.
    ``scale`` defaults to 1/sqrt(D). backend "dense" is the reference that forms all pairs; "auto" picks the fastest
    available one. ``dropout_p`` acts on the attention weights. ``mask`` may hand in
    ``fibottention_mask(offsets, N, prefix_tokens=P)`` so that a module builds it once.

    Raises ValueError for unknown options and shapes that do not fit.
    """
    _choose("masked_score", masked_score, MASKED_SCORES)
    _choose("backend", backend, BACKENDS)
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k, v: got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, allowed: one (B, H, P+N, D)"
        )
    if q.shape[1] != len(offsets):
        raise ValueError(f"offsets: got {len(offsets)} heads, allowed: {q.shape[1]} as in q")
    if not 0 <= prefix_tokens <= q.shape[2]:
        raise ValueError(f"prefix_tokens: got {prefix_tokens}, allowed: 0 to {q.shape[2]}")
    if mask is None:
        mask = fibottention_mask(offsets, q.shape[2] - prefix_tokens, prefix_tokens=prefix_tokens).to(q.device)
    if masked_score == "exclude":
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
        # A row without any attended pair (possible without prefix tokens) attends to nothing rather than to NaN.
        return torch.where(mask.any(dim=-1)[..., None], out, 0.0)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.where(mask, (q * scale) @ k.transpose(-2, -1), 0.0)  # (B, H, P+N, P+N)
    return F.dropout(scores.softmax(dim=-1), dropout_p, training=dropout_p > 0) @ v


class FibottentionAttention(nn.Module):
    """Multi-head self-attention of a ViT block with Fibottention; parameters are named as timm's ``Attention``.

    x (B, P+N, C) -> (B, P+N, C). The mask is a non-persistent bool buffer, always in force: nothing here looks at
    timm's fused-attention switch, which silently dropped the mask of the published encoders.
    """

    def __init__(
        self,
        *,
        dim,
        num_heads,
        num_patches,
        layer,
        prefix_tokens,
        variant="paper",
        modified=True,
        masked_score="zero",
        shuffle=True,
        backend="auto",
        qkv_bias=True,
        attn_drop=0.0,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, allowed: a divisor of dim {dim}")
        _choose("masked_score", masked_score, MASKED_SCORES)
        _choose("backend", backend, BACKENDS)
        self.num_heads = num_heads
        self.num_patches = num_patches
        self.prefix_tokens = prefix_tokens
        self.masked_score = masked_score
        self.backend = backend
        self.attn_drop = attn_drop
        offsets = wythoff_offsets(num_patches, num_heads, modified=modified, variant=variant)
        self.offsets = shuffle_heads(offsets, layer) if shuffle else offsets
        mask = fibottention_mask(self.offsets, num_patches, prefix_tokens=prefix_tokens)
        self.register_buffer("mask", mask, persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None, is_causal=False):
        """x (B, P+N, C) -> (B, P+N, C); timm's blocks pass the two switches, which must be off here."""
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask, is_causal: got one, allowed: neither (the pattern of Fibottention is fixed)")
        batch, tokens, dim = x.shape
        if tokens != self.prefix_tokens + self.num_patches:
            expected = f"{self.prefix_tokens} prefix + {self.num_patches} patch tokens"
            raise ValueError(f"tokens: got {tokens}, allowed: {expected}")
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, P+N, D)
        out = fibottention(
            q,
            k,
            v,
            self.offsets,
            prefix_tokens=self.prefix_tokens,
            masked_score=self.masked_score,
            backend=self.backend,
            dropout_p=self.attn_drop if self.training else 0.0,
            mask=self.mask,
        )
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))

    def extra_repr(self):
        return f"heads={self.num_heads}, patches={self.num_patches}, density={self.density():.3f}"

    def density(self):
        """Share of patch pairs that some head attends to, averaged over heads."""
        return self.mask[:, self.prefix_tokens :, self.prefix_tokens :].float().mean().item()
