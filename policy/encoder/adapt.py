"""Weights of one encoder for another whose grid or patch size differs: interpolated, never silently made new."""

import math

from timm.layers import resample_abs_pos_embed, resample_patch_embed

POSITIONS, PATCHES = "vit.pos_embed", "vit.patch_embed.proj.weight"


def adapt_weights(encoder, tensors):
    """(``tensors`` of a ViT of the same width as ``encoder`` brought to its shapes, lines that say what was done).

    Position codes are interpolated to the other grid (arXiv 2010.11929, section 3.2), patch filters resampled to the
    other patch size (arXiv 2212.08013, section 3.4). What differs otherwise stays so, for ``load_weights`` to refuse.
    """
    tensors, notes, own = dict(tensors), [], encoder.state_dict()
    if _differ(POSITIONS, own, tensors, axes=(0, 2)):
        prefix = 0 if encoder.vit.no_embed_class else encoder.prefix_tokens
        patches = tensors[POSITIONS].shape[1] - prefix
        side = math.isqrt(max(patches, 0))
        if side * side != patches or side == 0:
            return tensors, notes
        tensors[POSITIONS] = resample_abs_pos_embed(
            tensors[POSITIONS], new_size=list(encoder.grid), old_size=[side, side], num_prefix_tokens=prefix
        )
        notes.append(f"position codes interpolated from {side}x{side} to {encoder.grid[0]}x{encoder.grid[1]} patches")
    if _differ(PATCHES, own, tensors, axes=(0, 1)):
        size = own[PATCHES].shape[-2:]
        notes.append(f"patch filters resampled from {tensors[PATCHES].shape[-1]} to {size[-1]} px")
        tensors[PATCHES] = resample_patch_embed(tensors[PATCHES], list(size))
    return tensors, notes


def _differ(key, own, tensors, *, axes):
    """Whether ``key`` is in both with other shapes that agree along ``axes``."""
    if key not in own or key not in tensors or own[key].shape == tensors[key].shape:
        return False
    if own[key].ndim != tensors[key].ndim or tensors[key].numel() == 0:
        return False
    return all(own[key].shape[axis] == tensors[key].shape[axis] for axis in axes)
