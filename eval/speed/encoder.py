"""Speed of whole ViT encoders with Fibottention beside timm's dense ones; ``python -m eval.speed encoder``."""

import timm
import torch
from tqdm import tqdm

from eval.shared.machine import compare
from eval.shared.tables import show
from policy.encoder.vit import ViTEncoder

DIRECTIONS = ("forward", "forward+backward")


def encoder_methods(image_size, patch_size, arch, variant):
    """{method: module images (B, 3, h, w) -> features (B, C)}: timm's own fused dense attention, and ours."""
    size = {"img_size": image_size, "patch_size": patch_size}
    attention = {"name": "fibottention", "variant": variant}
    options = {"image_size": image_size, "patch_size": patch_size, "arch": arch, "drop_remainder": True}
    dense = timm.create_model(arch, num_classes=0, global_pool="avg", fc_norm=False, **size)
    return {"timm": dense, "fibottention": ViTEncoder(attention=attention, **options)}


def forward(module, images):
    with torch.no_grad():
        return module(images)


def forward_backward(module, images):
    """Gradients of all parameters."""
    module.zero_grad(set_to_none=True)
    module(images).sum().backward()


def measure_encoder(*, images, patch_size, arch, variant, tokens, device, dtype, seconds):
    """A dictionary per image size, direction and method, as in encoder.json; images: sizes h = w in px."""
    rows = []
    with tqdm(total=len(images) * len(DIRECTIONS), unit="size", leave=False, dynamic_ncols=True) as bar:
        for image_size in images:
            patches = (image_size // patch_size) ** 2
            batch = max(1, round(tokens / patches))
            torch.manual_seed(0)
            methods = encoder_methods(image_size, patch_size, arch, variant)
            methods = {name: module.to(device, dtype) for name, module in methods.items()}
            x = torch.randn(batch, 3, image_size, image_size, device=device, dtype=dtype)
            for direction, run in zip(DIRECTIONS, (forward, forward_backward), strict=True):
                bar.set_description(f"{image_size} px, {direction}")
                calls = {name: lambda m=module, run=run, x=x: run(m, x) for name, module in methods.items()}
                size = {"image": image_size, "patches": patches, "batch": batch, "direction": direction}
                rows += [{**size, **row} for row in compare(calls, {}, baseline="timm", seconds=seconds, device=device)]
                bar.update()
    return rows


def cells(rows):
    """Cells of the Markdown table: a row an image size and direction."""
    head = ["image", "patches", "batch", "direction", "timm, ms", "fibottention, ms", "times faster", "MB", "MB, ours"]
    lines = [head]
    for dense, ours in zip(rows[::2], rows[1::2], strict=True):
        memory = [show(row["memory_mb"], ",.0f") for row in (dense, ours)]
        times = [f"{row['ms']:,.0f}" for row in (dense, ours)]
        size = [str(dense[key]) for key in ("image", "patches", "batch", "direction")]
        lines.append([*size, *times, f"{ours['ratio']:.2f}", *memory])
    return lines
