"""Replay buffer: the arrays of a zarr of demonstrations, checked once when opened.

Layout (real-stanford/diffusion_policy): data/<key> (F, ...) and meta/episode_ends (E,), the frame after the last of
each episode. zarr formats 2 and 3, a directory or a .zip, read alike.

Images are uint8, or numbers from 0 to 255 of another type, whose fractions are rounded. Checksums are compared where
there are any: those of a .zip, and of chunks written with crc32, as ours are, crc32c or the like.
"""

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from zarr.buffer.cpu import NDBuffer

from policy.dataset.cache import cached_map
from policy.dataset.zarr_checks import (
    METADATA,
    array_names,
    check_array,
    chunk_keys,
    find_array,
    free_memory,
    open_zarr,
    read_array,
)
from policy.files import digest
from policy.registry import choose

STORAGES = ("auto", "ram", "mmap", "device")
BLOCK_BYTES = 16 << 20  # decoded at once by each thread: larger ones leave the caches, and the heap, at each turn


class ReplayBuffer:
    """arrays: {key: (F, ...)}, images uint8 (F, h, w, C), of numpy or, after ``to``, of torch; episode_ends: (E,)."""

    def __init__(self, arrays, episode_ends, path="memory"):
        self.arrays = arrays
        self.path = path
        self.episode_ends = _check_episode_ends(np.asarray(episode_ends), path)
        for key, array in arrays.items():
            _check_frames(len(array), self.episode_ends, f"{path}: data/{key}")

    @property
    def num_frames(self):
        return int(self.episode_ends[-1])

    @property
    def num_episodes(self):
        return len(self.episode_ends)

    def take(self, key, frames):
        """Rows ``frames`` (any shape, int64) of an array, where it lies."""
        array = self.arrays[key]
        if isinstance(array, torch.Tensor):
            frames = torch.from_numpy(frames).to(array.device, non_blocking=True)
        return array[frames]

    def to(self, device):
        """Move all arrays to a torch device, so that batches are gathered there."""
        self.arrays = {key: torch.as_tensor(array).to(device) for key, array in self.arrays.items()}

    def extend(self, other):
        """Append the episodes of ``other``, which has the same keys; numbers of frames and episodes stay valid.

        A memory map becomes an array in memory.
        """
        for key, array in self.arrays.items():
            added = other.arrays[key]
            if isinstance(array, torch.Tensor):
                self.arrays[key] = torch.cat([array, torch.as_tensor(added).to(array.device)])
            else:
                self.arrays[key] = np.concatenate([array, added])
        self.episode_ends = np.concatenate([self.episode_ends, self.num_frames + other.episode_ends])

    @classmethod
    def open(cls, path, sources, *, storage="ram", cache_dir=None):
        """Read ``sources`` = {key: {"source": zarr array, "shape": per frame, "type": ..., "columns", "missing"}}.

        type "rgb" arrays come back as uint8 (F, h, w, C), all others as float32; ``columns`` (optional) picks entries
        of the last axis. storage "mmap" decodes once into .npy files under ``cache_dir``, all others into memory.

        A chunk that is not stored reads as the fill value of zarr: in low-dimensional arrays of format 3, whose writers
        leave out chunks of zeros, which a line says; elsewhere only with missing "fill" (optional).

        Raises FileNotFoundError for a missing path; ValueError for anything that is not such a zarr, missing arrays
        (lists those present), wrong shapes, missing chunks, NaN or inf, images in another range, episode_ends that do
        not increase, and what memory cannot hold; OSError for a cache_dir without room.
        """
        choose("storage", storage, STORAGES)
        if storage == "mmap" and cache_dir is None:
            raise ValueError("storage: got 'mmap' without cache_dir, allowed: mmap with a cache_dir")
        root = open_zarr(path)
        ends = find_array(root, "meta/episode_ends", path)
        if ends is None:
            raise ValueError(f"{path}: got no meta/episode_ends, allowed: a replay buffer with data/ and meta/")
        check_array(ends, path)
        ends = _check_episode_ends(read_array(ends, path), path)
        arrays = {}
        for key, spec in sources.items():
            array = _find_source(root, key, spec["source"], path)
            _check_shape(array, spec, f"{path}: {array.path}")
            _check_frames(array.shape[0], ends, f"{path}: data/{key}")
            _check_missing(array, key, spec, path)
            decode = _decode_image if spec["type"] == "rgb" else _decode_low_dim
            columns = spec.get("columns")
            if storage == "mmap":
                arrays[key] = _memory_map(array, decode, columns, path, cache_dir)
            else:
                arrays[key] = _decode_all(array, decode, columns, path)
        return cls(arrays, ends, path)


