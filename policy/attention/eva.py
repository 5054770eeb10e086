"""EVA: exact attention within windows, one control-variate token for each group of other tokens (arXiv 2302.04542)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from policy.attention.prefixed import PrefixedAttention
from policy.attention.t5_bias import T5RelativePositionBias
from policy.attention.windows import RelativePositionBias, Windows, make_windows, masked_softmax
from policy.registry import choose

PROJECTIONS = ("default", "no_ln", "none")


class EVAAttention(PrefixedAttention):
    """EVA of section 4, with the options of github.com/HKUNLP/efficient-attention. x (B, P+N, C) -> (B, P+N, C).

    A query attends exactly to the keys of its window (its exact set E) and, in the same softmax, to one token for
    every group of patches: its key is the projected mean key of the group, its value the mean of the group's values
    under weights exp(w.k - |k|^2 / 2), w drawn around the proposal's mean (``GroupTokens``). A group whose tokens
    all lie in E has no token for that query, so that a window as large as the grid is softmax attention; a group
    that lies in E in part keeps its token, over all of it, because all windows share it (the repository keeps both).

    window_size, overlap, attn_2d: the windows (``make_windows``); num_landmarks: at most so many groups, blocks of
    equal size, with attn_2d root x root blocks of the grid (a square number). Windows and blocks that do not divide
    the grid are padded with tokens that get no weight. adaptive_proj: projections of a group's mean query and key,
    "default" linear and layer norm, "no_ln" linear, "none" key only and a proposal around 0. relative_position_bias
    (Swin) or use_t5_rpe (T5, rows and columns each their own) is added to the scores within a window.

    Patches attend exactly to the P prefix tokens, too, which are in no group; prefix tokens attend to all. Without
    attn_2d fewer patches may come. In training w is drawn from torch's global generator at every call; in
    evaluation it is the mean, so nothing random is stored. attn_drop acts on all weights.
    Raises ValueError for unknown or contradictory options.
    """

    def __init__(
        self,
        *,
        grid,
        window_size=4,
        overlap=False,
        attn_2d=False,
        num_landmarks=49,
        adaptive_proj="default",
        relative_position_bias=False,
        use_t5_rpe=False,
        **common,
    ):
        super().__init__(**common)
        self.whole = attn_2d
        choose("adaptive_proj", adaptive_proj, PROJECTIONS)
        if relative_position_bias and use_t5_rpe:
            raise ValueError("relative_position_bias, use_t5_rpe: got both, allowed: one of them")
        self.windows = make_windows(grid, window_size, overlap=overlap, attn_2d=attn_2d)
        self.groups = _groups(self.windows.grid, num_landmarks, attn_2d)
        self.summary = GroupTokens(self.proj.in_features // self.num_heads, adaptive_proj=adaptive_proj, share=0.5)
        self.bias = None
        if relative_position_bias:
            self.bias = RelativePositionBias(self.num_heads, self.windows)
        elif use_t5_rpe:
            self.bias = T5RelativePositionBias(self.num_heads, _offsets(self.windows))

    def attend_patches(self, q, k, v, *, key_padding_mask):
        """q (B, H, n, D), k (B, H, P+n, D), v (B, H, P+n, E) -> (B, H, n, E)."""
        if key_padding_mask is None:
            key_padding_mask = torch.zeros(1, k.shape[2], dtype=torch.bool, device=q.device)
        parts = [self.prefix_tokens, q.shape[2]]
        (prefix_k, k), (prefix_v, v) = k.split(parts, dim=2), v.split(parts, dim=2)
        gone, missing = key_padding_mask.split(parts, dim=1)
        windows, groups = self.windows.resized(q.shape[2]), self.groups.resized(q.shape[2])
        group_k, group_v = self.summary(*(groups.queries(x) for x in (q, k, v)), groups.real(missing))
        real = windows.real(missing)  # (B, 1, W, 1, K)
        beyond = _beyond(windows, groups, missing, real)
        prefix = ~gone[:, None, None, None].expand(-1, -1, beyond.shape[2], -1, -1)
        out = attend_sets(
            windows.queries(q),
            windows.keys(k),
            windows.keys(v),
            torch.cat([prefix_k, group_k.to(k.dtype)], dim=2),
            torch.cat([prefix_v, group_v], dim=2),
            torch.cat([real, prefix, beyond], dim=-1),
            bias=None if self.bias is None else self.bias(),
            dropout_p=self.dropout_p,
        )
        return windows.merge(out)


class GroupTokens(nn.Module):
    """Key and value that stand for each group of tokens, arXiv 2302.04542, section 4.

    The proposal of a group is a normal distribution of variance 1 around ``share`` times the sum of its projected
    mean query and key, around 0 for adaptive_proj "none". A sample enters scaled by the root of the head width, as
    keys do in softmax attention (that is the repository's rule; the paper leaves the scale out).
    """

    def __init__(self, head_dim, *, adaptive_proj, share):
        super().__init__()
        norm = adaptive_proj != "no_ln"
        self.share = share
        self.key = _projection(head_dim, norm)
        self.query = None if adaptive_proj == "none" else _projection(head_dim, norm)

    def forward(self, q, k, v, real=None):
        """q, k (B, H, G, n, D), v (B, H, G, n, E), real (B or 1, 1, G, 1, n) -> (B, H, G, D), (B, H, G, E)."""
        keys = self.key(_mean(k, real))
        mean = torch.zeros_like(keys) if self.query is None else self.share * (self.query(_mean(q, real)) + keys)
        sample = mean + torch.randn_like(mean) if self.training else mean
        # In float32: the squares of bfloat16 keys are off by more than the scores that decide.
        wide = k.to(torch.promote_types(k.dtype, torch.float32))
        scores = (wide * (sample.to(wide.dtype)[:, :, :, None] - wide / 2)).sum(dim=-1) * k.shape[-1] ** -0.5
        weights = masked_softmax(scores[:, :, :, None], real).to(v.dtype)  # (B, H, G, 1, n)
        return keys, (weights @ v).squeeze(3)


def attend_sets(q, k, v, shared_k, shared_v, real, *, bias=None, dropout_p=0.0):
    """Softmax attention of each window to its own keys and, in the same softmax, to S keys that all windows share.

    q (B, H, W, w, D), k and v (B, H, W, K, D), shared_k and shared_v (B, H, S, D), real: bool, broadcast to
    (B, H, W, w, K+S), or None for all, bias: added to (B, H, W, w, K) -> (B, H, W, w, D). The shared keys are not
    copied for every window.
    """
    q = q * q.shape[-1] ** -0.5
    places = q.shape[2:4]
    near = q @ k.transpose(-2, -1)
    if bias is not None:
        near = near + bias
    far = (q.flatten(2, 3) @ shared_k.transpose(-2, -1)).unflatten(2, places)
    weights = F.dropout(masked_softmax(torch.cat([near, far], dim=-1), real), dropout_p)
    near, far = weights.split([k.shape[3], shared_k.shape[2]], dim=-1)
    return near @ v + (far.flatten(2, 3) @ shared_v).unflatten(2, places)


def _groups(grid, num_landmarks, attn_2d):
    side = math.isqrt(max(num_landmarks, 0)) if attn_2d else num_landmarks
    if num_landmarks < 1 or (attn_2d and side**2 != num_landmarks):
        raise ValueError(
            f"num_landmarks: got {num_landmarks}, allowed: {'squares of 1 and more' if attn_2d else '1 and more'}"
        )
    return Windows(grid, tuple(-(-size // min(side, size)) for size in grid))


def _beyond(windows, groups, missing, real):
    """Which groups have tokens outside of a window's keys: bool (B or 1, 1, W, 1, G)."""
    whole = groups.real(missing).sum(dim=-1).transpose(2, 3)  # (B, 1, 1, G), tokens
    number = torch.arange(whole.shape[-1], device=missing.device)[None, None, :, None, None]
    number = groups.merge(number.expand(-1, -1, -1, math.prod(groups.window), -1))  # (1, 1, N, 1)
    number = windows.keys(number).transpose(-2, -1).expand(real.shape)
    inside = whole.new_zeros(*real.shape[:-1], whole.shape[-1]).scatter_add(-1, number, real.to(whole.dtype))
    return inside < whole[:, :, None]


def _offsets(windows):
    """Places of each key from each query of a window (w, K, A), A = 1 for a sequence, 2 for an image; on the CPU."""
    axes = list(zip(windows.window, windows.extension, strict=True))[0 if windows.grid[0] > 1 else 1 :]
    queries = [torch.arange(size, device="cpu") for size, _ in axes]
    keys = [torch.arange(-reach, size + reach, device="cpu") for size, reach in axes]
    queries, keys = (torch.cartesian_prod(*places).reshape(-1, len(axes)) for places in (queries, keys))
    return keys - queries[:, None]


def _projection(head_dim, norm):
    linear = nn.Linear(head_dim, head_dim)
    return nn.Sequential(linear, nn.LayerNorm(head_dim)) if norm else linear


def _mean(x, real):
    """Mean over the tokens of a group that are there, x (B, H, G, n, D) -> (B, H, G, D); 0 where none is."""
    if real is None:
        return x.mean(dim=3)
    return (real.to(x.dtype) / real.sum(dim=-1, keepdim=True).clamp(min=1) @ x).squeeze(3)
