"""robomimic's HDF5 as a zarr replay buffer: python -m policy.dataset.robomimic IN.hdf5 OUT.zarr

An interrupted conversion goes on where it stopped; OUT.zarr appears only when complete. Actions become absolute, as
in Diffusion Policy (arXiv 2303.04137), unless --actions recorded keeps them as they are.
"""

import json
import os
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import zarr
from numcodecs import CRC32, Blosc
from tqdm import tqdm

from policy.dataset.robomimic.actions import RECORDED, absolute_actions, num_arms, read_controllers
from policy.dataset.robomimic.hdf5_checks import probe
from policy.dataset.robomimic.layout import finite, read_layout, reading
from policy.files import digest, locked, write_whole
from policy.registry import choose

ACTIONS = ("absolute", "recorded")
CHUNK = 64  # frames of images compressed together
LOW_DIM_CHUNK = 4096
# Rendered pictures shrink to 27 % at 220 MB/s; lz4 of the same speed class leaves 50 %, shuffling more. The checksum is
# of what is stored, and compared whenever a chunk is read.
CODECS = {"filters": [Blosc(cname="zstd", clevel=3, shuffle=Blosc.NOSHUFFLE)], "compressors": CRC32()}
BLOCK_BYTES = 32 << 20  # of images between two notes of the progress
PARTIAL = re.compile(r"zarr|lock|progress\.json(\.partial.*)?")  # what OUT.partial holds


def convert(source, output, *, actions="absolute", filter_key=None):
    """Convert the HDF5 ``source`` to the zarr (format 2) ``output``; returns its path.

    data/<key> for every key of obs, data/action, (F, 10 an arm) float32 when absolute, data/state where there are
    states, meta/episode_ends (E,). The attribute filter_keys holds episode numbers of the zarr. filter_key: only the
    demos that this list of robomimic's mask names.

    Raises FileNotFoundError or ValueError for a bad ``source``, ValueError for an ``output`` made from something else
    and OSError where it cannot be written; what was written then stays in OUTPUT.partial, to go on from.
    """
    source, output = Path(source), Path(output)
    _check_arguments(source, output, actions)
    return _convert(source, output, {"sha256": digest(source), "actions": actions, "filter_key": filter_key})


def ensure_zarr(source, cache_dir, *, actions="absolute"):
    """Path of the zarr of the HDF5 ``source`` under ``cache_dir``, converted when the source's content is new.

    Several processes may ask at once: one converts, the others wait for it.
    """
    source, cache_dir = Path(source), Path(cache_dir)
    _check_arguments(source, cache_dir, actions)
    content = digest(source)
    target = cache_dir / f"{source.stem}_{actions}_{content[:12]}.zarr"
    identity = {"sha256": content, "actions": actions, "filter_key": None}
    return target if target.exists() else _convert(source, target, identity)


def _check_arguments(source, output, actions):
    choose("actions", actions, ACTIONS)
    if not source.is_file():
        raise FileNotFoundError(f"data set: got {source}, which is no file")
    if output.suffix == ".zip":
        raise ValueError(f"output: got {output}, allowed: a folder, OUT.zarr")


def _convert(source, output, identity):
    if output.exists():
        return _check_present(output, identity)
    partial = output.with_name(f"{output.name}.partial")
    probe(source)
    with reading(source), h5py.File(source, "r") as file:
        layout = read_layout(file, source, identity["filter_key"])
    try:
        with locked(partial):
            if output.exists():  # another process was faster
                _check_present(output, identity)
            else:
                _check_own(partial)
                try:
                    _write(source, layout, partial, identity)
                except ValueError:  # the file is bad: nothing to go on from
                    shutil.rmtree(partial)
                    raise
                os.replace(partial / "zarr", output)
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise OSError(f"{partial}: cannot be written ({error}); run this again to go on from what is there") from error
    return output


def _check_present(output, identity):
    try:
        attrs = dict(zarr.open_group(str(output), mode="r").attrs)
    except Exception:  # zarr and json each have their own ways to fail on something else
        attrs = {}
    present = {key: attrs.get(key) for key in ("actions", "filter_key")}
    present["sha256"] = attrs.get("source", {}).get("sha256")
    if present != identity or attrs.get("complete") is not True:
        raise ValueError(
            f"output: got {output}, which was not made from this file with these options, allowed: a new name"
        )
    return output


def _check_own(partial):
    """Refuse to remove or write into a folder that is not ours."""
    foreign = sorted(name for name in os.listdir(partial) if not PARTIAL.fullmatch(name))
    if foreign:
        raise ValueError(f"{partial}: got {foreign[0]} in it, allowed: what an interrupted conversion left")


