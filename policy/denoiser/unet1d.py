"""Conditional 1-D U-Net over the action horizon with FiLM conditioning.

Source: Diffusion Policy (arXiv 2303.04137, section III-A), after the temporal U-Net of Diffuser (arXiv 2205.09991);
FiLM: arXiv 1709.07871. Every residual block is scaled and shifted by a linear map of [step embedding, observation].
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from policy.denoiser.base import Denoiser


class SinusoidalEmbedding(nn.Module):
    """steps (B,) -> (B, dim): sines then cosines at geometric frequencies (arXiv 1706.03762, section 3.5)."""

    def __init__(self, dim):
        super().__init__()
        half = dim // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half) / (half - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, steps):
        angles = steps[:, None].float() * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _conv_block(in_channels, out_channels, kernel_size, groups):
    convolution = nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    return nn.Sequential(convolution, nn.GroupNorm(groups, out_channels), nn.Mish())


class ResidualBlock(nn.Module):
    """x (B, C, T), film (B, 2C') -> (B, C', T): two convolutions, FiLM scale and shift between them."""

    def __init__(self, in_channels, out_channels, condition_dim, kernel_size, groups):
        super().__init__()
        self.first = _conv_block(in_channels, out_channels, kernel_size, groups)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(condition_dim, 2 * out_channels))
        self.second = _conv_block(out_channels, out_channels, kernel_size, groups)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv1d(in_channels, out_channels, 1)

    def forward(self, x, film):
        scale, shift = film[..., None].chunk(2, dim=1)  # each (B, C', 1)
        # Multiplied by scale, not 1 + scale: the published form.
        return self.second(self.first(x) * scale + shift) + self.skip(x)


class ConditionalUNet1D(Denoiser):
    """Noise predictor of action chunks (B, T, Da) at diffusion steps (B,), conditioned on observations (B, K).

    widths: channels of the levels; T is halved between them, so it must be a multiple of 2 ** (levels - 1).
    """

    def __init__(self, *, action_dim, condition_dim, widths, kernel_size=5, groups=8, step_dim=128):
        super().__init__()
        if kernel_size % 2 == 0 or groups < 1 or any(width % groups for width in widths):
            raise ValueError(
                f"kernel_size, widths: got {kernel_size}, {list(widths)}, allowed: odd, multiples of groups {groups}"
            )
        self.multiple = 2 ** (len(widths) - 1)
        self.widths, self.step_dim = list(widths), step_dim
        self.step_embedding = nn.Sequential(
            SinusoidalEmbedding(step_dim),
            nn.Linear(step_dim, 4 * step_dim),
            nn.Mish(),
            nn.Linear(4 * step_dim, step_dim),
        )

        def block(in_channels, out_channels):
            return ResidualBlock(in_channels, out_channels, step_dim + condition_dim, kernel_size, groups)

        ins = [action_dim, *widths[:-1]]
        last = len(widths) - 1
        self.down = nn.ModuleList(
            nn.ModuleList([block(i, o), block(o, o), nn.Conv1d(o, o, 3, 2, 1) if level < last else nn.Identity()])
            for level, (i, o) in enumerate(zip(ins, widths, strict=True))
        )
        self.middle = nn.ModuleList([block(widths[-1], widths[-1]), block(widths[-1], widths[-1])])
        # The way up starts at the lowest level, which is not upsampled into; its skip joins at equal resolution.
        self.up = nn.ModuleList(
            nn.ModuleList([block(2 * o, i), block(i, i), nn.ConvTranspose1d(i, i, 4, 2, 1)])
            for i, o in reversed(list(zip(widths[:-1], widths[1:], strict=True)))
        )
        self.out = nn.Sequential(
            _conv_block(widths[0], widths[0], kernel_size, groups), nn.Conv1d(widths[0], action_dim, 1)
        )

    def blocks(self):
        """Residual blocks in the order in which they run."""
        down = [block for level in self.down for block in level[:2]]
        return [*down, *self.middle, *(block for level in self.up for block in level[:2])]

    def film_layers(self):
        """The linear layer of every block's FiLM, in the order in which the blocks run."""
        return [block.film[1] for block in self.blocks()]

    # The FiLM of a block is linear in Mish of [step embedding, observation], so each half can be computed by itself:
    # the observation's once a sample, the steps' once a model.

    def step_films(self, steps):
        """steps (S,) -> the steps' part (S, 2C) of every block's FiLM."""
        embedded = F.mish(self.step_embedding(steps))
        return [F.linear(embedded, layer.weight[:, : self.step_dim]) for layer in self.film_layers()]

    def observation_films(self, condition):
        """condition (B, K) -> the observation's part (B, 2C) of every block's FiLM."""
        condition = F.mish(condition)
        return [F.linear(condition, layer.weight[:, self.step_dim :], layer.bias) for layer in self.film_layers()]

    def denoise_and_bottleneck(self, actions, films):
        """actions (B, T, Da), FiLM (B, 2C) of every block -> (B, T, Da), features (B, C, T') at the lowest level."""
        films = iter(films)
        x = actions.transpose(1, 2)  # (B, Da, T)
        skips = []
        for first, second, downsample in self.down:
            x = second(first(x, next(films)), next(films))
            skips.append(x)
            x = downsample(x)
        for block in self.middle:
            x = block(x, next(films))
        bottleneck = x
        for first, second, upsample in self.up:
            x = torch.cat([x, skips.pop()], dim=1)
            x = upsample(second(first(x, next(films)), next(films)))
        return self.out(x).transpose(1, 2), bottleneck
