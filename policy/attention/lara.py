"""Linear randomized attention, LARA: the draws of all queries shared (arXiv 2204.04667, section 4)."""

import torch
import torch.nn.functional as F

from policy.attention.lara_proposals import SAMPLINGS, Proposals, draw
from policy.attention.prefixed import PrefixedAttention
from policy.attention.ra import log_feature, scaled
from policy.attention.windows import masked_softmax
from policy.registry import at_least, choose


def log_densities(draws, centres):
    """Log densities at draws (B, H, R C, D) of the C proposals N(centre, I), over that of N(0, I): two (B, H, 1, R C).

    First of the proposal that drew each, then of the sum of all proposals. centres (B, H, C, D).
    """
    rounds = draws.shape[2] // centres.shape[2]
    every = log_feature(centres, draws)  # (B, H, R C, C)
    own = every.unflatten(2, (rounds, -1)).diagonal(dim1=-2, dim2=-1).flatten(2)
    return own[:, :, None], every.logsumexp(dim=-1)[:, :, None]


def _optimal(log_balance, q, q_bar, centres, alpha, real):
    similarity = q @ q_bar.transpose(-2, -1)  # (B, H, N, C)
    if real is not None:
        similarity = similarity.masked_fill(~real[:, None, :, None], torch.finfo(q.dtype).min)
    share = similarity.softmax(dim=2)  # over the queries
    preferred = alpha * (share - share.mean(dim=-1, keepdim=True))
    return (log_balance.exp() + _every_round(preferred, log_balance)).clamp(min=1e-8).log()


def _biased(log_balance, q, q_bar, centres, alpha, real):
    return log_balance + _every_round(q @ centres.transpose(-2, -1), log_balance)


def _balance(log_balance, q, q_bar, centres, alpha, real):
    return log_balance


