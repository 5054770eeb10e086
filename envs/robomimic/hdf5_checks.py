"""HDF5 files that others made, checked: a copy of policy/dataset/robomimic/hdf5_checks.py.

The packages do not import each other; tests/test_files.py compares the two.
"""

import contextlib
import math
import os
import resource
import signal
import subprocess
import sys
import zlib

import h5py

LARGE, RATIO = 1 << 30, 2000  # bytes from which on a data set may not be so many times larger than what is stored of it
SLACK = 1 << 28  # bytes that any chunk may decompress to
SECONDS, MEMORY = 5, 4 << 30  # of the CPU (and 2 for each GB of the file) and bytes, to look through a file


def probe(path):
    """Look through the HDF5 ``path`` in a process of its own, as damage makes the library loop for ever or crash.

    Raises ValueError where it does; whatever else is wrong is left to the reader.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # each would reserve memory
    # -P: beside this file lie modules whose names h5py might look for.
    command = [sys.executable, "-P", __file__, str(path)]
    code = subprocess.run(command, env=os.environ | threads, capture_output=True, check=False).returncode
    if code < 0:
        does = "never ends" if code == -signal.SIGXCPU else f"dies of {signal.Signals(-code).name}"
        raise ValueError(f"{path}: got a file on which the HDF5 library {does}, allowed: a whole HDF5")


def _look_through(path):
    """Read all that leads to the numbers in the file: links, attributes, words and lists of chunks."""
    seconds = SECONDS + (os.path.getsize(path) >> 29)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with h5py.File(path, "r") as file:
        for where, item in _walk(file, path):
            with contextlib.suppress(Exception):  # what cannot be read here may never be read
                for name in item.attrs:
                    with contextlib.suppress(Exception):
                        item.attrs[name]
            if isinstance(item, h5py.Dataset):
                with contextlib.suppress(Exception):
                    check_stored(item, where)
                    if item.dtype.kind == "O":
                        item[()]


def check_own(file, path):
    """Refuse links to other files and data sets kept in others, anywhere in ``file``; ValueError names them."""
    for _ in _walk(file, path):
        pass


def _walk(file, path):
    """Yield (name for messages, object) of everything in ``file``, checked to lie in it."""
    yield path, file
    groups, seen = [file], set()
    while groups:
        group = groups.pop()
        for name in group:
            where = f"{path}: {group.name.rstrip('/')}/{name}"
            link = group.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                raise ValueError(f"{where}: got a link to the file {link.filename!r}, allowed: data in this file")
            if isinstance(link, h5py.SoftLink):  # to something of this file, which is looked at in its own place
                continue
            item = group[name]
            if isinstance(item, h5py.Dataset):
                _check_inside(item, where)
            yield where, item
            if isinstance(item, h5py.Group):
                identity = h5py.h5o.get_info(item.id)
                if (identity.fileno, identity.addr) not in seen:  # groups may hold themselves
                    seen.add((identity.fileno, identity.addr))
                    groups.append(item)


def _check_inside(dataset, where):
    if dataset.is_virtual:
        names = ", ".join(repr(source.file_name) for source in dataset.virtual_sources())
        raise ValueError(f"{where}: got a virtual data set of {names}, allowed: data in this file")
    if dataset.external:
        names = ", ".join(repr(name) for name, *_ in dataset.external)
        raise ValueError(f"{where}: got a data set kept in {names}, allowed: data in this file")


def check_stored(dataset, where):
    """Refuse what reads as zeros because it was never written, and what decompresses to more than it may be."""
    if not dataset.nbytes:
        return
    stored, count = dataset.id.get_storage_size(), 1
    if dataset.chunks:
        count = math.prod(-(-size // part) for size, part in zip(dataset.shape, dataset.chunks, strict=True))
        written = dataset.id.get_num_chunks()
    else:
        written = int(stored >= dataset.nbytes)
    if written < count:
        raise ValueError(f"{where}: got {written:,} of {count:,} chunks, allowed: all (a writer that was stopped?)")
    if dataset.nbytes > LARGE and dataset.nbytes > RATIO * stored:
        raise ValueError(
            f"{where}: got shape {dataset.shape}, {dataset.nbytes / 1e9:,.0f} GB, of {stored / 1e6:.3g} MB that are"
            f" stored, allowed: {RATIO} times what is stored"
        )
    if dataset.compression == "gzip":
        _check_chunks(dataset, 2 * math.prod(dataset.chunks) * dataset.dtype.itemsize + SLACK, where)


def _check_chunks(dataset, limit, where):
    """Refuse chunks of gzip that become more than ``limit`` bytes; deflate never gains more than 1032 times."""
    large = []

    def note(chunk):
        if chunk.size * 1032 > limit:
            large.append(chunk.chunk_offset)

    dataset.id.chunk_iter(note)
    for offset in large:
        _, content = dataset.id.read_direct_chunk(offset)
        try:
            found = len(zlib.decompressobj().decompress(content, limit + 1))
        except zlib.error:  # the library says it better
            continue
        if found > limit:
            raise ValueError(f"{where}: got a chunk of more than {limit:,} bytes when decompressed, at {offset}")


if __name__ == "__main__":
    _look_through(sys.argv[1])
