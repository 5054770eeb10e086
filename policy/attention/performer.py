"""Kernelised attention: products of features in place of exp(q k / sqrt(D)), non-causal and causal."""

import math

import torch
import torch.nn.functional as F

from policy.attention.base import MultiHeadAttention
from policy.attention.padding import without_padding
from policy.attention.random_features import FeatureMap

CHUNK = 64  # tokens of a causal chunk, a power of two
SMALLEST = 1e-6  # smallest denominator; that of positive random features is 1 or more
SMALLEST_SIGNED = 1e-2  # of "fourier", whose estimates may come out near zero or negative


class PerformerAttention(MultiHeadAttention):
    """sum_j f(q_i) f(k_j) v_j / sum_j f(q_i) f(k_j), f from ``random_features``. x (B, T, C) -> (B, T, C).

    FAVOR+ (arXiv 2009.14794) and the family of HKUNLP/efficient-attention. proj_method: favorp, fourier, relu,
    relu_only, sigmoid_only, dpfp or mlp_fourier; num_features: random vectors, or as ``FeatureMap`` says, as it does
    of sample_scheme: resample (at each training forward) | fixed | learnable, and seed. cos_weighting: products times
    cos(pi / 2 (i - j) / (P+N)) (cosFormer, arXiv 2202.08791, section 3), which needs T <= P+N and all places.
    All tokens are treated alike, prefix tokens too; padded ones are in no sum. Only log features are exponentiated,
    after what cancels between numerator and denominator was subtracted, in float32 or better. The causal form uses
    states of chunks, linear in T, too. attn_drop above 0 raises ValueError, as other options do.
    """

    causal, drops = True, False

    def __init__(
        self,
        *,
        num_patches,
        prefix_tokens,
        layer,
        proj_method="favorp",
        num_features=64,
        sample_scheme="resample",
        cos_weighting=False,
        seed=0,
        **common,
    ):
        super().__init__(**common)
        options = {"proj_method": proj_method, "num_features": num_features, "sample_scheme": sample_scheme}
        width = self.proj.in_features // self.num_heads
        self.features = FeatureMap(self.num_heads, width, seed=seed, layer=layer, **options)
        self.smallest = SMALLEST_SIGNED if proj_method == "fourier" else SMALLEST
        self.period = prefix_tokens + num_patches if cos_weighting else None
        self.any_tokens = not cos_weighting

    def attend(self, q, k, v, *, key_padding_mask=None, is_causal=False):
        """q, k, v (B, H, T, D) -> (B, H, T, D)."""
        dtype = torch.promote_types(v.dtype, torch.float32)
        with torch.autocast(v.device.type, enabled=False):
            v = F.pad(v.to(dtype), (0, 1), value=1.0)  # the last column becomes the denominator
            k, v = without_padding(key_padding_mask, k.to(dtype), v)
            queries, keys = self.features(q.to(dtype), k)
            if self.period is not None:
                queries, keys = (cos_weighted(pair, v.shape[2], self.period) for pair in (queries, keys))
            sums = (causal_sums if is_causal else full_sums)(queries, mask_keys(keys, key_padding_mask), v)
            return sums[..., :-1] / sums[..., -1:].clamp(min=self.smallest)


def cos_weighted(features, tokens, period):
    """Features (log, base) of twice the number whose products have the factor cos(pi / 2 (i - j) / period)."""
    log, base = features
    if tokens > period:
        raise ValueError(f"tokens: got {tokens}, allowed with cos_weighting: at most {period}, prefix and patches")
    angle = torch.arange(tokens, dtype=base.dtype, device=base.device)[:, None] * (math.pi / 2 / period)
    base = base.expand(*base.shape[:-2], -1, max(log.shape[-1], base.shape[-1]))
    log = log if log.shape[-1] == 1 else torch.cat([log, log], dim=-1)
    return log, torch.cat([base * angle.cos(), base * angle.sin()], dim=-1)


def mask_keys(keys, key_padding_mask):
    """Features (log, base) of keys, so that those of padded tokens are zero and set no maximum."""
    log, base = keys
    if key_padding_mask is not None:
        log = log.masked_fill(key_padding_mask[:, None, :, None], _lowest(log))
    return log, base


