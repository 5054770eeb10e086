"""What Crossway's state decoders are made of (arXiv 2307.01849; sizes after LostXine/crossway_diffusion)."""

import math

import torch
from torch import nn


def position_code(height, width, channels):
    """(channels, h, w): sines, then cosines, of rows and columns in [-1, 1] times pi 2^i, i < channels / 4."""
    axes = torch.linspace(-1, 1, height, dtype=torch.float64), torch.linspace(-1, 1, width, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # (2, h, w)
    octaves = math.pi * 2.0 ** torch.arange(channels // 4, dtype=torch.float64)
    phases = (octaves[:, None, None, None] * grid).flatten(0, 1)  # (channels / 2, h, w): row, column of each octave
    return torch.cat([phases.sin(), phases.cos()]).float()


def _conv_block(in_channels, out_channels, kernel_size, groups):
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    return nn.Sequential(convolution, nn.GroupNorm(groups, out_channels), nn.Mish())


class ResidualBlock2D(nn.Module):
    """x (B, C, h, w) -> (B, C', h, w): two convolutions beside a 1x1."""

    def __init__(self, in_channels, out_channels, kernel_size, groups):
        super().__init__()
        self.blocks = nn.Sequential(
            _conv_block(in_channels, out_channels, kernel_size, groups),
            _conv_block(out_channels, out_channels, kernel_size, groups),
        )
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        return self.blocks(x) + self.skip(x)


class ImageDecoder(nn.Module):
    """A few pixels (B, in_channels, r, r) -> image (B, C, h, w).

    They are tiled to half the image, with a position code beside them, and upsampled once. project: channels that a
    linear map of every pixel makes of ``in_channels`` first, none by default.
    """

    def __init__(self, in_channels, shape, *, project=None, channels, code_channels, kernel_size, groups):
        super().__init__()
        image_channels, height, width = shape
        if kernel_size % 2 == 0 or groups < 1 or channels % groups or code_channels % 4:
            raise ValueError(
                f"decoder.kernel_size, channels, code_channels: got {kernel_size}, {channels}, {code_channels},"
                f" allowed: odd, a multiple of groups {groups}, a multiple of 4"
            )
        if height % 2 or width % 2 or min(height, width) < 2:
            raise ValueError(f"decoder: got an image of {height}x{width} px, allowed: even sizes (decoder.image_size)")
        self.project = None
        if project is not None:
            self.project = nn.Sequential(nn.Conv2d(in_channels, project, 1), nn.Mish())
            in_channels = project
        self.register_buffer("code", position_code(height // 2, width // 2, code_channels), persistent=False)
        self.residual = nn.Sequential(
            ResidualBlock2D(in_channels + code_channels, channels, kernel_size, groups),
            ResidualBlock2D(channels, channels, kernel_size, groups),
            nn.ConvTranspose2d(channels, channels, 4, 2, 1),
        )
        self.out = nn.Sequential(
            _conv_block(channels, channels, kernel_size, groups), nn.Conv2d(channels, image_channels, 1)
        )

    def forward(self, x):
        if self.project is not None:
            x = self.project(x)  # before tiling, which only repeats its result
        height, width = self.code.shape[1:]
        x = x.repeat(1, 1, -(-height // x.shape[2]), -(-width // x.shape[3]))[..., :height, :width]
        code = self.code.to(x.dtype).expand(len(x), -1, -1, -1)
        return self.out(self.residual(torch.cat([x, code], dim=1)))


def low_dim_decoder(in_channels, size):
    """An MLP (B, in_channels) -> (B, size) over 4 and 2 times ``size``."""
    return nn.Sequential(
        nn.Linear(in_channels, 4 * size),
        nn.Mish(),
        nn.Linear(4 * size, 2 * size),
        nn.Mish(),
        nn.Linear(2 * size, size),
    )