def _write(source, layout, partial, identity):
    """Bring the zarr in ``partial`` to its end, from wherever it is."""
    store, note = partial / "zarr", partial / "progress.json"
    progress = json.loads(note.read_text()) if note.exists() else {}
    frames = int(layout.ends[-1])
    # All chunks are stored: ReplayBuffer takes a missing one, as zarr leaves zeros by default, for damage.
    with h5py.File(source, "r") as file, zarr.config.set({"array.write_empty_chunks": True}):
        if progress.get("identity") == identity and store.exists():
            print(f"going on with {partial} after {progress['frames']} of {frames} frames")
        else:
            if progress:
                print(f"{partial} was begun from another file or with other options; starting afresh")
            print(f"converting {frames} frames of {source}")
            note.unlink(missing_ok=True)
            shutil.rmtree(store, ignore_errors=True)
            root = zarr.open_group(str(store), mode="w", zarr_format=2)
            _write_low_dim(root, file, layout, source, identity["actions"])
            _create_images(root, layout)
            progress = {"identity": identity, "frames": 0}
            write_whole(note, json.dumps(progress))
        root = zarr.open_group(str(store), mode="r+")
        _write_images(root, file, layout, source, progress, note)
    root.attrs.update(
        {
            "env_args": layout.env_args,
            "source": {"name": source.name, "bytes": source.stat().st_size, "sha256": identity["sha256"]},
            "actions": identity["actions"],
            "filter_key": identity["filter_key"],
            "filter_keys": layout.filter_keys,
            "complete": True,
        }
    )


def _create(root, name, shape, dtype, chunk):
    return root.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(min(chunk, shape[0]), *shape[1:]),
        **CODECS,
    )


def _write_low_dim(root, file, layout, path, actions):
    def write(name, dtype, episodes):
        values = np.concatenate(episodes).astype(dtype)
        _create(root, name, values.shape, dtype, LOW_DIM_CHUNK)[:] = values

    write("data/action", "float32", _actions(file, layout, path, actions))
    for key in tqdm(layout.low_dim, desc="checking", unit="key", leave=False):
        write(f"data/{key.removeprefix('obs/')}", "float32", [finite(file, demo, key, path) for demo in layout.demos])
    if "states" in layout.datasets:
        write("data/state", "float64", [finite(file, demo, "states", path) for demo in layout.demos])
    _create(root, "meta/episode_ends", layout.ends.shape, "int64", LOW_DIM_CHUNK)[:] = layout.ends


def _actions(file, layout, path, kind):
    """The actions (T, Da) of every demo."""
    if kind == "recorded":
        return [finite(file, demo, "actions", path) for demo in layout.demos]
    if layout.env_args is None:
        raise ValueError(f"{path}: data: got no attribute env_args, allowed: robomimic's; {RECORDED}")
    arms = num_arms(layout.datasets["actions"][0][0], f"{path}: actions")
    if layout.datasets.get("actions_abs", layout.datasets["actions"]) != layout.datasets["actions"]:
        raise ValueError(f"{path}: actions_abs: got another shape than actions, allowed: 7 numbers an arm")
    controllers = read_controllers(layout.env_args, arms, f"{path}: env_args")
    episodes = []
    for demo in layout.demos:
        needed = [key for key in layout.low_dim if re.fullmatch(r"obs/robot\d_eef_(pos|quat|quat_site)", key)]
        obs = {key.removeprefix("obs/"): finite(file, demo, key, path) for key in needed}
        goals = finite(file, demo, "actions_abs", path) if "actions_abs" in layout.datasets else None
        recorded = finite(file, demo, "actions", path)
        model_file = file["data"][demo].attrs.get("model_file")
        episodes.append(absolute_actions(recorded, controllers, obs, model_file, f"{path}: data/{demo}", goals))
    return episodes


def _create_images(root, layout):
    for key, (shape, dtype) in layout.images.items():
        _create(root, f"data/{key.removeprefix('obs/')}", (int(layout.ends[-1]), *shape), dtype, CHUNK)


def _write_images(root, file, layout, path, progress, note):
    """Copy the images in blocks of whole chunks, noting the progress after each."""
    frames = int(layout.ends[-1])
    frame_bytes = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in layout.images.values())
    step = max(BLOCK_BYTES // (frame_bytes * CHUNK), 1) * CHUNK
    arrays = {key: root[f"data/{key.removeprefix('obs/')}"] for key in layout.images}
    with tqdm(total=frames, initial=progress["frames"], desc="converting", unit="frame", unit_scale=True) as bar:
        for start in range(progress["frames"], frames, step):
            end = min(start + step, frames)
            for key, array in arrays.items():
                array[start:end] = _read_block(file, layout, key, start, end, path)
            write_whole(note, json.dumps({**progress, "frames": end}))
            bar.update(end - start)


def _read_block(file, layout, key, start, end, path):
    """Frames ``start`` to ``end`` of the whole file."""
    first = int(np.searchsorted(layout.ends, start, side="right"))
    parts = []
    while start < end:
        demo, before = layout.demos[first], int(layout.ends[first - 1]) if first else 0
        stop = min(end, int(layout.ends[first]))
        selection = slice(start - before, stop - before)
        if layout.images[key][1] == "uint8":
            with reading(path):
                parts.append(file["data"][demo][key][selection])
        else:
            parts.append(finite(file, demo, key, path, selection).astype(np.float32))
        start, first = stop, first + 1
    return np.concatenate(parts)
