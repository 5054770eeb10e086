"""How the patches of several frames attend to each other: TimeSformer's divided and joint attention (arXiv 2102.05095).

Both run the blocks of an image encoder, ``vision``, which stays whole: its weights load and are used without clips.
"""

import torch
from timm.models.vision_transformer import init_weights_vit_timm
from torch import nn
from torch.utils.checkpoint import checkpoint

from policy.attention import build_attention
from policy.attention.softmax import SoftmaxAttention


class TemporalAttention(nn.Module):
    """patches (B, F, N, C) -> what each adds up from those at its place in all frames, (B, F, N, C); 0 at first."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SoftmaxAttention(dim=dim, num_heads=num_heads)
        self.attn.apply(init_weights_vit_timm)
        self.fc = nn.Linear(dim, dim)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, patches):
        batch, _, count, _ = patches.shape
        x = patches.transpose(1, 2).flatten(0, 1)  # (B * N, F, C)
        return self.fc(self.attn(self.norm(x))).unflatten(0, (batch, count)).transpose(1, 2)


class SpaceTime(nn.Module):
    """What both have in common: a code of the frame's number, learned from zero, on every patch token."""

    def __init__(self, vision, frames):
        super().__init__()
        self.time_embed = nn.Parameter(torch.zeros(1, frames, vision.vit.embed_dim))

    def embed(self, vision, video):
        """video (B, F, 3, h, w) -> prefix tokens (B, F, P, C) and patch tokens (B, F, N, C), before the blocks."""
        x = vision.embed(video.flatten(0, 1)).unflatten(0, video.shape[:2])
        return x[:, :, : vision.prefix_tokens], x[:, :, vision.prefix_tokens :] + self.time_embed[:, :, None]


class DividedSpaceTime(SpaceTime):
    """In every block dense attention over time, then the block's own attention within each frame (section 3).

    average_class_token: as the authors' code does, one class token for the clip, copied to every frame before a block's
    attention and averaged after it. Otherwise every frame keeps its own, and as time adds nothing at first, each frame
    starts as exactly what the image encoder makes of it.
    """

    def __init__(self, vision, frames, *, average_class_token):
        super().__init__(vision, frames)
        self.average_class_token = average_class_token
        self.layers = nn.ModuleList(
            TemporalAttention(vision.vit.embed_dim, block.attn.num_heads) for block in vision.vit.blocks
        )

    def forward(self, vision, video):
        """video (B, F, 3, h, w) in [-1, 1] -> tokens after the final norm (B, F, P+N, C)."""
        prefix, patches = self.embed(vision, video)
        for block, temporal in zip(vision.vit.blocks, self.layers, strict=True):
            prefix, patches = _run(vision, self._block, block, temporal, prefix, patches)
        return vision.vit.norm(torch.cat([prefix, patches], dim=2))

    def _block(self, block, temporal, prefix, patches):
        batch, frames, count, _ = prefix.shape
        patches = patches + block.drop_path1(temporal(patches))
        x = torch.cat([prefix, patches], dim=2).flatten(0, 1)  # (B * F, P+N, C)
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        if self.average_class_token:
            prefix = x[:, :count].unflatten(0, (batch, frames)).mean(dim=1, keepdim=True)
            x = torch.cat([prefix.expand(-1, frames, -1, -1).flatten(0, 1), x[:, count:]], dim=1)
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        x = x.unflatten(0, (batch, frames))
        return x[:, :, :count], x[:, :, count:]


class JointSpaceTime(SpaceTime):
    """One attention over the class token and the patches of all frames (section 3), with the weights of the encoder's.

    ``attention`` ({"name", options}) sees the frames as one picture, each below the one before: its pattern runs over
    the flattened sequence, frame after frame, row after row.
    """

    def __init__(self, vision, frames, *, attention):
        super().__init__(vision, frames)
        rows, columns = vision.grid
        self.layers = nn.ModuleList()
        for layer, block in enumerate(vision.vit.blocks):
            joint = build_attention(
                **attention,
                dim=vision.vit.embed_dim,
                num_heads=block.attn.num_heads,
                num_patches=frames * rows * columns,
                grid=(frames * rows, columns),
                layer=layer,
                depth=len(vision.vit.blocks),
                prefix_tokens=vision.prefix_tokens,
            )
            _share_parameters(joint, block.attn)
            self.layers.append(joint)

    def forward(self, vision, video):
        """video (B, F, 3, h, w) in [-1, 1] -> tokens after the final norm (B, F, P+N, C), prefix tokens repeated."""
        prefix, patches = self.embed(vision, video)
        frames, count = prefix.shape[1:3]
        x = torch.cat([prefix[:, 0], patches.flatten(1, 2)], dim=1)  # (B, P + F * N, C)
        for block, attention in zip(vision.vit.blocks, self.layers, strict=True):
            x = _run(vision, self._block, block, attention, x)
        x = vision.vit.norm(x)
        prefix = x[:, None, :count].expand(-1, frames, -1, -1)
        return torch.cat([prefix, x[:, count:].unflatten(1, (frames, -1))], dim=2)

    def _block(self, block, attention, x):
        x = x + block.drop_path1(block.ls1(attention(block.norm1(x))))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _share_parameters(joint, image):
    """Make the parameters of ``image`` those of ``joint``, so that loading an encoder reaches both.

    Where a size depends on the number of tokens, each keeps its own, and that of ``image``, which no clip uses, is not
    trained.
    """
    for name, parameter in image.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = joint.get_submodule(path)
        if getattr(owner, leaf).shape == parameter.shape:
            setattr(owner, leaf, parameter)
        else:
            parameter.requires_grad_(False)


def _run(vision, block, *inputs):
    """``block`` of ``inputs``, computed again in the backward pass where the encoder is to save memory."""
    if vision.vit.grad_checkpointing:
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