def _find_source(root, key, source, path):
    """The array data/``source``; ValueError lists what is there instead."""
    array = find_array(root, f"data/{source}", path)
    if array is None:
        present = ", ".join(array_names(root, "data")) or "nothing"
        raise ValueError(f"{path}: got no data/{source} for {key!r}, allowed: {present}")
    return array


def _check_episode_ends(ends, path):
    """The ``ends`` as int64; ValueError where they are none."""
    if ends.ndim != 1 or len(ends) == 0 or ends.dtype.kind not in "iuf":
        raise ValueError(
            f"{path}: episode_ends: got shape {ends.shape} of {ends.dtype}, allowed: (E,) whole numbers with E >= 1"
        )
    with np.errstate(invalid="ignore"):
        numbers = ends.astype(np.int64)
    bad = (numbers != ends) | (np.diff(numbers, prepend=0) <= 0)
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(
            f"{path}: episode_ends: got {ends[at]} at position {at}, allowed: whole numbers, strictly increasing from 1"
        )
    return numbers


def _check_frames(frames, ends, name):
    if frames != ends[-1]:
        raise ValueError(f"{name}: got {frames} frames, allowed: {ends[-1]}, the last episode_ends")


def _check_missing(array, key, spec, path):
    """Refuse chunks that are not stored, or say that they read as the fill value."""
    choose(f"{key}.missing", spec.get("missing", "refuse"), ("refuse", "fill"))
    fill = spec.get("missing") == "fill"
    usual = spec["type"] != "rgb" and array.metadata.zarr_format == 3
    cure = f"; where every number of them is meant to be {array.fill_value}: shape_meta with {key}: {{missing: fill}}"
    missing = check_array(array, path, fills=fill or usual, cure="" if fill else cure)
    if missing:
        print(f"{path}: {array.path}: {missing} of its chunks are not stored and read as {array.fill_value}")


def _check_shape(array, spec, name):
    if not array.shape or array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: got type {array.dtype} of shape {array.shape}, allowed: numbers (F, ...)")
    shape = tuple(array.shape[1:])
    expected = tuple(spec["shape"])
    if spec["type"] == "rgb":
        channels, height, width = expected
        expected = (height, width, channels)  # stored channels last
    elif spec.get("columns") is not None:
        columns = list(spec["columns"])
        if len(shape) != 1 or max(columns) >= shape[0]:
            raise ValueError(f"{name}: got shape per frame {shape}, allowed: a vector with columns {columns}")
        shape = (len(columns),)
    if shape != expected:
        raise ValueError(f"{name}: got shape per frame {shape}, allowed: {expected} (shape_meta)")


def _decode_image(block, name, start):
    if block.dtype == np.uint8:
        return block
    with np.errstate(invalid="ignore"):
        pixels = block.astype(np.uint8)
    if np.array_equal(pixels, block):  # whole numbers in range, as nearly always; this is half the work
        return pixels
    if not (np.isfinite(block).all() and block.min() >= 0 and block.max() <= 255):
        last = start + len(block) - 1
        raise ValueError(f"{name}: got pixels outside 0..255 in frames {start} to {last}, allowed: 0..255")
    return np.round(block).astype(np.uint8)


