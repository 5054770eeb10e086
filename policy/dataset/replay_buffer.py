"""Replay buffer: the arrays of a zarr of demonstrations, checked once when opened.

Layout (real-stanford/diffusion_policy): data/<key> (F, ...) and meta/episode_ends (E,), the frame after the last of
each episode. zarr formats 2 and 3, a directory or a .zip, read alike.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import zarr
from tqdm import tqdm
from zarr.buffer.cpu import NDBuffer

from policy.files import digest, whole
from policy.registry import choose

STORAGES = ("auto", "ram", "mmap", "device")
BLOCK_BYTES = 16 << 20  # decoded at once by each thread: larger ones leave the caches, and the heap, at each turn


class ReplayBuffer:
    """arrays: {key: (F, ...)}, images uint8 (F, h, w, C), of numpy or, after ``to``, of torch; episode_ends: (E,)."""

    def __init__(self, arrays, episode_ends, path="memory"):
        self.arrays = arrays
        self.path = path
        self.episode_ends = np.asarray(episode_ends, dtype=np.int64)
        _check_episode_ends(self.episode_ends, path)
        for key, array in arrays.items():
            if len(array) != self.num_frames:
                raise ValueError(
                    f"{path}: data/{key}: got {len(array)} frames, allowed: {self.num_frames}, the last episode_ends"
                )

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
        """Read ``sources`` = {key: {"source": zarr array, "shape": per frame, "type": ..., "columns": optional}}.

        type "rgb" arrays come back as uint8 (F, h, w, C), all others as float32; ``columns`` picks entries of the
        last axis. storage "mmap" decodes once into .npy files under ``cache_dir``, all others into memory.

        Raises FileNotFoundError for a missing path; ValueError for anything that is not such a zarr, missing arrays
        (lists those present), wrong shapes, missing chunks, NaN or inf, or episode_ends that do not increase.
        """
        choose("storage", storage, STORAGES)
        if storage == "mmap" and cache_dir is None:
            raise ValueError("storage: got 'mmap' without cache_dir, allowed: mmap with a cache_dir")
        root = open_zarr(path)
        ends = _find_array(root, "meta/episode_ends", path)
        if ends is None:
            raise ValueError(f"{path}: got no meta/episode_ends, allowed: a replay buffer with data/ and meta/")
        ends = _read_checked(ends, path)
        arrays = {}
        for key, spec in sources.items():
            source = spec["source"]
            array = _find_array(root, f"data/{source}", path)
            if array is None:
                data = root.get("data")
                present = sorted(data.array_keys()) if isinstance(data, zarr.Group) else []
                raise ValueError(
                    f"{path}: got no data/{source} for {key!r}, allowed: {', '.join(present) or 'nothing'}"
                )
            _check_shape(array, spec, f"{path}: data/{source}")
            decode = _decode_image if spec["type"] == "rgb" else _decode_low_dim
            columns = spec.get("columns")
            if storage == "mmap":
                arrays[key] = _memory_map(array, decode, columns, path, cache_dir)
            else:
                arrays[key] = _decode_all(array, decode, columns, path)
        return cls(arrays, ends, path)


def open_zarr(path):
    """The group at ``path`` (directory or .zip); FileNotFoundError or ValueError say what is wrong with it."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data set: got {path}, which does not exist")
    try:
        if path.suffix == ".zip":
            return zarr.open_group(zarr.storage.ZipStore(str(path), mode="r"), mode="r")
        return zarr.open_group(str(path), mode="r")
    except Exception as error:  # zarr, zipfile and json each have their own ways to fail on a broken store
        raise ValueError(f"{path}: got something that is not a readable zarr group ({error})") from error


def _find_array(root, name, path):
    """The array called ``name``, None where there is none."""
    try:
        node = root.get(name)
    except Exception as error:  # json and zarr each have their own ways to fail on a broken description
        raise ValueError(f"{path}: {name}: got a description that cannot be read ({error})") from error
    return node if isinstance(node, zarr.Array) else None


