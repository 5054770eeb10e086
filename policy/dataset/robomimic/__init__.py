"""robomimic's HDF5 files: their layout, their actions, and the conversion to a replay buffer."""

from policy.dataset.robomimic.conversion import convert, ensure_zarr

__all__ = ["convert", "ensure_zarr"]
