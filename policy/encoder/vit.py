"""Vision transformer encoder: timm's ``VisionTransformer`` with the attention of every block replaced by ours."""

from torch import nn

from policy.attention import build_attention
from policy.encoder.spatial_softmax import SpatialSoftmax
from policy.encoder.timm_vit import TimmViT
from policy.registry import choose

POOLS = ("mean", "cls", "spatial_softmax")


class ViTEncoder(TimmViT):
    """One camera: images (B, 3, h, w) in [-1, 1] -> features (B, out_dim).

    attention: {"name": ..., options}; pool: "mean" of the patch tokens after the final norm (published), "cls" token or
    "spatial_softmax"; out_dim: optional linear read-out. ``gradient_checkpointing`` computes the blocks again in the
    backward pass instead of keeping what they hold. sizes: options of ``TimmViT``. Raises ValueError as it does, and
    for a pool that the network lacks.
    """

    def __init__(
        self, *, attention, pool="mean", num_keypoints=32, out_dim=None, gradient_checkpointing=False, **sizes
    ):
        super().__init__(**sizes)
        self.pool = choose("pool", pool, POOLS if self.vit.cls_token is not None else [p for p in POOLS if p != "cls"])
        self.vit.set_grad_checkpointing(gradient_checkpointing)
        self._replace_attention(attention)
        width = self.vit.embed_dim
        if pool == "spatial_softmax":
            self.keypoints = SpatialSoftmax(width, num_keypoints, self.grid)
            width = self.keypoints.out_dim
        self.readout = nn.Identity() if out_dim is None else nn.Linear(width, out_dim)
        self.out_dim = width if out_dim is None else out_dim

    def _replace_attention(self, attention):
        geometry = {
            "dim": self.vit.embed_dim,
            "num_patches": self.grid[0] * self.grid[1],
            "grid": self.grid,
            "depth": len(self.vit.blocks),
            "prefix_tokens": self.prefix_tokens,
        }
        for layer, block in enumerate(self.vit.blocks):
            original = block.attn
            block.attn = build_attention(**attention, num_heads=original.num_heads, layer=layer, **geometry)
            # Of what a mechanism has beyond timm's parameters it keeps its own.
            block.attn.load_state_dict(block.attn.state_dict() | original.state_dict())

    def forward(self, images, kept=None):
        """images (B, 3, h, w) in [-1, 1], ``kept`` as in ``tokens`` -> features (B, out_dim)."""
        if kept is not None and self.pool == "spatial_softmax":
            raise ValueError(
                "kept: got some of the tokens, allowed with pool 'spatial_softmax': all (it needs the grid)"
            )
        return self.read(self.tokens(images, kept))

    def read(self, tokens):
        """tokens after the final norm (B, P+N, C) -> features (B, out_dim)."""
        patches = tokens[:, self.prefix_tokens :]  # (B, N, C)
        if self.pool == "cls":
            pooled = tokens[:, 0]
        elif self.pool == "mean":
            pooled = patches.mean(dim=1)
        else:
            pooled = self.keypoints(patches.transpose(1, 2).unflatten(2, self.grid))
        return self.readout(pooled)
