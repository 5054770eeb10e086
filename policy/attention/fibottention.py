"""Fibottention: each head attends along a few diagonals at Fibonacci-like distances (arXiv 2406.19391).

Offsets, windows, head shuffle and the masking rule follow the authors' code (Charlotte-CharMLab/Fibottention:
``fibottention.py`` is variant "paper", ``robot_learning/.../vision/exp.py`` is variant "robot"), which differs from
the pseudo-code of its README. Patch token j is joined to j + o and j - o for every offset o of the head; prefix
(class) tokens attend to, and are attended by, all tokens.
"""

import math
import numbers
import random
import warnings

import torch
import torch.nn.functional as F

from policy.attention.base import MultiHeadAttention
from policy.attention.windows import masked_softmax
from policy.kernels.fibottention import backend_for, sparse_forward, why_not
from policy.registry import choose

VARIANTS = ("paper", "robot")
MASKED_SCORES = ("zero", "exclude")
BACKENDS = ("auto", "dense", "cpu", "triton")
MIN_WINDOW = 5  # smallest head window of variant "paper", in tokens


def wythoff_offsets(num_tokens, num_heads, *, modified=True, variant="paper"):
    """Diagonal offsets of each head: a generalised Fibonacci sequence that starts at a row of the Wythoff array.

    num_tokens: patch tokens N, num_heads: H -> H tuples of sorted distinct offsets (0 = main diagonal). Head
    i = 1..H starts at a = floor(floor(i phi) phi) and b = a + floor(i phi) and continues a + b, ... up to its window:
    from 5 to N // 3 over the heads ("paper") or N for every head ("robot"). ``modified`` puts the two preceding terms
    2a - b and b - a in front; the robot code leaves its first head unmodified. The first term always stays, also
    beyond the window; an offset of N or more joins no pair.

    Raises ValueError for an unknown variant, num_tokens < 1 or num_heads < 1.
    """
    choose("variant", variant, VARIANTS)
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


def diagonal_table(offsets, num_tokens):
    """Signed diagonals of each head, int32 (H, 1 + S): their number, then ascending distances key - query; zero padded.

    An offset of N or more joins no pair and is left out. Raises ValueError for a negative or non-integer offset.
    """
    heads = []
    for head in offsets:
        wrong = [o for o in head if not isinstance(o, numbers.Integral) or o < 0]
        if wrong:
            raise ValueError(f"offsets: got {wrong[0]!r}, allowed: integers >= 0")
        heads.append(sorted({sign * o for o in head if o < num_tokens for sign in (-1, 1)}))
    width = 1 + max([0, *[len(head) for head in heads]])
    rows = [[len(head), *head] + [0] * (width - 1 - len(head)) for head in heads]
    return torch.tensor(rows, dtype=torch.int32, device="cpu").reshape(len(heads), width)


def fibottention_mask(offsets, num_tokens, *, prefix_tokens=1):
    """Attended pairs, bool (H, P+N, P+N), True = attended; rows and columns of the P prefix tokens are full."""
    return _mask_of_table(diagonal_table(offsets, num_tokens), num_tokens, prefix_tokens)


def pattern_density(offsets, num_tokens):
    """Share of the pairs of patch tokens that a head attends to, mean over heads."""
    pairs = sum((num_tokens - o) * (2 if o else 1) for head in offsets for o in set(head) if o < num_tokens)
    return pairs / len(offsets) / num_tokens**2


def _mask_of_table(table, num_tokens, prefix_tokens, kept=None):
    """Attended pairs (H, P+N, P+N); with ``kept`` (B, n), the patch tokens that are there, (H, B, P+n, P+n)."""
    index = torch.arange(num_tokens, device=table.device) if kept is None else kept
    distance = index[..., None, :] - index[..., :, None]  # of the key from the query
    real = torch.arange(1, table.shape[1], device=table.device) <= table[:, :1]
    attended = torch.zeros(len(table), 2 * num_tokens, dtype=torch.bool, device=table.device)
    # Nothing in place, so that vmap may stack tables; column 0 is no distance.
    attended = attended.scatter(1, torch.where(real, table[:, 1:] + num_tokens, 0).long(), True)
    return F.pad(attended[:, distance + num_tokens], (prefix_tokens, 0, prefix_tokens, 0), value=True)


