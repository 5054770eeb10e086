"""Spatial softmax: feature maps to the expected image coordinates of what each map responds to.

Source: Finn et al., Deep Spatial Autoencoders (arXiv 1509.06113, section IV); the pooling of robomimic's and
Diffusion Policy's ResNet encoders (arXiv 2303.04137).
"""

import torch
from torch import nn


class SpatialSoftmax(nn.Module):
    """maps (B, C, h, w) -> (B, 2K): x then y in [-1, 1] for each of K keypoints."""

    def __init__(self, channels, num_keypoints, grid):
        super().__init__()
        rows, columns = grid
        if rows * columns < 2:
            raise ValueError(
                f"spatial softmax: got a {rows}x{columns} grid, allowed: at least 2 cells (one has no place)"
            )
        self.to_keypoints = nn.Conv2d(channels, num_keypoints, kernel_size=1)
        y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
        self.register_buffer("coordinates", torch.stack([x.flatten(), y.flatten()], dim=1), persistent=False)
        self.out_dim = 2 * num_keypoints

    def forward(self, maps):
        """maps (B, C, h, w) -> (B, 2K)."""
        scores = self.to_keypoints(maps).flatten(2)  # (B, K, h*w)
        return (scores.softmax(dim=-1) @ self.coordinates).flatten(1)