def _lowest(log):
    """A log feature below all others, to which more may be added without overflow."""
    return torch.finfo(log.dtype).min / 4


def full_sums(queries, keys, v):
    """sum_j f(q_i) f(k_j) v_j (B, H, T, D) but for a factor of each query: its largest log product is 0.

    The largest key of a feature goes from the keys to the queries, then that of a query goes out.
    """
    (q_log, q_base), (k_log, k_base) = queries, keys
    top = k_log.detach().amax(dim=2, keepdim=True)
    state = (k_base * (k_log - top).exp()).transpose(-2, -1) @ v  # (B, H, M, D)
    q_log = q_log + top
    return (q_base * (q_log - q_log.detach().amax(dim=-1, keepdim=True)).exp()) @ state


def causal_sums(queries, keys, v):
    """As ``full_sums``, over j <= i; nothing of later tokens enters a result, not even a maximum.

    Earlier chunks are met as sums over their keys. In a chunk the later half of 2, 4, ... tokens meets the earlier.
    """
    tokens = v.shape[2]
    q_log, q_base, k_log, k_base = (x.expand(*v.shape[:3], -1) for x in (*queries, *keys))
    q_log = q_log - (q_log.detach() + k_log.detach().cummax(dim=2).values).amax(dim=-1, keepdim=True)
    sums = ((q_log + k_log).exp() * q_base * k_base).sum(dim=-1, keepdim=True) * v  # j = i
    q_log, q_base, k_base, v, sums = (_whole_chunks(x, 0.0) for x in (q_log, q_base, k_base, v, sums))
    k_log = _whole_chunks(k_log, _lowest(k_log))
    half = 1
    while half < CHUNK:
        (_, q_log_late), (_, q_base_late) = _halves(q_log, half), _halves(q_base, half)
        (k_log_early, _), (k_base_early, _), (v_early, _) = (_halves(x, half) for x in (k_log, k_base, v))
        top = k_log_early.detach().amax(dim=3, keepdim=True)
        products = (q_base_late * (q_log_late + top).exp()) @ (k_base_early * (k_log_early - top).exp()).mT
        late = products @ v_early
        sums = sums + torch.stack([torch.zeros_like(late), late], dim=3).flatten(2, 4)
        half *= 2
    q_log, q_base, k_log, k_base, v = (x.unflatten(2, (-1, CHUNK)) for x in (q_log, q_base, k_log, k_base, v))
    top = k_log.detach().amax(dim=3, keepdim=True)  # (B, H, G, 1, M)
    past_log, past = _sums_before(top, (k_base * (k_log - top).exp()).mT @ v)
    sums = sums + ((q_base * (q_log + past_log).exp()) @ past).flatten(2, 3)
    return sums[:, :, :tokens]


def _whole_chunks(x, fill):
    """x (B, H, T, M), filled up to a multiple of CHUNK tokens."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % CHUNK), value=fill)


def _halves(x, half):
    """x (B, H, T, M) -> the earlier and the later half of each 2 * half tokens, (B, H, G, half, M)."""
    return x.unflatten(2, (-1, 2, half)).unbind(3)


def _sums_before(log, state):
    """Sums of exp(log) * state over all earlier chunks, in the same form; log (B, H, G, 1, M), state (B, H, G, M, D).

    By doubling: log2(G) steps, each of which adds what stands 1, 2, 4, ... chunks before.
    """
    log, state, step = _shifted(log, 1, _lowest(log)), _shifted(state, 1, 0.0), 1
    while step < log.shape[2]:
        before_log, before = _shifted(log, step, _lowest(log)), _shifted(state, step, 0.0)
        top = torch.maximum(log, before_log)
        state = state * (log - top).exp().mT + before * (before_log - top).exp().mT
        log, step = top, 2 * step
    return log, state


def _shifted(x, step, fill):
    """x (B, H, G, ...) moved by ``step`` chunks."""
    return torch.cat([torch.full_like(x[:, :, :step], fill), x[:, :, :-step]], dim=2)