def fibottention(
    q, k, v, offsets, *, prefix_tokens=1, masked_score="zero", scale=None, backend="auto", dropout_p=0.0, table=None
):
    """Attention along the diagonals ``offsets`` of each head.

    q, k, v (B, H, P+N, D) -> (B, H, P+N, D). masked_score "zero" is the published rule: the score of an unattended
    pair is set to 0 and still takes part in the softmax with weight exp(0); "exclude" gives it no weight.
    ``scale`` defaults to 1/sqrt(D). backend "dense" is the reference that forms all pairs; "cpu" and "triton" work on
    the attended pairs only, which under both rules gives the same result but for rounding; "auto" takes the one of
    the device, and "dense", with a warning, where that one cannot, as under the transforms of torch.func and for
    forward-mode derivatives; second derivatives (``create_graph``) need "dense" and raise ValueError on the others.
    ``dropout_p`` acts on the attention weights.
    ``table`` may hand in ``diagonal_table(offsets, N)`` on q's device so that a module makes it once.

    Raises ValueError for unknown options, shapes that do not fit, and what a named backend cannot do.
    """
    choose("masked_score", masked_score, MASKED_SCORES)
    choose("backend", backend, BACKENDS)
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k, v: got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, allowed: one (B, H, P+N, D)"
        )
    if q.shape[1] != len(offsets):
        raise ValueError(f"offsets: got {len(offsets)} heads, allowed: {q.shape[1]} as in q")
    if not 0 <= prefix_tokens <= q.shape[2]:
        raise ValueError(f"prefix_tokens: got {prefix_tokens}, allowed: 0 to {q.shape[2]}")
    autocast = torch.amp.is_autocast_available(q.device.type) and torch.is_autocast_enabled(q.device.type)
    if autocast and q.dtype != torch.float64:
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"q, k, v: got {q.dtype} on {q.device}, {k.dtype} on {k.device}, {v.dtype} on {v.device},"
            " allowed: one dtype and device"
        )
    num_patches = q.shape[2] - prefix_tokens
    if table is None:
        table = diagonal_table(offsets, num_patches).to(q.device)
    if table.dtype != torch.int32 or len(table) != len(offsets) or table.device != q.device:
        got = f"{table.dtype} {tuple(table.shape)} on {table.device}"
        raise ValueError(f"table: got {got}, allowed: diagonal_table(offsets, N) on {q.device}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = _backend(backend, q, dropout_p)
    if backend == "dense":
        mask = _mask_of_table(table, num_patches, prefix_tokens)
        return _dense(q, k, v, mask, masked_score, scale, dropout_p)
    return sparse_forward(q, k, v, table.contiguous(), prefix_tokens, masked_score, scale, backend)[0]


def _backend(name, q, dropout_p):
    """The backend that evaluates: ``name`` itself, or what stands for "auto".

    There is no number of tokens below which "auto" should be dense: on a CPU the sparse kernels were measured faster
    from 4 patch tokens on, in float32 and bfloat16, forward and backward, and equal at one.
    """
    if name == "dense":
        return name
    sparse = backend_for(q) if name == "auto" else name
    reason = why_not(sparse, q, dropout_p) if sparse else f"device: got {q.device.type}, allowed: cpu, cuda"
    if name != "auto":
        if reason:
            raise ValueError(f"backend {name!r}: {reason}")
        return name
    if reason:
        warnings.warn(f"Fibottention is evaluated densely, over all pairs. {reason}", stacklevel=3)
        return "dense"
    return sparse


def _dense(q, k, v, mask, masked_score, scale, dropout_p, real=None):
    """The reference over all pairs; q, k, v (B, H, T, D), mask (H, T, T) or (B, H, T, T), real as of ``_weights``."""
    weights = F.dropout(_weights(q, k, mask, masked_score, scale, real), dropout_p, training=dropout_p > 0)
    if masked_score == "zero":
        return weights @ v
    out = weights @ torch.where(v.isfinite(), v, 0.0)
    # 0 * NaN would carry one bad token to all others.
    reached = mask.to(v.dtype) @ (~v.isfinite()).to(v.dtype) > 0
    return torch.where(reached, torch.nan, out)


def _weights(q, k, mask, masked_score, scale, real=None):
    """Weights (B, H, T, T) of the rule ``masked_score``; real: bool (B, 1, 1, T), keys that are no padding.

    A row without any attended pair (possible without prefix tokens) attends to nothing rather than to NaN.
    """
    scores = (q * scale) @ k.transpose(-2, -1)
    if masked_score == "zero":
        return masked_softmax(torch.where(mask, scores, 0.0), real)
    return masked_softmax(scores, mask if real is None else mask & real)


class FibottentionAttention(MultiHeadAttention):
    """Multi-head self-attention of a ViT block with Fibottention; parameters are named as timm's ``Attention``.

    x (B, P+N, C) -> (B, P+N, C). The pattern is always in force: nothing here looks at timm's fused-attention switch,
    which silently dropped the mask of the published encoders. Nothing of size N x N is kept.

    The tokens that are left when others were dropped (``kept``) are joined as among all N. They, and batches with
    padding (``key_padding_mask``), are evaluated densely, over all their pairs; padded keys get no weight by either
    rule.
    """

    def __init__(
        self,
        *,
        num_patches,
        layer,
        prefix_tokens,
        variant="paper",
        modified=True,
        masked_score="zero",
        shuffle=True,
        backend="auto",
        **common,
    ):
        super().__init__(**common)
        choose("masked_score", masked_score, MASKED_SCORES)
        choose("backend", backend, BACKENDS)
        self.num_patches = num_patches
        self.prefix_tokens = prefix_tokens
        self.masked_score = masked_score
        self.backend = backend
        offsets = wythoff_offsets(num_patches, self.num_heads, modified=modified, variant=variant)
        self.offsets = shuffle_heads(offsets, layer) if shuffle else offsets
        self.register_buffer("table", diagonal_table(self.offsets, num_patches), persistent=False)

    def attend(self, q, k, v, *, key_padding_mask=None, is_causal=False):
        """q, k, v (B, H, P+N, D) -> (B, H, P+N, D)."""
        if key_padding_mask is not None:
            return self.attend_kept(q, k, v, None, key_padding_mask=key_padding_mask)
        self._check_tokens(q.shape[2], self.num_patches)
        return fibottention(
            q,
            k,
            v,
            self.offsets,
            prefix_tokens=self.prefix_tokens,
            masked_score=self.masked_score,
            backend=self.backend,
            dropout_p=self.dropout_p,
            table=self.table,
        )

    def attend_kept(self, q, k, v, kept, *, key_padding_mask=None):
        """q, k, v (B, H, P+n, D) of the patch tokens ``kept`` (B, n), None for all -> (B, H, P+n, D), densely."""
        self._check_tokens(q.shape[2], self.num_patches if kept is None else kept.shape[1])
        mask, real = self._pairs(kept), None if key_padding_mask is None else ~key_padding_mask[:, None, None]
        return _dense(q, k, v, mask, self.masked_score, q.shape[-1] ** -0.5, self.dropout_p, real)

    def attention_map(self, x, key_padding_mask=None):
        """Weights (B, H, P+N, P+N) that each query gives to each key, under the rule of this layer."""
        q, k, _ = self.split(x)
        self._check_tokens(q.shape[2], self.num_patches)
        real = None if key_padding_mask is None else ~key_padding_mask[:, None, None]
        return _weights(q, k, self.mask, self.masked_score, q.shape[-1] ** -0.5, real)

    def _check_tokens(self, tokens, patches):
        if tokens != self.prefix_tokens + patches:
            raise ValueError(f"tokens: got {tokens}, allowed: {self.prefix_tokens} prefix + {patches} patch tokens")

    def _pairs(self, kept):
        """Attended pairs (H, T, T), of ``kept`` tokens (B, H, T, T)."""
        mask = _mask_of_table(self.table, self.num_patches, self.prefix_tokens, kept)
        return mask if kept is None else mask.transpose(0, 1)

    def extra_repr(self):
        return f"heads={self.num_heads}, patches={self.num_patches}, density={self.density():.3f}"

    @property
    def mask(self):
        """Attended pairs, bool (H, P+N, P+N), made on demand."""
        return self._pairs(None)

    def density(self):
        """Share of the pairs of patches that a head attends to, mean over heads."""
        return pattern_density(self.offsets, self.num_patches)