def _decode_low_dim(block, name, start):
    with np.errstate(over="ignore"):
        numbers = block.astype(np.float32)
    if not np.isfinite(numbers).all():
        frame = start + int(np.argwhere(~np.isfinite(numbers))[0][0])
        raise ValueError(f"{name}: got NaN, inf or more than 3.4e38 in frame {frame}, allowed: finite numbers")
    return numbers


def _check_range(brightest, array, name):
    """Refuse images in [0, 1], which are none or one of 255 levels bright."""
    if brightest <= 1:
        raise ValueError(
            f"{name}: got images as {array.dtype} with nothing above 1, allowed: uint8, or numbers from 0 to 255;"
            " of images from 0 to 1: (255 * images).round().astype('uint8')"
        )


def _block_frames(array):
    """Frames to decode at once, in whole chunks."""
    frame_bytes = int(np.prod(array.shape[1:])) * array.dtype.itemsize
    step = max(BLOCK_BYTES // max(frame_bytes, 1), 1)
    return max(step // array.chunks[0], 1) * array.chunks[0]


def _check_memory(array, step, path, held):
    """Refuse what memory cannot hold: ``held`` bytes of the result, and the blocks of the threads while they decode."""
    block = math.prod((min(step, array.shape[0]), *array.shape[1:]))
    chunk = math.prod(array.shards or array.chunks)
    needed, free = held + (os.cpu_count() or 1) * (block + chunk) * array.dtype.itemsize, free_memory()
    if needed > free:
        cure = "; storage=mmap holds only what is read" if held else ""
        raise ValueError(
            f"{path}: {array.path}: got {needed / 1e9:,.1f} GB to hold in memory, allowed: {free / 1e9:,.1f} GB, which"
            f" are free{cure}"
        )


def _decode_all(array, decode, columns, path, create=None):
    """The decoded array, with a progress bar where it takes long; a thread a core decodes and checks the blocks.

    create: (shape, dtype) to what the frames are assigned to, an array in memory by default.
    """
    name, own, brightest = f"{path}: {array.path}", threading.local(), []
    frames, step = array.shape[0], _block_frames(array)
    _check_memory(array, step, path, 0 if create else _decoded_bytes(array, decode, columns))

    def block(start):
        if not hasattr(own, "memory"):  # fresh memory for every block would take longer to clear than to fill
            own.memory = np.empty((min(step, frames), *array.shape[1:]), array.dtype)
        values = own.memory[: frames - start]
        read_array(array, path, slice(start, start + len(values)), out=NDBuffer.from_numpy_array(values))
        values = values if columns is None else values[..., list(columns)]
        decoded = decode(values, name, start)
        if decode is _decode_image and array.dtype != np.uint8:
            brightest.append(decoded.max())
        return decoded

    def fill(start):
        out[start : start + step] = block(start)

    first = block(0)
    out = (create or np.empty)((frames, *first.shape[1:]), first.dtype)
    out[0:step] = first
    starts = range(step, frames, step)
    bar = {"desc": f"reading {array.path}", "unit": "block", "disable": len(starts) < 7, "leave": False}
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        for _ in tqdm(threads.map(fill, starts), total=len(starts), dynamic_ncols=True, **bar):
            pass
    if brightest:
        _check_range(max(brightest), array, name)
    return out


def _decoded_bytes(array, decode, columns):
    shape = array.shape if columns is None else (*array.shape[:-1], len(columns))
    return math.prod(shape) * (1 if decode is _decode_image else 4)


def _memory_map(array, decode, columns, path, cache_dir):
    """A read-only memory map of the decoded array; decoded again when a file of the source was modified since."""
    path = Path(path)
    names = [*chunk_keys(array), *(f"{array.path}/{name}" for name in METADATA)]
    files = [path] if path.is_file() else [file for name in names if (file := path / name).exists()]
    stamps = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    identity = digest(f"{path.resolve()} {array.path} {decode.__name__} {columns} {stamps}")
    target = Path(cache_dir) / f"{identity[:16]}.npy"
    return cached_map(target, f"{path}: {array.path}", lambda create: _decode_all(array, decode, columns, path, create))
