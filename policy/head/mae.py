"""Learning to see without labels: a masked autoencoder of the vision encoder (arXiv 2111.06377)."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, init_weights_vit_timm
from torch import nn

from policy.encoder.timm_vit import ConvStem
from policy.head.backbone import OnEncoder, kept_tokens


def patchify(images, size):
    """images (B, 3, h, w) -> pixels of each patch (B, N, 3 * p * q), size: (p, q) px; a remainder is left out."""
    return F.unfold(images, size, stride=size).transpose(1, 2)


def unpatchify(patches, grid, size):
    """Pixels of patches (B, N, 3 * p * q) -> images (B, 3, rows * p, columns * q), grid: (rows, columns)."""
    sides = [count * side for count, side in zip(grid, size, strict=True)]
    return F.fold(patches.transpose(1, 2), sides, size, stride=size)


class PatchDecoder(nn.Module):
    """Tokens of the patches seen -> pixels of all (section 3): mask tokens, fixed 2-D positions, plain blocks."""

    def __init__(self, *, width, grid, pixels, dim, depth, heads):
        super().__init__()
        if dim % 4 or dim % heads or depth < 1:
            raise ValueError(
                f"decoder_dim, decoder_heads, decoder_depth: got {dim}, {heads}, {depth},"
                " allowed: a multiple of 4 and of decoder_heads, and >= 1 block"
            )
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("positions", build_sincos2d_pos_embed(list(grid), dim), persistent=False)  # (N, D)
        self.blocks = nn.Sequential(*[Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)])
        self.norm = norm(dim)
        self.to_pixels = nn.Linear(dim, pixels)
        self.apply(init_weights_vit_timm)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens, kept):
        """tokens (B, P+n, C) of the patches ``kept`` (B, n) -> pixels (B, N, 3 * p * q)."""
        x = self.embed(tokens)
        prefix, seen = x.split([x.shape[1] - kept.shape[1], kept.shape[1]], dim=1)
        blank = self.mask_token.to(x.dtype).expand(len(x), len(self.positions), -1)
        patches = blank.scatter(1, kept[..., None].expand_as(seen), seen) + self.positions
        x = self.norm(self.blocks(torch.cat([prefix, patches], dim=1)))
        return self.to_pixels(x[:, prefix.shape[1] :])


class MaskedAutoencoder(OnEncoder):
    """Hides ``mask_ratio`` of the patches from the encoder, which a small decoder then paints; for pre-training.

    ``encoder`` is an ``ObservationEncoder`` of one camera, as in a policy. normalize_pixels: the target is every patch
    less its mean, over its standard deviation (section 4, "reconstruction target"). Raises ValueError for an encoder
    whose tokens see pixels of other patches, and for sizes that do not fit.
    """

    def __init__(
        self,
        *,
        shape_meta,
        crop,
        encoder,
        attention,
        mask_ratio=0.75,
        decoder_dim=512,
        decoder_depth=8,
        decoder_heads=16,
        normalize_pixels=True,
    ):
        super().__init__(shape_meta=shape_meta, crop=crop, encoder=encoder, attention=attention)
        vision = self.vision
        if not hasattr(vision, "tokens"):
            raise ValueError(f"encoder.name: got {encoder['name']!r}, allowed for a masked autoencoder: vit")
        if isinstance(vision.vit.patch_embed, ConvStem):
            raise ValueError(
                "encoder.stem: got 'conv', allowed for a masked autoencoder: patch (no overlap of patches)"
            )
        count = vision.grid[0] * vision.grid[1]
        if not 0 < mask_ratio < 1 or not 0 < round(count * (1 - mask_ratio)) < count:
            raise ValueError(
                f"model.mask_ratio: got {mask_ratio}, allowed: above 0, below 1, and of {count} patches at least one"
                " hidden and one seen"
            )
        self.mask_ratio, self.normalize_pixels = mask_ratio, normalize_pixels
        self.patch_size = vision.vit.patch_embed.patch_size
        self.freeze_reading()
        self.decoder = PatchDecoder(
            width=vision.vit.embed_dim,
            grid=vision.grid,
            pixels=3 * self.patch_size[0] * self.patch_size[1],
            dim=decoder_dim,
            depth=decoder_depth,
            heads=decoder_heads,
        )

    def compile_training(self):
        """Compile what a training step spends its time in (torch.compile)."""
        self.compile(dynamic=True)

    def randomness(self, count, generator):
        """What a training step draws: an order of the patches of which the last are hidden."""
        rows, columns = self.vision.grid
        return {"order": torch.rand(count, rows * columns, generator=generator)}

    def forward(self, batch, randomness):
        """{"loss": mean squared error of the hidden patches} of {"image": (B, 3, h, w) in [-1, 1]}."""
        predicted, hidden, patches = self._predict(batch["image"], randomness["order"])
        mean, std = self._statistics(patches)
        error = (predicted - (patches - mean) / std).square().mean(dim=2)  # (B, N)
        return {"loss": (error * hidden).sum() / hidden.sum()}

    def _predict(self, images, order):
        """Predicted pixels (B, N, 3 * p * q), which patches were hidden (B, N) and the true pixels."""
        kept = kept_tokens(order, self.mask_ratio)
        predicted = self.decoder(self.vision.tokens(images, kept), kept).float()
        hidden = torch.ones_like(order, dtype=torch.bool).scatter(1, kept, False)
        return predicted, hidden, patchify(images.float(), self.patch_size)

    def _statistics(self, patches):
        """Mean and standard deviation (B, N, 1) that targets are normalised with."""
        if not self.normalize_pixels:
            return 0.0, 1.0
        variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
        return mean, (variance + 1e-6).sqrt()

    @torch.no_grad()
    def reconstruct(self, batch, randomness):
        """Pairs of images (B, 1, 3, h, w) in [-1, 1]; those that an encoder drops at the border are left out.

        {"image": (original, prediction of what was hidden beside what was seen), "masked": (what was seen, grey
        elsewhere; prediction of everything)}. Mean and contrast of a patch, where not predicted, are the true ones.
        """
        predicted, hidden, patches = self._predict(batch["image"], randomness["order"])
        mean, std = self._statistics(patches)
        predicted = (predicted * std + mean).clamp(-1, 1)
        hidden = hidden[..., None]

        def picture(pixels):
            return unpatchify(pixels, self.vision.grid, self.patch_size)[:, None]

        return {
            "image": (picture(patches), picture(torch.where(hidden, predicted, patches))),
            "masked": (picture(patches.masked_fill(hidden, 0.0)), picture(predicted)),
        }
