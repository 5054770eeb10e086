"""Windows of tokens on a grid: cutting, merging, keys beyond the edge, relative position bias.

One plan serves sequences and images: a sequence is a grid of one row. ``Windows`` says how the grid is cut into W
windows of w queries and w' keys each, w' > w when windows overlap; ``attend_in_windows`` is softmax attention in them.
A mechanism with more than that in one softmax writes it out,

    windows = make_windows(grid, window_size, overlap=True, attn_2d=True)
    scores = windows.queries(q) @ windows.keys(k).transpose(-2, -1) * scale  # (B, H, W, w, w')
    weights = masked_softmax(scores, windows.real(key_padding_mask, device=q.device))
    out = windows.merge(weights @ windows.keys(v))  # (B, H, N, D)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from policy.registry import at_least


@dataclass(frozen=True)
class Windows:
    """How the N tokens of a grid are cut into windows; all pairs are (rows, columns), in tokens.

    grid: all tokens, in row-major order; window: the queries of one window; extension: how far its keys reach beyond
    each side; dilation d: a window takes every d-th token of an axis, so that d x d windows interleave (extension
    counts these steps, too). Where windows do not divide the grid it is padded below and on the right with tokens
    that are not ``real``.
    """

    grid: tuple[int, int]
    window: tuple[int, int]
    extension: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def counts(self):
        """Windows along each axis, those of one phase of the dilation only."""
        axes = zip(self.grid, self.window, self.dilation, strict=True)
        return tuple(-(-size // (window * step)) for size, window, step in axes)

    @property
    def missing(self):
        """Rows and columns that the padding adds."""
        axes = zip(self.counts, self.window, self.dilation, self.grid, strict=True)
        return tuple(count * window * step - size for count, window, step, size in axes)

    @property
    def complete(self):
        """Whether all keys of all windows are tokens of the grid."""
        return not any(self.missing) and not any(self.extension)

    def resized(self, tokens):
        """The same windows over the first ``tokens`` of a sequence; ValueError for a part of an image."""
        if tokens == self.grid[0] * self.grid[1]:
            return self
        if self.grid[0] > 1:
            raise ValueError(f"tokens: got {tokens} patches, allowed: all {self.grid[0]} x {self.grid[1]} of the grid")
        return Windows((1, tokens), self.window, self.extension, self.dilation)

    def queries(self, x):
        """x (B, H, N, D) -> (B, H, W, w, D); places outside the grid hold 0."""
        return self._cut(x, (0, 0))

    def keys(self, x, prefix=0):
        """x (B, H, P+N, D) -> (B, H, W, P+w', D): the ``prefix`` = P first tokens, then those of the window."""
        windows = self._cut(x[:, :, prefix:], self.extension)
        if not prefix:
            return windows
        shared = x[:, :, None, :prefix].expand(-1, -1, windows.shape[2], -1, -1)
        return torch.cat([shared, windows], dim=3)

    def real(self, key_padding_mask=None, *, prefix=0, device=None):
        """Which of ``keys`` are tokens, bool (B or 1, 1, W, 1, P+w') for scores (B, H, W, w, P+w'), or None for all.

        key_padding_mask (B, P+N) bool: True = no token.
        """
        if key_padding_mask is not None:
            return self.keys(~key_padding_mask[:, None, :, None], prefix).transpose(-2, -1)
        if self.complete:
            return None
        tokens = torch.ones(1, 1, prefix + self.grid[0] * self.grid[1], 1, dtype=torch.bool, device=device)
        return self.keys(tokens, prefix).transpose(-2, -1)

    def merge(self, x):
        """x (B, H, W, w, D) -> (B, H, N, D), the inverse of ``queries``."""
        x = x.reshape(*x.shape[:2], *self.dilation, *self.counts, *self.window, x.shape[-1])
        x = x.permute(0, 1, 4, 6, 2, 5, 7, 3, 8)  # rows (window, place, phase), then columns
        x = x.flatten(5, 7).flatten(2, 4)
        return x[:, :, : self.grid[0], : self.grid[1]].flatten(2, 3)

    def _cut(self, x, extension):
        x = x.unflatten(2, self.grid)
        if any(self.missing):
            x = F.pad(x, (0, 0, 0, self.missing[1], 0, self.missing[0]))
        x = x.unflatten(3, (-1, self.dilation[1])).unflatten(2, (-1, self.dilation[0]))
        x = x.permute(0, 1, 3, 5, 2, 4, 6)  # (B, H, phases, rows and columns of one phase, D)
        (above, left), (height, width) = extension, self.window
        if any(extension):
            x = F.pad(x, (0, 0, left, left, above, above))
        x = x.unfold(4, height + 2 * above, height).unfold(5, width + 2 * left, width).movedim(6, -1)
        return x.flatten(6, 7).flatten(2, 5)


def make_windows(grid, window_size, *, overlap=False, attn_2d=False, dilation=1):
    """Windows of ``window_size`` tokens, with attn_2d window_size x window_size of them.

    overlap: keys reach half a window (at least one token) beyond each side. Windows are cut down to the grid; without
    attn_2d the grid is read row by row as one sequence. Raises ValueError for sizes below 1.
    """
    at_least(1, window_size=window_size, dilation=dilation)
    grid = tuple(grid) if attn_2d else (1, grid[0] * grid[1])
    reach = max(1, window_size // 2) if overlap else 0
    steps = tuple(1 if size == 1 else dilation for size in grid)
    whole = tuple(-(-size // step) for size, step in zip(grid, steps, strict=True))
    window = tuple(min(window_size, size) for size in whole)
    # Along an axis that one window covers there is nothing beyond the window.
    extension = tuple(0 if window_size >= size else reach for size in whole)
    return Windows(grid, window, extension, steps)


class RelativePositionBias(nn.Module):
    """A learned score for every head and every offset of a key from its query (Swin, arXiv 2103.14030, section 3.2).

    Offsets are those inside ``windows`` with their extension, 2 (window + extension) - 1 along each axis. The table
    starts as truncated normal numbers of deviation 0.02.
    """

    def __init__(self, num_heads, windows):
        super().__init__()
        index = torch.zeros(1, 1, dtype=torch.long)
        offsets = 1
        for window, extension in zip(windows.window, windows.extension, strict=True):
            query, key = torch.arange(window), torch.arange(-extension, window + extension)
            span = window + extension - 1
            axis = query[:, None] - key + span
            # Pairs of (first axis, second axis) in row-major order, as the windows are flattened.
            index = (index[:, None, :, None] * (2 * span + 1) + axis[None, :, None]).flatten(2, 3).flatten(0, 1)
            offsets *= 2 * span + 1
        self.register_buffer("index", index, persistent=False)  # (w, w')
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, offsets), std=0.02))

    def forward(self, prefix=0):
        """-> (H, 1, w, P+w') to be added to scores (B, H, W, w, P+w'); ``prefix`` = P keys in front have bias 0."""
        return F.pad(self.table[:, self.index], (prefix, 0))[:, None]


def attend_in_windows(windows, q, k, v, *, prefix=0, key_padding_mask=None, bias=None, dropout_p=0.0):
    """Softmax attention of each window's queries to its keys and to the ``prefix`` = P first tokens.

    q (B, H, N, D), k and v (B, H, P+N, D) -> (B, H, N, D). key_padding_mask (B, P+N) bool: True = no token; a query
    without any key gives 0. bias: a ``RelativePositionBias`` for these windows. dropout_p acts on the weights.
    """
    mask = windows.real(key_padding_mask, prefix=prefix, device=q.device)
    if bias is not None:
        scores = bias(prefix).to(q.dtype)
        mask = scores[None] if mask is None else torch.where(mask, scores, -torch.inf)
    queries, keys, values = windows.queries(q), windows.keys(k, prefix), windows.keys(v, prefix)
    heads, count = queries.shape[1:3]
    if mask is not None:
        mask = mask.expand(-1, heads, count, -1, -1).flatten(1, 2)
    # Fused kernels know samples and heads only, so windows count as heads.
    queries, keys, values = (x.flatten(1, 2) for x in (queries, keys, values))
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout_p)
    return windows.merge(out.unflatten(1, (heads, count)))


def masked_softmax(scores, real=None):
    """Softmax over the last axis (..., K) in float32 at least; keys that are not ``real`` get weight 0.

    real: bool, broadcast to ``scores``; a row without any real key gets weights 0, not NaN.
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if real is None:
        return scores.softmax(dim=-1, dtype=dtype).to(scores.dtype)
    lowest = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~real, lowest).softmax(dim=-1, dtype=dtype)
    return weights.masked_fill(~real, 0).to(scores.dtype)
