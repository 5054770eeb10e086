"""Floating-point operations of one ``attend``, a formula for each mechanism.

Counted as torch's FlopCounterMode does: matrix products alone, a multiply-add is 2. One sample, evaluation mode,
without padding. Letters: H heads of width D; T tokens, of which P are prefix tokens and n patches.
"""

import math
from dataclasses import dataclass

from policy.attention.bigbird import MIN_BLOCK, BigBirdAttention
from policy.attention.causal_eva import CausalEVAAttention
from policy.attention.eva import EVAAttention
from policy.attention.fibottention import FibottentionAttention
from policy.attention.hybrid import HybridAttention
from policy.attention.lara import LinearRandomizedAttention
from policy.attention.linformer import LinformerAttention
from policy.attention.local import LocalAttention
from policy.attention.nystromformer import NystromformerAttention
from policy.attention.performer import PerformerAttention
from policy.attention.ra import RandomizedAttention
from policy.attention.scatterbrain import ScatterbrainAttention
from policy.attention.softmax import SoftmaxAttention
from policy.attention.windows import Windows


@dataclass(frozen=True)
class Size:
    """Heads, their width, tokens, and the prefix tokens among these (0 where a mechanism treats all alike)."""

    heads: int
    width: int
    tokens: int
    prefix: int

    @property
    def patches(self):
        return self.tokens - self.prefix


def attention_flops(module, tokens):
    """FLOPs of ``module.attend`` on one sample of ``tokens`` = P+n; ValueError for a mechanism without formula."""
    formula = FORMULAS.get(type(module))
    if formula is None:
        allowed = ", ".join(kind.__name__ for kind in FORMULAS)
        raise ValueError(
            f"FLOPs: got {type(module).__name__}, allowed: {allowed} (FORMULAS in eval/attention/flops.py)"
        )
    width = module.proj.in_features // module.num_heads
    return formula(module, Size(module.num_heads, width, tokens, getattr(module, "prefix_tokens", 0)))


# Dense ---------------------------------------------------------------------------------------------------------------


def _dense(queries, keys, size):
    """Scores and weighted sums of ``queries`` x ``keys`` pairs a head: 4 H D a pair."""
    return 4 * size.heads * size.width * queries * keys


def _softmax(module, size):
    return _dense(size.tokens, size.tokens, size)


def _randomized(module, size):
    """Scores and the sum of the values, between them two further products for the mean key and the weights around it,
    or one for each draw."""
    if module.num_samples == -1 or module.evaluation == "expectation":
        between = 0
    elif module.num_samples == 0 or module.evaluation == "mean":
        between = 2
    else:
        between = module.num_samples
    return (2 + between) * _softmax(module, size) // 2


# Patterns ------------------------------------------------------------------------------------------------------------


def _prefix(size):
    return _dense(size.prefix, size.tokens, size)


def _fibottention(module, size):
    """Prefix rows and columns, and the diagonals of each head; the sparse kernels look at no other pair."""
    size = Size(1, size.width, size.tokens, size.prefix)  # heads differ
    rows = _prefix(size) + _dense(size.patches, size.prefix, size)
    distances = module.table[:, 1:].abs()
    real = distances.new_tensor(range(distances.shape[1])) < module.table[:, :1]
    pairs = int(((size.patches - distances) * real).sum())
    return module.num_heads * rows + _dense(pairs, 1, size)


def _cut(windows):
    """(windows, queries of each, keys of each) of a ``Windows``."""
    spans = [size + 2 * reach for size, reach in zip(windows.window, windows.extension, strict=True)]
    return math.prod(windows.counts) * math.prod(windows.dilation), math.prod(windows.window), math.prod(spans)


def _in_windows(windows, size, heads):
    """Attention of patches to their windows and the prefix tokens, in some ``heads``."""
    count, queries, keys = _cut(windows.resized(size.patches))
    return 4 * heads * size.width * count * queries * (size.prefix + keys)


def _local(module, size):
    return _prefix(size) + _in_windows(module.windows, size, size.heads)


def _bigbird(module, size):
    """Blocks of neighbours, as wide as two radii, and the random keys one by one."""
    block = min(max(MIN_BLOCK, 2 * module.radius), size.patches)
    windows = Windows((1, size.patches), (1, block), (0, module.radius))
    random = _dense(size.patches, module.random_keys.shape[-1], size)
    return _prefix(size) + _in_windows(windows, size, size.heads) + random


def _hybrid(module, size):
    """Windows in groups of heads; linear attention: D x D sums over keys, and their weights, for each token."""
    groups = len(module.windows)
    sparse = sum(
        _in_windows(windows, size, len(range(group, size.heads, groups)))
        for group, windows in enumerate(module.windows)
    )
    linear = 2 * size.heads * size.tokens * size.width * (2 * size.width + 1)
    return _prefix(size) + sparse + linear


# Thin factors --------------------------------------------------------------------------------------------------------


def _linformer(module, size):
    """Projecting keys and values to the rank costs as much as attending to them."""
    return 2 * _dense(size.tokens, module.key_projection.shape[-2], size)


