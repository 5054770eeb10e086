"""zarr groups as folders or .zip files: read with errors that name the file, written whole or not at all."""

import os
import zipfile
from pathlib import Path

import numcodecs
import numpy as np
import zarr

from envs.shared.files import whole


def open_group(path):
    """The zarr group at ``path`` (Path), for reading; ValueError for anything else."""
    try:
        if path.suffix == ".zip":
            return zarr.open_group(zarr.storage.ZipStore(str(path), mode="r"), mode="r")
        return zarr.open_group(str(path), mode="r")
    except Exception as error:  # zarr, zipfile and json each have their own ways to fail on a broken store
        raise ValueError(f"{path}: got something that is not a readable zarr group ({error})") from error


def read_attributes(path):
    """Attributes of the group at ``path``; ValueError for none."""
    return open_group(path).attrs.asdict()


def read_array(root, name, source):
    """The whole array ``name`` of ``root``; a missing chunk, which zarr reads as zeros, is a ValueError."""
    array = root[name]
    if array.nchunks_initialized != array.nchunks:
        chunks = f"{array.nchunks_initialized} of {array.nchunks} chunks"
        raise ValueError(f"{source}: {name}: got {chunks}, allowed: all (a truncated copy?)")
    try:
        return array[:]
    except Exception as error:  # codecs raise whatever their C library does
        raise ValueError(f"{source}: {name}: got a chunk that cannot be decoded ({error})") from error


def write_zarr(output, arrays, attributes):
    """Write arrays {name: (F, ...)} as a group of format 2, a folder or a .zip file, whole or not at all."""
    with whole(output, shared=True) as place:
        folder = place.with_name("folder")
        group = zarr.open_group(folder, mode="w", zarr_format=2)
        group.attrs.update(attributes)
        for name, array in arrays.items():
            # Column order: columns of a state that stand still, such as the block's, almost vanish.
            codec = numcodecs.Blosc("zstd", clevel=9, shuffle=numcodecs.Blosc.BITSHUFFLE)
            chunks = (max(1, min(len(array), 65536)), *array.shape[1:])
            options = {"shape": array.shape, "dtype": array.dtype, "chunks": chunks, "compressors": codec, "order": "F"}
            group.create_array(name, **options)[:] = array
        if place.suffix == ".zip":
            with zipfile.ZipFile(place, "w", zipfile.ZIP_STORED) as file:
                for path in sorted(folder.rglob("*")):
                    if path.is_file():  # a fixed date, so that equal sets are equal bytes
                        file.writestr(zipfile.ZipInfo(path.relative_to(folder).as_posix()), path.read_bytes())
        else:
            folder.rename(place)


def write_labels(target, images, episode_ends, known, **attributes):
    """Write the label set ``target`` of the pictures in the zarr ``images``; known: {task: (labels (F,), names)}.

    data/label_<task> (F,) int64: the class of a frame or of the clip that starts there, -1 for none; meta/episode_ends.
    Attributes: classes {task: names}; images, the path of the zarr with data/img as seen from the folder of the set;
    and where it matters span {task: frames that a clip of this task covers}.
    """
    arrays = {f"data/label_{task}": values.astype(np.int64) for task, (values, _) in known.items()}
    attributes["classes"] = {task: names for task, (_, names) in known.items()}
    attributes["images"] = os.path.relpath(images, Path(target).parent)
    with zarr.config.set({"array.write_empty_chunks": True}):  # readers take a missing chunk, as of zeros, for damage
        write_zarr(target, {**arrays, "meta/episode_ends": np.asarray(episode_ends, np.int64)}, attributes)
