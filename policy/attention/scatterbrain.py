"""ScatterBrain: exact scores in windows, random features for all other pairs (arXiv 2110.15343, section 4)."""

import math

import torch
import torch.nn.functional as F

from policy.attention.padding import without_padding
from policy.attention.performer import SMALLEST, mask_keys
from policy.attention.prefixed import PrefixedAttention
from policy.attention.random_features import FeatureMap
from policy.attention.windows import RelativePositionBias, make_windows


class ScatterbrainAttention(PrefixedAttention):
    """Weights exp(q k / sqrt(D)) in a window, FAVOR+'s estimate of it elsewhere. x (B, P+N, C) -> (B, P+N, C).

    Both share one denominator. window_size, attn_2d, overlap and relative_position_bias (added to exact scores only)
    are those of ``LocalAttention``; num_features, sample_scheme and seed those of ``PerformerAttention``, whose
    "favorp" is meant. Prefix tokens attend to all and are attended by all, exactly. A grid that windows do not divide
    is padded with masked keys; with windows of sequences n <= N patches may come. Linear in N: the estimate is summed
    over all patches and taken off again in the window, so that where it is too high there by a factor F, float32
    leaves an error of 1e-7 F. attn_drop above 0 raises ValueError, as options do that those two refuse.
    """

    drops = False

    def __init__(
        self,
        *,
        grid,
        layer,
        window_size=4,
        attn_2d=False,
        overlap=False,
        relative_position_bias=False,
        num_features=64,
        sample_scheme="resample",
        seed=0,
        **common,
    ):
        super().__init__(**common)
        self.whole = attn_2d and grid[0] > 1
        self.windows = make_windows(grid, window_size, overlap=overlap, attn_2d=attn_2d)
        self.bias = RelativePositionBias(self.num_heads, self.windows) if relative_position_bias else None
        options = {"proj_method": "favorp", "num_features": num_features, "sample_scheme": sample_scheme}
        width = self.proj.in_features // self.num_heads
        self.features = FeatureMap(self.num_heads, width, seed=seed, layer=layer, **options)

    def attend_patches(self, q, k, v, *, key_padding_mask):
        """q (B, H, n, D), k and v (B, H, P+n, D) -> (B, H, n, D)."""
        dtype = torch.promote_types(v.dtype, torch.float32)
        with torch.autocast(v.device.type, enabled=False):
            ones = F.pad(v.to(dtype), (0, 1), value=1.0)  # the last column becomes the denominator
            sums = self._sums(q.to(dtype), *without_padding(key_padding_mask, k.to(dtype), ones), key_padding_mask)
            out = sums[..., :-1] / sums[..., -1:].clamp(min=SMALLEST)
        return self.windows.resized(q.shape[2]).merge(out).to(v.dtype)

    def _sums(self, q, k, v, key_padding_mask):
        """sum_j weight_ij v_j in windows (B, H, W, w, D), but for a factor of each query: its largest term is 1."""
        windows, prefix = self.windows.resized(q.shape[2]), self.prefix_tokens
        scores = windows.queries(q * q.shape[-1] ** -0.5) @ windows.keys(k, prefix).mT
        if self.bias is not None:
            scores = scores + self.bias(prefix)
        real = windows.real(key_padding_mask, prefix=prefix, device=q.device)
        real = torch.ones_like(scores[:1, :1, :, :1], dtype=torch.bool) if real is None else real
        scores = scores.masked_fill(~real, -torch.inf)

        (q_log, _), keys = self.features(q, k[:, :, prefix:])
        padded = None if key_padding_mask is None else key_padding_mask[:, prefix:]
        k_log, _ = mask_keys(keys, padded)
        top = k_log.detach().amax(dim=2, keepdim=True)
        k_features = (k_log - top).exp()
        q_log = windows.queries(q_log + top - math.log(q_log.shape[-1]))  # (B, H, W, w, M)

        largest = torch.maximum(scores.amax(dim=-1, keepdim=True), q_log.amax(dim=-1, keepdim=True)).detach()
        q_features = (q_log - largest).exp()
        state = k_features.mT @ v[:, :, prefix:]  # (B, H, M, D), which broadcasting would copy for every window
        far = (q_features.flatten(2, 3) @ state).unflatten(2, q_features.shape[2:4])
        estimate = F.pad(q_features @ windows.keys(k_features).mT, (prefix, 0))
        return far + ((scores - largest).exp() - estimate) @ windows.keys(v, prefix)