def _check_episode_ends(ends, path):
    if ends.ndim != 1 or len(ends) == 0:
        raise ValueError(f"{path}: episode_ends: got shape {ends.shape}, allowed: (E,) with E >= 1")
    lengths = np.diff(ends, prepend=0)
    if (lengths <= 0).any():
        at = int(np.argmax(lengths <= 0))
        raise ValueError(f"{path}: episode_ends: got {ends[at]} at position {at}, allowed: strictly increasing from 1")


def _check_shape(array, spec, name):
    shape = tuple(array.shape[1:])
    expected = tuple(spec["shape"])
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: got type {array.dtype}, allowed: numbers")
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
    if not np.isfinite(block).all():
        frame = start + int(np.argwhere(~np.isfinite(block))[0][0])
        raise ValueError(f"{name}: got NaN or inf in frame {frame}, allowed: finite numbers")
    return block.astype(np.float32)


def _read_checked(array, path, selection=slice(None), **options):
    try:
        return array.get_basic_selection(selection, **options)
    except Exception as error:  # codecs raise whatever their C library does
        raise ValueError(f"{path}: {array.path}: got a chunk that cannot be decoded ({error})") from error


def _block_starts(array, path):
    """First frames of the blocks to decode, each of whole chunks, and their length."""
    # zarr reads a missing chunk as the fill value, so a truncated copy would otherwise train on black images.
    if array.nchunks_initialized != array.nchunks:
        raise ValueError(
            f"{path}: {array.path}: got {array.nchunks_initialized} of {array.nchunks} chunks, allowed: all"
            " (a truncated copy? To store a chunk of zeros, zarr needs write_empty_chunks)"
        )
    if array.shape[0] == 0:
        raise ValueError(f"{path}: {array.path}: got 0 frames, allowed: at least 1")
    frame_bytes = int(np.prod(array.shape[1:])) * array.dtype.itemsize
    step = max(BLOCK_BYTES // max(frame_bytes, 1), 1)
    step = max(step // array.chunks[0], 1) * array.chunks[0]
    return range(0, array.shape[0], step), step


def _decode_all(array, decode, columns, path, create=np.empty):
    """The decoded array, with a progress bar where it takes long; a thread a core decodes and checks the blocks."""
    starts, step = _block_starts(array, path)
    own = threading.local()

    def block(start):
        if not hasattr(own, "memory"):  # fresh memory for every block would take longer to clear than to fill
            own.memory = np.empty((step, *array.shape[1:]), array.dtype)
        values = own.memory[: array.shape[0] - start]
        into = NDBuffer.from_numpy_array(values)
        _read_checked(array, path, slice(start, start + len(values)), out=into)
        values = values if columns is None else values[..., list(columns)]
        return decode(values, f"{path}: {array.path}", start)

    def fill(start):
        out[start : start + step] = block(start)

    first = block(0)
    out = create((array.shape[0], *first.shape[1:]), first.dtype)
    out[:step] = first
    bar = {"desc": f"reading {array.path}", "unit": "block", "disable": len(starts) < 8, "leave": False}
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        for _ in tqdm(threads.map(fill, starts[1:]), total=len(starts) - 1, dynamic_ncols=True, **bar):
            pass
    return out


def _memory_map(array, decode, columns, path, cache_dir):
    """A read-only memory map of the decoded array; decoded again when a file of the source was modified since."""
    path = Path(path)
    files = [path] if path.is_file() else sorted((path / array.path).rglob("*"))
    stamps = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    identity = digest(f"{path.resolve()} {array.path} {decode.__name__} {columns} {stamps}")
    target = Path(cache_dir) / f"{identity[:16]}.npy"
    if not target.exists():
        with whole(target, shared=True) as place:

            def create(shape, dtype):
                return np.lib.format.open_memmap(place, mode="w+", shape=shape, dtype=dtype)

            _decode_all(array, decode, columns, path, create).flush()
    return np.load(target, mmap_mode="r")