def _nystromformer(module, size):
    """S landmarks: two means, two attentions of T x S, the S x S scores, its inverse (4 products a step), one more."""
    landmarks = module.num_landmarks
    if size.tokens <= landmarks:
        flops = _softmax(module, size)
    else:
        inverse = 8 * size.heads * module.iterations * landmarks**3
        flops = 3 * _dense(size.tokens, landmarks, size) + _dense(landmarks, landmarks, size) + inverse
    if module.conv is not None:
        flops += 2 * size.heads * size.tokens * size.width * module.conv.kernel_size[0]
    return flops


def _performer(module, size):
    """Features of queries and keys, sums of keys x values (and their number) for each feature, their products."""
    projecting, features = _features(module.features, size.width)
    if module.period is not None:
        features *= 2
    return 2 * size.heads * size.tokens * (projecting + 2 * features * (size.width + 1))


def _features(features, width):
    """(multiply-adds for a query and a key together, features of each) of a ``FeatureMap``."""
    number = features.num_features
    random = 2 * width * number
    return {
        "favorp": (random, number),
        "relu": (random, number),
        "fourier": (random, 2 * number),
        "mlp_fourier": (width * number + 2 * number**2, number),
        "dpfp": (0, number),
    }.get(features.proj_method, (0, width))


def _scatterbrain(module, size):
    """Exact scores in windows; features; their estimate over all patches, and again inside of windows."""
    count, queries, keys = _cut(module.windows.resized(size.patches))
    projecting, features = _features(module.features, size.width)
    places, seen = count * queries, size.prefix + keys
    far = features * (size.width + 1) * (size.patches + places)
    near = places * (seen * size.width + keys * features + seen * (size.width + 1))
    return _prefix(size) + 2 * size.heads * (size.patches * projecting + far + near)


# Landmarks -----------------------------------------------------------------------------------------------------------


def _group_tokens(summary, windows, size):
    """Mean query and key of each group, their projections, and the weighted mean of its values."""
    count, members, _ = _cut(windows)
    projected = 1 if summary.query is None else 2
    means = (1 + projected) * count * members * size.width
    return 2 * size.heads * (means + projected * count * size.width**2)


def _eva(module, size):
    """Groups, and attention of each window's queries to its keys, the prefix tokens and all groups."""
    groups = module.groups.resized(size.patches)
    count, queries, keys = _cut(module.windows.resized(size.patches))
    attended = _dense(count * queries, keys + size.prefix + _cut(groups)[0], size)
    return _prefix(size) + _group_tokens(module.summary, groups, size) + attended


def _causal_eva(module, size):
    """As EVA, with runs of tokens; what is ahead is computed and masked."""
    windows, chunks = (Windows((1, size.tokens), (1, length)) for length in (module.window_size, module.chunk_size))
    count, queries, _ = _cut(windows)
    attended = _dense(count * queries, module.reach + queries + _cut(chunks)[0], size)
    return _group_tokens(module.summary, chunks, size) + attended


def _lara(module, size):
    """C landmarks: pooling and projecting them, their densities, and C draws for each query and each key."""
    proposals, patches, width = module.proposals, size.patches, size.width
    grid = (1, patches) if proposals.in_row else proposals.grid
    most = (1, proposals.num_landmarks) if proposals.in_row else (math.isqrt(proposals.num_landmarks),) * 2
    side = tuple(min(pair) for pair in zip(grid, most, strict=True))
    landmarks = math.prod(side)
    pooling = 2 * (side[0] * patches + landmarks * grid[1])  # of one number a patch: rows, then columns
    pools = 2 + (proposals.mix == "vmixed") + bool(size.prefix)  # each pools tokens, and counts them
    flops = pools * pooling * (size.heads * width + 1)
    if proposals.proposal != "no_param_pool":
        projected = patches if proposals.proposal == "adaptive_1d" else landmarks
        flops += 4 * projected * size.heads * width**2 * (size.heads if proposals.pool_module == "dense" else 1)
    if proposals.mix != "none":
        flops += _dense(landmarks, landmarks, size)
    densities = 2 * size.heads * landmarks**2 * width
    weights = 4 if module.mis_type == "mis_bh" else 5  # products of n x C: scores of keys and of queries, the output
    flops += densities + weights * 2 * size.heads * patches * landmarks * width
    if size.prefix:  # scores of prefix tokens and landmarks, values of prefix tokens
        flops += 2 * size.heads * patches * width * (2 * size.prefix + landmarks)
    return _prefix(size) + flops


FORMULAS = {
    BigBirdAttention: _bigbird,
    CausalEVAAttention: _causal_eva,
    EVAAttention: _eva,
    FibottentionAttention: _fibottention,
    HybridAttention: _hybrid,
    LinearRandomizedAttention: _lara,
    LinformerAttention: _linformer,
    LocalAttention: _local,
    NystromformerAttention: _nystromformer,
    PerformerAttention: _performer,
    RandomizedAttention: _randomized,
    ScatterbrainAttention: _scatterbrain,
    SoftmaxAttention: _softmax,
}
