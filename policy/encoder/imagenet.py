"""Weights from timm, which learned from pictures scaled otherwise than ours."""

import torch


@torch.no_grad()
def take_unit_images(convolution, *, mean, std):
    """Change the first ``convolution`` of a network to take images in [-1, 1] for those of (pixel - mean) / std.

    mean, std: of each colour, of pixels in [0, 1]. The outputs stay the same, except where the convolution pads: its
    zeros then stand for grey in place of ``mean``. In the weights, so that checkpoints and other encoders get it, too.
    """
    mean, std = (torch.tensor(value).to(convolution.weight) for value in (mean, std))
    if convolution.bias is None:
        convolution.bias = torch.nn.Parameter(convolution.weight.new_zeros(len(convolution.weight)))
    convolution.bias += (convolution.weight * ((0.5 - mean) / std)[:, None, None]).sum(dim=(1, 2, 3))
    convolution.weight *= (0.5 / std)[:, None, None]