def _every_round(x, log_balance):
    """x (B, H, N, C) repeated for the R rounds of draws: (B, H, N, R C)."""
    return x.repeat(1, 1, 1, log_balance.shape[-1] // x.shape[-1])


MIS_TYPES = {"mis_opt": _optimal, "mis_biased": _biased, "mis_bh": _balance}


def log_importance(q, k, q_bar, k_bar, draws, *, mis_type="mis_opt", alpha=1.0, real=None):
    """Log importance weight of each draw for each query, and the weight of each key in each draw.

    q, k (B, H, N, D) and q_bar, k_bar (B, H, C, D), all ``scaled``; draws (B, H, R C, D); real (B, N) bool
    -> (B, H, N, R C) and (B, H, R C, N). Over many draws, the mean of the sum of exp(log weight) times the draw's
    mean value, divided by the mean of the sum of exp(log weight), is softmax attention.
    """
    centres = q_bar + k_bar
    own, together = log_densities(draws, centres)
    log_alpha = MIS_TYPES[mis_type](own - together, q, q_bar, centres, alpha, real)
    features = log_feature(k, draws)
    seen = None if real is None else real[:, None, None]
    # Not -inf, which would give NaN where no key is real.
    known = features if seen is None else features.masked_fill(~seen, torch.finfo(q.dtype).min / 2)
    totals = known.logsumexp(dim=-1)[:, :, None]  # (B, H, 1, R C)
    # |q|^2 / 2 belongs to the feature of the query, but is the same for all draws.
    log_weights = q @ draws.transpose(-2, -1) + totals + log_alpha - own
    return log_weights, masked_softmax(features, seen)


class LinearRandomizedAttention(PrefixedAttention):
    """Patch queries share C random features, each with its own mean of the values. x (B, P+N, C) -> (B, P+N, C).

    Sample w_c is drawn from the proposal N(q~_c + k~_c, I) around pooled queries and keys; query n averages the
    outputs sum_m softmax_m(w_c k_m - |k_m|^2 / 2) v_m with self-normalised multiple importance sampling weights
    alpha_nc N(w_c; 0, I) / N(w_c; q~_c + k~_c, I) xi(q_n, w_c) sum_m xi(k_m, w_c), xi(x, w) = exp(w x - |x|^2 / 2)
    (section 4.1). Memory and time are linear in tokens. Draws come from torch's global generator, anew in every
    training forward pass; in evaluation every w_c is the centre of its proposal. No causal form.

    P prefix (class) tokens attend densely; patches weigh the prefix keys exactly against the patches together, whose
    share they estimate by the pooled keys, each standing for its tokens (the paper has no class tokens; the importance
    weights also estimate that share, but far too low where proposals are poor). On a grid of one row the
    first tokens may come alone. Padded keys are in no pool and no sum.

    num_landmarks C: an image is pooled to a square of them and needs a square number, a sequence (a grid of one row)
    to C segments; adaptive bins, so that none need divide the tokens, and never more landmarks than tokens an axis.
    proposal: "pool": pooled, then linear and LayerNorm | "no_param_pool": pooled only | "adaptive_1d": linear and
    LayerNorm, then segments, also of an image (row by row). pool_module: linear and LayerNorm for each head alike
    ("light") or over all heads ("dense"). mix: "none" | "mixed": pooled keys are averaged by their similarity |
    "vmixed": also by the norms of pooled values.
    mis_type, the weights alpha_nc: "mis_bh": balance heuristic | "mis_biased": times exp(q_n (q~_c + k~_c)), which do
    not sum to 1 | "mis_opt": plus ``alpha`` times the softmax over queries of q_n q~_c less its mean over c (section
    4.2; that softmax is the authors' code's, HKUNLP/efficient-attention). ``alpha`` acts in "mis_opt" only.
    sampling: "single" | "multisample": two draws of each proposal | "antithetics": two opposite ones.
    noise: standard deviation of the draws; only 1 is that of the proposals, the authors' code amounts to D^(-1/4).
    attn_drop: on the weights of keys within each sample and of prefix tokens, in training.
    Raises ValueError for wrong options and for tokens that are no whole image.
    """

    def __init__(
        self,
        *,
        grid,
        num_landmarks=49,
        proposal="pool",
        mix="none",
        pool_module="light",
        mis_type="mis_opt",
        alpha=1.0,
        sampling="single",
        noise=1.0,
        **common,
    ):
        super().__init__(**common)
        self.whole = grid[0] > 1
        choose("mis_type", mis_type, MIS_TYPES)
        choose("sampling", sampling, SAMPLINGS)
        if alpha != 1 and mis_type != "mis_opt":
            raise ValueError(f"alpha: got {alpha}, allowed with {mis_type}: 1 (it acts in mis_opt only)")
        at_least(0, noise=noise)
        self.mis_type, self.alpha, self.sampling, self.noise = mis_type, alpha, sampling, noise
        self.proposals = Proposals(
            proposal=proposal,
            mix=mix,
            pool_module=pool_module,
            num_landmarks=num_landmarks,
            grid=grid,
            num_heads=self.num_heads,
            head_dim=self.qkv.in_features // self.num_heads,
        )

    def attend_patches(self, q, k, v, *, key_padding_mask):
        """q (B, H, N, D), k, v (B, H, P+N, D) -> (B, H, N, D)."""
        of_draws, *on_tokens = self._weights(q, k, v, key_padding_mask)
        of_keys, of_prefix = (F.dropout(weights, self.attn_drop, self.training).to(v.dtype) for weights in on_tokens)
        prefix = self.prefix_tokens
        patches = of_draws.to(v.dtype) @ (of_keys @ v[:, :, prefix:])
        return patches + of_prefix @ v[:, :, :prefix] if prefix else patches

    def attention_map(self, x, key_padding_mask=None):
        """Weights (B, H, T, T) that each query gives to each key, without dropout; in training those of one draw."""
        q, k, v = self.split(x)
        prefix = self.prefix_tokens
        of_draws, of_keys, of_prefix = self._weights(q[:, :, prefix:], k, v, key_padding_mask)
        patches = torch.cat([of_prefix, of_draws @ of_keys], dim=-1)  # unit vectors would do for v but in "vmixed"
        return torch.cat([super().attention_map(x, key_padding_mask=key_padding_mask)[:, :, :prefix], patches], dim=2)

    def _weights(self, q, k, v, key_padding_mask):
        """Weights of patches on S draws (B, H, N, S), of draws on patches (B, H, S, N) and of patches on prefix."""
        prefix = self.prefix_tokens
        real = None if key_padding_mask is None else ~key_padding_mask
        real_patches = None if real is None else real[:, prefix:]
        q_bar, k_bar = self.proposals(q, k[:, :, prefix:], v[:, :, prefix:], real_patches)
        with torch.autocast(q.device.type, enabled=False):  # what is exponentiated needs float32
            q, k, q_bar, k_bar = scaled(q), scaled(k), scaled(q_bar), scaled(k_bar)
            centres = q_bar + k_bar
            draws = draw(centres, self.sampling, self.noise) if self.training else centres
            options = {"mis_type": self.mis_type, "alpha": self.alpha, "real": real_patches}
            log_weights, of_keys = log_importance(q, k[:, :, prefix:], q_bar, k_bar, draws, **options)
            of_prefix, of_patches = self._against_prefix(q, k, real)
        return log_weights.softmax(dim=-1) * of_patches, of_keys, of_prefix

    def _against_prefix(self, q, k, real):
        """Weights of patches on prefix tokens (B, H, N, P) and on all patches together (B, H, N, 1)."""
        prefix = self.prefix_tokens
        if not prefix:
            return q[..., :0], 1.0
        means, counts = self.proposals.pool(k[:, :, prefix:], None if real is None else real[:, prefix:])
        counts = counts.transpose(-2, -1)  # (B, 1, 1, C)
        tokens = q.shape[2] if real is None else real[:, None, None, prefix:].sum(dim=-1, keepdim=True)
        # Adaptive bins overlap where they do not divide the tokens, and count some of them twice.
        of_bins = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1) * tokens
        keys = torch.cat([k[:, :, :prefix], means], dim=2)
        scores = q @ keys.transpose(-2, -1) + F.pad(of_bins.log(), (prefix, 0))
        seen = None if real is None else torch.cat([real[:, None, None, :prefix], counts > 0], dim=-1)
        weights = masked_softmax(scores, seen)
        return weights[..., :prefix], weights[..., prefix:].sum(dim=-1, keepdim=True)
