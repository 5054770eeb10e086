"""zarr groups as folders or .zip files: read with errors that name the file, written whole or not at all."""

import os
import zipfile
from pathlib import Path

import numcodecs
import numpy as np
import zarr

from envs.shared.files import whole
from envs.shared.zarr_checks import check_array, find_array, free_memory, open_zarr, read_array

# With every chunk, also one of zeros, which zarr would leave out and readers take for a truncated copy, and with a
# checksum of what is stored, compared whenever a chunk is read.
ALL_CHUNKS = {"array.write_empty_chunks": True}
CHECKSUM = numcodecs.CRC32()


def read_attributes(path):
    """Attributes of the group at ``path``; ValueError for none."""
    return open_zarr(path).attrs.asdict()


def read_all(root, name, source):
    """The whole array ``name`` of ``root``, checked; ValueError names what it lacks.

    A chunk that is not stored reads as zeros in format 3 only, whose writers leave out chunks of zeros.
    """
    array = find_array(root, name, source)
    if array is None or array.dtype.kind not in "biuf":
        raise ValueError(f"{source}: {name}: got {array}, allowed: an array of numbers")
    missing = check_array(array, source, fills=array.metadata.zarr_format == 3)
    if missing:
        print(f"{source}: {name}: {missing} of its chunks are not stored and read as {array.fill_value}")
    if array.nbytes > free_memory():
        raise ValueError(f"{source}: {name}: got {array.nbytes / 1e9:,.1f} GB, allowed: what memory holds")
    return read_array(array, source)


def write_zarr(output, arrays, attributes):
    """Write arrays {name: (F, ...)} as a group of format 2, a folder or a .zip file, whole or not at all."""
    with whole(output, shared=True) as place, zarr.config.set(ALL_CHUNKS):
        folder = place.with_name("folder")
        group = zarr.open_group(folder, mode="w", zarr_format=2)
        group.attrs.update(attributes)
        for name, array in arrays.items():
            # Column order: columns of a state that stand still, such as the block's, almost vanish.
            codec = numcodecs.Blosc("zstd", clevel=9, shuffle=numcodecs.Blosc.BITSHUFFLE)
            chunks = (max(1, min(len(array), 65536)), *array.shape[1:])
            options = {"chunks": chunks, "filters": [codec], "compressors": CHECKSUM, "order": "F"}
            group.create_array(name, shape=array.shape, dtype=array.dtype, **options)[:] = array
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
    write_zarr(target, {**arrays, "meta/episode_ends": np.asarray(episode_ends, np.int64)}, attributes)
