"""timm's vision transformer in the sizes asked for: patches, blocks, pretrained weights, tokens."""

import timm
import torch
from timm.models import is_model_in_modules
from torch import nn
from torch.utils.checkpoint import checkpoint

from policy.encoder.imagenet import take_unit_images
from policy.registry import choose

STEMS = ("patch", "conv")
ATTENTION_PARAMETERS = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


class ConvStem(nn.Module):
    """Patch embedding by 3x3 convolutions of stride 2 instead of one large-stride one (arXiv 2106.14881).

    images (B, 3, h, w) -> tokens (B, N, C). Takes timm's ``embed_layer`` arguments; ``patch_size`` must be 4, 8 or 16.
    Sizes that it does not divide are rounded up, by the padding of the convolutions: 84 px and 8 give a grid of 11.
    """

    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias=True, **_timm_options):
        super().__init__()
        if patch_size not in (4, 8, 16):
            raise ValueError(f"patch_size of the convolution stem: got {patch_size}, allowed: 4, 8, 16")
        stages = {4: 2, 8: 3, 16: 4}[patch_size]
        self.img_size = (img_size, img_size)
        self.grid_size = (-(-img_size // patch_size),) * 2
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers, channels = [], in_chans
        for stage in range(stages):
            width = max(embed_dim >> (stages - 1 - stage), 16)
            # GroupNorm rather than the paper's BatchNorm: batches are windows of few episodes, and EMA needs no care.
            layers += [
                nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(max(width // 16, 1), width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        layers.append(nn.Conv2d(channels, embed_dim, kernel_size=1, bias=bias))
        self.layers = nn.Sequential(*layers)

    def forward(self, images):
        return self.layers(images).flatten(2).transpose(1, 2)  # (B, N, C)


class TimmViT(nn.Module):
    """images (B, 3, h, w) in [-1, 1] -> tokens; ``vit`` is timm's ``VisionTransformer`` under its own names.

    image_size: h = w; arch: any timm ViT name, its width, depth, heads and patch size may be overridden.
    ``drop_remainder`` accepts an image that the patch size does not divide and ignores its last rows and columns, as
    the published encoder does silently. Raises ValueError for unknown options and sizes that do not fit.
    """

    def __init__(
        self,
        *,
        image_size,
        arch="vit_base_patch8_224",
        patch_size=8,
        dim=None,
        depth=None,
        num_heads=None,
        mlp_ratio=None,
        stem="patch",
        drop_path=0.0,
        drop_remainder=False,
        pretrained=False,
    ):
        super().__init__()
        _check_patches(image_size, patch_size, choose("stem", stem, STEMS), drop_remainder)
        if pretrained and stem != "patch":
            raise ValueError(
                f"encoder.pretrained: got true, allowed with stem={stem}: false (timm has no such weights)"
            )
        if dim is not None and num_heads is not None and dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, allowed: a divisor of dim {dim}")
        if not is_model_in_modules(arch, ("vision_transformer", "deit")) or "distilled" in arch:
            raise ValueError(
                f"arch: got {arch!r}, allowed: a plain timm ViT, timm.list_models(module='vision_transformer')"
            )
        sizes = {"embed_dim": dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
        overrides = {key: value for key, value in sizes.items() if value is not None}
        if stem == "conv":
            overrides["embed_layer"] = ConvStem
        self.vit = timm.create_model(
            arch,
            pretrained=pretrained,
            img_size=image_size,
            patch_size=patch_size,
            num_classes=0,
            global_pool="avg",
            fc_norm=False,  # norm before the pooling, as published
            drop_path_rate=drop_path,
            **overrides,
        )
        if any(
            set(getattr(block, "attn", nn.Identity()).state_dict()) != ATTENTION_PARAMETERS for block in self.vit.blocks
        ):
            raise ValueError(
                f"arch: got {arch!r}, allowed: a timm ViT whose attention is plain (qkv and proj with bias)"
            )
        if pretrained:
            scaling = self.vit.pretrained_cfg
            take_unit_images(self.vit.patch_embed.proj, mean=scaling["mean"], std=scaling["std"])
        self.prefix_tokens = self.vit.num_prefix_tokens
        self.grid = self.vit.patch_embed.grid_size

    @property
    def num_layers(self):
        """Layers for layer-wise learning rates: the embedding, the blocks; what follows is the last one's successor."""
        return len(self.vit.blocks) + 1

    def layer_of(self, name):
        """Layer of the parameter called ``name``: 0 embedding, 1.. blocks, ``num_layers`` norm and read-out."""
        if name.startswith("vit.blocks."):
            return int(name.split(".")[2]) + 1
        embedding = ("vit.patch_embed", "vit.cls_token", "vit.reg_token", "vit.pos_embed", "vit.norm_pre")
        return 0 if name.startswith(embedding) else self.num_layers

    def embed(self, images):
        """images (B, 3, h, w) in [-1, 1] -> tokens with their position codes, before the blocks (B, P+N, C)."""
        return self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(images)))

    def tokens(self, images, kept=None):
        """images (B, 3, h, w) in [-1, 1] -> tokens after the final norm (B, P+N, C).

        kept (B, n): patch tokens to go on with, the others are dropped before the first block as in masked
        autoencoders (arXiv 2111.06377, section 3): (B, P+n, C).
        """
        if kept is None:
            return self.vit.forward_features(images)
        x = self.embed(images)
        index = kept[..., None].expand(-1, -1, x.shape[-1])
        x = torch.cat([x[:, : self.prefix_tokens], x[:, self.prefix_tokens :].gather(1, index)], dim=1)
        for block in self.vit.blocks:
            if self.vit.grad_checkpointing:
                x = checkpoint(_run_block, block, x, kept, use_reentrant=False)
            else:
                x = _run_block(block, x, kept)
        return self.vit.norm(x)


def _run_block(block, x, kept):
    """timm's block, whose own forward does not hand ``kept`` to the attention."""
    x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x), kept=kept)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _check_patches(image_size, patch_size, stem, drop_remainder):
    if not 1 <= patch_size <= image_size:
        raise ValueError(f"patch_size: got {patch_size}, allowed: 1 to the image size {image_size}")
    remainder = image_size % patch_size
    if remainder and stem == "patch" and not drop_remainder:
        raise ValueError(
            f"image size: got {image_size}, allowed: a multiple of patch size {patch_size}"
            f" (or encoder.drop_remainder=true to ignore the last {remainder} px, or stem=conv)"
        )
