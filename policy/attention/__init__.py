"""Attention mechanisms behind one interface; a new one is one file here, one line below and one config."""

from policy.attention.fibottention import fibottention, fibottention_mask, shuffle_heads, wythoff_offsets
from policy.registry import Registry

__all__ = [
    "build_attention",
    "fibottention",
    "fibottention_mask",
    "list_attentions",
    "shuffle_heads",
    "wythoff_offsets",
]

ATTENTIONS = Registry(
    "attention",
    __name__,
    {
        "bigbird": "bigbird:BigBirdAttention",
        "causal_eva": "causal_eva:CausalEVAAttention",
        "eva": "eva:EVAAttention",
        "fibottention": "fibottention:FibottentionAttention",
        "hybrid": "hybrid:HybridAttention",
        "lara": "lara:LinearRandomizedAttention",
        "linformer": "linformer:LinformerAttention",
        "local": "local:LocalAttention",
        "nystromformer": "nystromformer:NystromformerAttention",
        "performer": "performer:PerformerAttention",
        "ra": "ra:RandomizedAttention",
        "scatterbrain": "scatterbrain:ScatterbrainAttention",
        "softmax": "softmax:SoftmaxAttention",
    },
)


def list_attentions():
    """Names that ``build_attention`` and ``attention=NAME`` accept."""
    return list(ATTENTIONS)


def build_attention(name, *, dim, num_heads, num_patches, grid, layer, depth, prefix_tokens, **options):
    """The attention of one ViT block: a module x (B, P+N, C) -> (B, P+N, C).

    num_patches: N; grid: (rows, columns) of patches; layer: 0-based index of ``depth`` blocks; prefix_tokens: P.
    A mechanism names what it needs of these. Raises ValueError for an unknown name or option, or a grid that does not
    hold num_patches.
    """
    if grid[0] * grid[1] != num_patches:
        raise ValueError(f"grid: got {tuple(grid)}, allowed: {num_patches} patches in all")
    geometry = {"num_patches": num_patches, "grid": grid, "layer": layer, "depth": depth}
    geometry |= {"dim": dim, "num_heads": num_heads, "prefix_tokens": prefix_tokens}
    return ATTENTIONS.build(name, options, **geometry)
