"""Pyramid encoder: timm's PVTv2 with the attention of its large feature maps replaced by ours."""

import timm
import torch
from timm.models import is_model_in_modules
from torch import nn

from policy.attention import build_attention
from policy.encoder.imagenet import take_unit_images
from policy.encoder.spatial_softmax import SpatialSoftmax
from policy.registry import choose

POOLS = ("mean", "spatial_softmax")
ATTENTION_STAGES = ("reduced", "all", "none")
REDUCIBLE = 29  # px, the smallest image whose first stage, of ceil(h / 4) patches a side, PVT can reduce eightfold


class PVTEncoder(nn.Module):
    """One camera: images (B, 3, h, w) in [-1, 1] -> features (B, out_dim), through PVTv2 (arXiv 2106.13797).

    Four stages of ceil(h / 4), ceil(h / 8), ceil(h / 16) and ceil(h / 32) patches a side; no class token, no position
    codes (the depthwise convolutions of its MLPs see places), so that most weights fit images of any size. image_size:
    h = w after cropping; arch: any of timm's PVTv2; attention: {"name": ..., options}; pool: "mean" of the patches of
    the last stage, after its norm, or "spatial_softmax"; out_dim: optional linear read-out.

    attention_stages: which stages get ``attention``. "reduced", as in HKUNLP/efficient-attention: those in which PVT
    would attend to patches merged by a strided convolution, now to all of them (densely with softmax); these are the
    first three, while the last keeps plain softmax (pvt_v2_b2_li reduces all four). "all": the last one, too. "none":
    PVTv2 as published, and ``attention`` has no effect. Attention that is replaced starts with the weights of timm's,
    ``q`` and ``kv`` stacked to ``qkv``; those of the reduction, ``sr`` and ``norm``, are dropped, also of pretrained.

    Raises ValueError for unknown options and sizes that do not fit.
    """

    def __init__(
        self,
        *,
        image_size,
        attention,
        arch="pvt_v2_b0",
        attention_stages="reduced",
        pool="mean",
        num_keypoints=32,
        out_dim=None,
        drop_path=0.0,
        pretrained=False,
        gradient_checkpointing=False,
    ):
        super().__init__()
        if not is_model_in_modules(arch, ("pvt_v2",)):
            raise ValueError(f"arch: got {arch!r}, allowed: {', '.join(timm.list_models(module='pvt_v2'))}")
        choose("attention_stages", attention_stages, ATTENTION_STAGES)
        choose("pool", pool, POOLS)
        if attention_stages == "none" and image_size < REDUCIBLE:
            raise ValueError(
                f"image size: got {image_size}, allowed with attention_stages=none: at least {REDUCIBLE} px"
            )
        self.pvt = timm.create_model(arch, pretrained=pretrained, num_classes=0, drop_path_rate=drop_path)
        if pretrained:
            scaling = self.pvt.pretrained_cfg
            take_unit_images(self.pvt.patch_embed.proj, mean=scaling["mean"], std=scaling["std"])
        self.pvt.set_grad_checkpointing(gradient_checkpointing)
        sides = [-(-image_size // 2 ** (2 + stage)) for stage in range(len(self.pvt.stages))]
        if attention_stages != "none":
            self._replace_attention(attention, sides, everywhere=attention_stages == "all")
        width = self.pvt.num_features
        if pool == "spatial_softmax":
            self.keypoints = SpatialSoftmax(width, num_keypoints, (sides[-1], sides[-1]))
            width = self.keypoints.out_dim
        self.image_size, self.pool = image_size, pool
        self.readout = nn.Identity() if out_dim is None else nn.Linear(width, out_dim)
        self.out_dim = width if out_dim is None else out_dim

    def _replace_attention(self, attention, sides, *, everywhere):
        blocks = [(block, side) for stage, side in zip(self.pvt.stages, sides, strict=True) for block in stage.blocks]
        for layer, (block, side) in enumerate(blocks):
            original = block.attn
            if original.sr is None and not everywhere:
                continue
            replacement = build_attention(
                **attention,
                dim=original.dim,
                num_heads=original.num_heads,
                num_patches=side * side,
                grid=(side, side),
                layer=layer,
                depth=len(blocks),
                prefix_tokens=0,
            )
            # Of what a mechanism has beyond PVT's projections it keeps its own.
            replacement.load_state_dict(replacement.state_dict() | _stacked_projections(original))
            block.attn = _WithoutGrid(replacement)

    @property
    def num_layers(self):
        """Layers for layer-wise learning rates: the embedding, the blocks; what follows is the last one's successor."""
        return sum(self.pvt.depths) + 1

    def layer_of(self, name):
        """Layer of the parameter called ``name``: 0 embedding, 1.. blocks, ``num_layers`` last norm and read-out.

        What stands between two stages, a norm and a convolution, counts as the block behind it.
        """
        if not name.startswith("pvt.stages."):
            return 0 if name.startswith("pvt.patch_embed.") else self.num_layers
        stage, part, block = name.split(".")[2:5]
        before = {"downsample": 0, "blocks": block, "norm": self.pvt.depths[int(stage)]}[part]
        return sum(self.pvt.depths[: int(stage)]) + int(before) + 1

    def forward(self, images):
        """images (B, 3, h, w) in [-1, 1] -> features (B, out_dim); ValueError for another size than ``image_size``."""
        side = self.image_size
        if images.shape[-2:] != (side, side):  # which also tells torch.compile that only B varies
            raise ValueError(f"images: got {tuple(images.shape)}, allowed: (B, 3, {side}, {side})")
        maps = self.pvt.forward_features(images)  # (B, C, h / 32, w / 32)
        return self.readout(self.keypoints(maps) if self.pool == "spatial_softmax" else maps.mean(dim=(2, 3)))


class _WithoutGrid(nn.Module):
    """An attention as timm's PVT blocks call theirs, with the grid, which ours know: (B, N, C) -> (B, N, C)."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, grid):
        return self.attention(x)


def _stacked_projections(original):
    """timm's separate projections as one of queries, keys and values, in this order, and that of the output."""
    state = original.state_dict()
    return {
        "qkv.weight": torch.cat([state["q.weight"], state["kv.weight"]]),
        "qkv.bias": torch.cat([state["q.bias"], state["kv.bias"]]),
        "proj.weight": state["proj.weight"],
        "proj.bias": state["proj.bias"],
    }
