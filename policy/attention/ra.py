"""Randomized attention: softmax attention estimated by one random feature per query (arXiv 2204.04667, section 3)."""

import torch
import torch.nn.functional as F

from policy.attention.base import MultiHeadAttention
from policy.attention.softmax import allowed_pairs
from policy.attention.windows import masked_softmax
from policy.registry import at_least, choose

EVALUATIONS = ("mean", "expectation", "sample")


def scaled(x):
    """x D^(-1/4) in float32 at least, so that the scores q k / sqrt(D) are plain products; x (B, H, T, D)."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) * x.shape[-1] ** -0.25


def log_feature(x, draws):
    """log xi(x, w) = x w - |x|^2 / 2, the positive random features; x (B, H, T, D), draws (B, H, S, D) -> (B, H, S, T).

    The mean of xi(x, w) xi(y, w) over w ~ N(0, I) is exp(x y) (arXiv 2204.04667, section 2.2).
    """
    return draws @ x.transpose(-2, -1) - x.square().sum(dim=-1)[:, :, None] / 2


def draw_keys(probabilities, k, count):
    """``count`` keys for every query: probabilities (B, H, T, T), k (B, H, T, D) -> a list of (B, H, T, D).

    A row of zeros gets any key; else a key of probability 0 is never drawn.
    """
    cumulative = probabilities.detach().cumsum(dim=-1)
    # Not up to 1, where rounding might reach beyond the last key that may be drawn.
    places = (1 - 1e-6) * torch.rand_like(cumulative[..., :1].expand(*k.shape[:3], count)) * cumulative[..., -1:]
    index = torch.searchsorted(cumulative, places.contiguous(), right=True).clamp(max=k.shape[2] - 1)
    return [k.gather(2, of_one[..., None].expand_as(k)) for of_one in index.unbind(dim=-1)]


class RandomizedAttention(MultiHeadAttention):
    """Every token attends to all, with weights that are random in training. x (B, P+N, C) -> (B, P+N, C).

    Query n draws a key m with its softmax probability and w ~ N(q_n + k_m, I); its weights are the softmax of
    w k - |k|^2 / 2 over the keys. Their mean over the draws is softmax attention exactly (section 3.2). Quadratic in
    tokens; class tokens are treated as all others, any number of tokens may come, and causal attention draws from the
    keys that may be seen. Draws come from torch's global generator, anew in every forward pass; the gradient flows
    through the drawn key, not through its choice.

    num_samples: 1 and more: so many draws, the weights averaged | 0: one draw around q_n + mean of the keys, biased |
    -1: the mean over all draws, i.e. softmax attention. The authors' code (HKUNLP/efficient-attention) takes one draw
    for any number above 0, and its -1 draws around q_n + the softmax mean of the keys, which is biased.
    evaluation: "mean": w is the mean of its distribution, q_n + the softmax mean of the keys (0: of all keys) |
    "expectation": softmax attention | "sample": as in training.
    noise: standard deviation of w; only 1 is unbiased, the authors' code amounts to D^(-1/4).
    attn_drop: on the weights, in training. Raises ValueError for wrong options.
    """

    causal = any_tokens = quadratic = True

    def __init__(self, *, num_samples=1, evaluation="mean", noise=1.0, **common):
        super().__init__(**common)
        at_least(-1, num_samples=num_samples)
        choose("evaluation", evaluation, EVALUATIONS)
        if num_samples == -1 and evaluation == "sample":
            raise ValueError("evaluation: got 'sample', allowed with num_samples -1: mean, expectation")
        if num_samples == 0 and evaluation == "expectation":
            raise ValueError("evaluation: got 'expectation', allowed with num_samples 0: mean, sample (it is biased)")
        at_least(0, noise=noise)
        if num_samples == -1 and noise != 1:
            raise ValueError(f"noise: got {noise}, allowed with num_samples -1: 1 (nothing is drawn)")
        self.num_samples, self.evaluation, self.noise = num_samples, evaluation, noise

    def attend(self, q, k, v, *, key_padding_mask=None, is_causal=False):
        """q, k, v (B, H, T, D) -> (B, H, T, D)."""
        weights = self._weights(q, k, allowed_pairs(q, key_padding_mask, is_causal))
        return F.dropout(weights, self.attn_drop, self.training).to(v.dtype) @ v

    def _weights(self, q, k, mask):
        drawn = self.training or self.evaluation == "sample"
        with torch.autocast(q.device.type, enabled=False):  # what is exponentiated needs float32
            q, k = scaled(q), scaled(k)
            scores = q @ k.transpose(-2, -1)
            probabilities = masked_softmax(scores if self.num_samples else torch.zeros_like(scores), mask)
            if self.num_samples == -1 or not drawn and self.evaluation == "expectation":
                return probabilities
            if self.num_samples == 0 or not drawn:
                return self._around(q + probabilities @ k, k, mask, drawn)
            keys = draw_keys(probabilities, k, self.num_samples)
            return sum(self._around(q + key, k, mask, drawn) for key in keys) / self.num_samples

    def _around(self, centre, k, mask, drawn):
        """Weights (B, H, T, T) of w ~ N(centre, noise^2), or of w = centre; centre, k (B, H, T, D)."""
        draws = centre + self.noise * torch.randn_like(centre) if drawn else centre
        return masked_softmax(log_feature(k, draws), mask)
