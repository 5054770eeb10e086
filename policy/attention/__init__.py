"""Attention mechanisms behind one interface; a new one is one file here, one line below and one config."""

from policy.attention.bigbird import BigBirdAttention
from policy.attention.causal_eva import CausalEVAAttention
from policy.attention.eva import EVAAttention
from policy.attention.fibottention import (
    FibottentionAttention,
    fibottention,
    fibottention_mask,
    shuffle_heads,
    wythoff_offsets,
)
from policy.attention.hybrid import HybridAttention
from policy.attention.lara import LinearRandomizedAttention
from policy.attention.linformer import LinformerAttention
from policy.attention.local import LocalAttention
from policy.attention.nystromformer import NystromformerAttention
from policy.attention.performer import PerformerAttention
from policy.attention.ra import RandomizedAttention
from policy.attention.scatterbrain import ScatterbrainAttention
from policy.attention.softmax import SoftmaxAttention
from policy.registry import check_options, lookup, options_of

__all__ = [
    "build_attention",
    "fibottention",
    "fibottention_mask",
    "list_attentions",
    "shuffle_heads",
    "wythoff_offsets",
]

ATTENTIONS = {
    "bigbird": BigBirdAttention,
    "causal_eva": CausalEVAAttention,
    "eva": EVAAttention,
    "fibottention": FibottentionAttention,
    "hybrid": HybridAttention,
    "lara": LinearRandomizedAttention,
    "linformer": LinformerAttention,
    "local": LocalAttention,
    "nystromformer": NystromformerAttention,
    "performer": PerformerAttention,
    "ra": RandomizedAttention,
    "scatterbrain": ScatterbrainAttention,
    "softmax": SoftmaxAttention,
}


def list_attentions():
    """Names that ``build_attention`` and ``attention=NAME`` accept."""
    return sorted(ATTENTIONS)


def build_attention(name, *, dim, num_heads, num_patches, grid, layer, depth, prefix_tokens, **options):
    """The attention of one ViT block: a module x (B, P+N, C) -> (B, P+N, C).

    num_patches: N; grid: (rows, columns) of patches; layer: 0-based index of ``depth`` blocks; prefix_tokens: P.
    Raises ValueError for an unknown name or option, or a grid that does not hold num_patches.
    """
    if grid[0] * grid[1] != num_patches:
        raise ValueError(f"grid: got {tuple(grid)}, allowed: {num_patches} patches in all")
    geometry = {
        "dim": dim,
        "num_heads": num_heads,
        "num_patches": num_patches,
        "grid": grid,
        "layer": layer,
        "depth": depth,
        "prefix_tokens": prefix_tokens,
    }
    mechanism = lookup("attention", name, ATTENTIONS)
    check_options("attention", name, options, mechanism, without=geometry)
    parameters = options_of(mechanism)
    # A mechanism names the parts of the geometry that it needs.
    wanted = {key: value for key, value in geometry.items() if key in parameters}
    return mechanism(**wanted, **options)
