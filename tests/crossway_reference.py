"""Crossway's state decoders pixel by pixel, from their weights alone (arXiv 2307.01849)."""

import math

import numpy as np
import torch


def mish(x):
    return x * torch.tanh(torch.log1p(torch.exp(x)))


def convolve(x, weight, bias):
    """x (C, h, w), weight (C', C, k, k), zeros around."""
    pad = weight.shape[-1] // 2
    channels, height, width = x.shape
    wide = torch.zeros(channels, height + 2 * pad, width + 2 * pad, dtype=x.dtype)
    wide[:, pad : pad + height, pad : pad + width] = x
    out = bias[:, None, None].repeat(1, height, width)
    for dy in range(weight.shape[-1]):
        for dx in range(weight.shape[-1]):
            out += torch.einsum("oc,chw->ohw", weight[:, :, dy, dx], wide[:, dy : dy + height, dx : dx + width])
    return out


def upsample(x, weight, bias):
    """Transposed convolution x (C, h, w), weight (C, C', 4, 4), stride 2: every pixel is stamped, one row cut off."""
    _, height, width = x.shape
    out = torch.zeros(weight.shape[1], 2 * height + 2, 2 * width + 2, dtype=x.dtype)
    for y in range(height):
        for column in range(width):
            stamp = torch.einsum("c,coyx->oyx", x[:, y, column], weight)
            out[:, 2 * y : 2 * y + 4, 2 * column : 2 * column + 4] += stamp
    return out[:, 1:-1, 1:-1] + bias[:, None, None]


def code_by_hand(height, width, channels):
    octaves = channels // 4
    code = np.empty((4 * octaves, height, width))
    for i in range(octaves):
        for y in range(height):
            for x in range(width):
                row, column = 2 * y / (height - 1) - 1, 2 * x / (width - 1) - 1
                angles = [math.pi * 2**i * row, math.pi * 2**i * column]
                code[2 * i : 2 * i + 2, y, x] = np.sin(angles)
                code[2 * (octaves + i) : 2 * (octaves + i) + 2, y, x] = np.cos(angles)
    return code


def image_by_hand(w, pixels, size, *, code_channels=8, groups=4):
    """The image (3, size, size) that pixels (C, r, r) become, from the weights ``w`` of an image decoder alone."""

    def block(x, name):
        x = convolve(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"])
        grouped = x.reshape(groups, -1)
        mean, spread = grouped.mean(1, keepdim=True), (grouped.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        x = ((grouped - mean) / spread).reshape(x.shape)
        return mish(x * w[f"{name}.1.weight"][:, None, None] + w[f"{name}.1.bias"][:, None, None])

    def residual(x, name):
        out = block(block(x, f"{name}.blocks.0"), f"{name}.blocks.1")
        if f"{name}.skip.weight" in w:
            x = convolve(x, w[f"{name}.skip.weight"], w[f"{name}.skip.bias"])
        return out + x

    half, side = size // 2, pixels.shape[1]
    tiled = torch.stack([torch.stack([pixels[:, y % side, x % side] for x in range(half)], 1) for y in range(half)], 1)
    if "project.0.weight" in w:  # of every pixel of the whole grid, as published
        tiled = mish(convolve(tiled, w["project.0.weight"], w["project.0.bias"]))
    x = torch.cat([tiled, torch.from_numpy(code_by_hand(half, half, code_channels))])
    x = upsample(residual(residual(x, "residual.0"), "residual.1"), w["residual.2.weight"], w["residual.2.bias"])
    return convolve(block(x, "out.0"), w["out.1.weight"], w["out.1.bias"])


def start_by_hand(name, w, bottleneck, condition):
    """(pixels (C, r, r), vector) of one window's observed steps, one after another."""
    channels, positions = bottleneck.shape
    side = math.isqrt(positions)
    for step in range(2):
        if name == "a":
            part = bottleneck[step * channels // 2 : (step + 1) * channels // 2, 0]
            yield torch.stack([part[4 * c : 4 * c + 4].reshape(2, 2) for c in range(channels // 8)]), part
        elif name == "d":
            pixel = (w["reduce.0.weight"] @ condition[step] + w["reduce.0.bias"]).clamp_min(0)
            yield torch.stack([torch.full((2, 2), value.item(), dtype=torch.float64) for value in pixel]), None
        else:
            kept = channels // 2 if name == "b" else channels
            part = bottleneck[step * kept // 2 : (step + 1) * kept // 2]
            yield torch.stack([row.reshape(side, side) for row in part]), part.sum(1) / positions


def by_hand(decoder, name, bottleneck, condition):
    weights = {key: value.double() for key, value in decoder.state_dict().items()}
    result = {key: [] for key in decoder.shapes}
    for window, observed in zip(bottleneck, condition, strict=True):
        for pixels, vector in start_by_hand(name, weights, window, observed):
            for key, values in result.items():
                w = {k.split(key + ".")[1]: v for k, v in weights.items() if k.startswith(f"decoders.{key}.")}
                if len(decoder.shapes[key]) == 3:
                    values.append(image_by_hand(w, pixels, decoder.shapes[key][1]))
                else:
                    hidden = mish(w["2.weight"] @ mish(w["0.weight"] @ vector + w["0.bias"]) + w["2.bias"])
                    values.append(w["4.weight"] @ hidden + w["4.bias"])
    return {key: torch.stack(values).unflatten(0, (-1, 2)) for key, values in result.items()}
