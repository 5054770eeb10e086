"""Pictures drawn by several processes into a zarr (format 2) that appears only when complete."""

import multiprocessing

import numcodecs
import numpy as np
import zarr
from tqdm import tqdm

from envs.shared.files import whole
from envs.shared.workers import deaf_children, start_worker, usual_processes
from envs.shared.zarr_files import ALL_CHUNKS, CHECKSUM

CHUNK = 256  # frames drawn by one job and stored together
CODECS = {"filters": [numcodecs.Blosc("lz4", shuffle=numcodecs.Blosc.SHUFFLE)], "compressors": CHECKSUM}


def in_processes(draw, jobs):
    """Yield ``draw(job)`` for each of ``jobs`` in order, computed by spawned processes, one a core."""
    processes = min(usual_processes(), len(jobs))
    with deaf_children():
        pool = multiprocessing.get_context("spawn").Pool(processes, initializer=start_worker)
    with pool:
        yield from pool.imap(draw, jobs)


def write_rendered(target, draw, jobs, *, frames, arrays, episode_ends, description):
    """A zarr folder at ``target`` with what ``draw(job)`` returns for each of ``jobs``, {name: (CHUNK, ...)}, in order.

    The last job may return fewer frames; together they have ``frames``. arrays: further {name: (F, ...)}. ``draw``
    must be importable by spawned processes. Another process that was faster wins.
    """
    with whole(target, shared=True) as place, zarr.config.set(ALL_CHUNKS):
        root = zarr.open_group(str(place), mode="w", zarr_format=2)
        start = 0
        with tqdm(total=frames, desc=description, unit="frame", leave=False, dynamic_ncols=True) as bar:
            for block in in_processes(draw, jobs):
                count = len(next(iter(block.values())))
                for name, values in block.items():
                    _array(root, name, frames, values)[start : start + count] = values
                start += count
                bar.update(count)
        for name, values in arrays.items():
            root.create_array(f"data/{name}", data=values, chunks=(4096, *values.shape[1:]), **CODECS)
        root.create_array("meta/episode_ends", data=np.asarray(episode_ends, np.int64), **CODECS)


def _array(root, name, frames, like):
    """The array data/``name`` of ``root`` for as many ``frames``, made when it is not there yet."""
    if f"data/{name}" in root:
        return root[f"data/{name}"]
    shape = (frames, *like.shape[1:])
    return root.create_array(f"data/{name}", shape=shape, chunks=(CHUNK, *shape[1:]), dtype=like.dtype, **CODECS)
