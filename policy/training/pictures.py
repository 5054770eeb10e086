"""Pictures of reconstructed observations."""

import numpy as np
from PIL import Image

COLUMNS = 8


def write_reconstructions(path, pairs):
    """A PNG of ``pairs`` {camera: (observed, reconstructed)} (B, To, 3, h, w) in [-1, 1], one above the other.

    Shows the last observed step of the first few of B.
    """
    rows = []
    for observed, reconstructed in pairs.values():
        for images in (observed, reconstructed):
            images = images[:COLUMNS, -1].float().cpu().numpy().transpose(0, 2, 3, 1)  # (columns, h, w, 3)
            rows.append(np.concatenate(list(images), axis=1))
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 2), (0, width - row.shape[1]), (0, 0)), constant_values=1) for row in rows]
    pixels = np.clip((np.concatenate(rows) + 1) * 127.5, 0, 255).round().astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    Image.fromarray(pixels).save(partial, format="PNG")
    partial.replace(path)
