"""Decoded arrays as .npy files of a cache folder, which later runs map into memory at once."""

import json
import math
import shutil

import numpy as np

from policy.files import digest, whole, write_whole

SAMPLES, SAMPLE_BYTES = 64, 4096  # of a file that are compared with what was written


def cached_map(target, what, write):
    """A read-only memory map of the .npy file ``target``, which ``write(create)`` makes where it is not sound.

    create(shape, dtype) returns what rows are assigned to. A file is sound when its size, its time and samples of its
    content are those noted beside it. what: the source, for messages. Raises OSError, which names cache_dir, where the
    disk has no room or refuses.
    """
    note = target.with_suffix(".json")
    if not _is_sound(target, note):
        if target.exists():
            print(f"{target}: is not as it was written; decoding {what} again")
        try:
            with whole(target, shared=True) as place:
                write(lambda shape, dtype: _Rows(place, shape, dtype))
            write_whole(note, json.dumps(_mark(target)))
        except OSError as error:
            raise OSError(
                f"cache_dir: got {target.parent}, which cannot hold {what} ({error}), allowed: a folder with room;"
                " or storage=ram"
            ) from error
    return np.load(target, mmap_mode="r")


class _Rows:
    """Rows written into a .npy file: a full disk is an OSError here, and the end of the process in a memory map."""

    def __init__(self, place, shape, dtype):
        needed, free = math.prod(shape) * dtype.itemsize, shutil.disk_usage(place.parent).free
        if needed > free:
            raise OSError(f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        with open(place, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            self._start = file.tell()
        self._place, self._row_bytes = place, needed // shape[0]

    def __setitem__(self, rows, values):
        with open(self._place, "r+b") as file:
            file.seek(self._start + rows.start * self._row_bytes)
            file.write(np.ascontiguousarray(values))


def _mark(target):
    """Size, time of the last change and a digest of samples of the file ``target``."""
    found, samples = target.stat(), []
    with open(target, "rb") as file:
        for start in np.linspace(0, max(found.st_size - SAMPLE_BYTES, 0), SAMPLES, dtype=np.int64):
            file.seek(start)
            samples.append(file.read(SAMPLE_BYTES))
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "samples": digest(*samples)}


def _is_sound(target, note):
    try:
        return json.loads(note.read_text()) == _mark(target)
    except (OSError, ValueError):
        return False
