"""zarr groups that others made: what is missing, damaged or larger than it may be is said before memory is spent."""

import bz2
import gzip
import io
import lzma
import math
import os
import re
import stat
import zipfile
import zlib
from pathlib import Path

import numpy as np
import zarr

MOST_CHUNKS = 4_000_000
SLACK = 16 << 20  # bytes that any chunk may decompress to
LARGE, RATIO = 1 << 30, 2000  # bytes from which on an array may not be so many times larger than what is stored of it
ARRAY = (".zarray", "zarr.json")  # what describes an array in formats 2 and 3
METADATA = (*ARRAY, ".zattrs", ".zgroup", ".zmetadata")
PACKAGES = {  # of codecs that numcodecs and zarr do not bring: {beginning of the name: {zarr format: packages}}
    "imagecodecs_": {2: "imagecodecs imagecodecs-numcodecs", 3: "imagecodecs imagecodecs-zarr"},
    "pcodec": {2: '"numcodecs[pcodec]"', 3: '"numcodecs[pcodec]"'},
    "zfpy": {2: '"numcodecs[zfpy]"', 3: '"numcodecs[zfpy]"'},
}


def open_zarr(path):
    """The group at ``path`` (folder or .zip), for reading.

    Raises FileNotFoundError for a missing path and ValueError for anything that is not such a group.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data set: got {path}, which does not exist")
    try:
        store = _ZipFile(path) if path.suffix == ".zip" else _Folder(path)
        return zarr.open_group(store, mode="r")
    except Exception as error:  # zarr, zipfile and json each have their own ways to fail on a broken store
        raise ValueError(f"{path}: got something that is not a readable zarr group ({error})") from error


def find_array(root, name, path):
    """The array called ``name`` of the group ``root`` from ``open_zarr(path)``, None where there is none."""
    try:
        node = root.get(name)
    except Exception as error:  # json and zarr each have their own ways to fail on a broken description
        message = " ".join(str(error).split()) or type(error).__name__
        cure = _install_line(message, root.metadata.zarr_format)
        raise ValueError(f"{path}: {name}: got a description that cannot be read ({message}){cure}") from error
    return node if isinstance(node, zarr.Array) else None


def array_names(root, group):
    """Names of the arrays, readable or not, of the group called ``group`` of ``root``."""
    names = root.store.names(group)
    return sorted(name for name in names if any(root.store.size(f"{group}/{name}/{file}") for file in ARRAY))


def _install_line(message, zarr_format):
    """What to install, where a codec is missing."""
    for name, packages in PACKAGES.items():
        codec = re.search(rf"\b{name}\w*", message)
        if codec:
            return f", allowed with the codec {codec[0]} installed: pip install {packages[zarr_format]}"
    return ", allowed: with the package that brings this codec" if "codec" in message else ""


def check_array(array, path, *, fills=False, cure=""):
    """Compare what ``array`` declares with what is stored of it; returns how many of its chunks are not stored.

    zarr reads a chunk that is not stored as the fill value: a truncated copy would train on black images. fills: that
    may be meant, as zarr 3 leaves out chunks of zeros; cure: what the error says to do about it. Raises ValueError.
    """
    name = f"{path}: {array.path}"
    outer = array.shards or array.chunks
    if not array.shape or min(*array.shape, *outer) < 1:
        raise ValueError(f"{name}: got shape {array.shape} in chunks of {outer}, allowed: at least 1 frame")
    count = math.prod(_grid(array))
    if count > MOST_CHUNKS:
        raise ValueError(f"{name}: got shape {array.shape}, of {count:,} chunks, allowed: {MOST_CHUNKS:,}")
    sizes = (array.store.size(key) for key in chunk_keys(array))
    stored = [size for size in sizes if size is not None]
    missing = count - len(stored)
    if missing and (not fills or not stored or array.fill_value is None):
        raise ValueError(f"{name}: got {len(stored):,} of {count:,} chunks, allowed: all (a truncated copy?){cure}")
    size = math.prod(array.shape) * array.dtype.itemsize
    if size > LARGE and size > RATIO * sum(stored):
        raise ValueError(
            f"{name}: got shape {array.shape}, {size / 1e9:,.0f} GB, of {sum(stored) / 1e6:.3g} MB that are stored,"
            f" allowed: {RATIO} times what is stored"
        )
    if array.shards is None:
        limit = 2 * math.prod(outer) * array.dtype.itemsize + SLACK
        array.store.limits[array.path] = [_name(codec) for codec in reversed(array.compressors)], limit
    return missing


def _grid(array):
    """How many chunks (shards, where there are) lie along each axis."""
    return [-(-size // part) for size, part in zip(array.shape, array.shards or array.chunks, strict=True)]


def chunk_keys(array):
    """Yield the names in the store of all chunks (shards, where there are)."""
    for at in np.ndindex(*_grid(array)):
        yield f"{array.path}/{array.metadata.encode_chunk_key(at)}"


def _name(codec):
    config = codec.to_dict() if hasattr(codec, "to_dict") else codec.get_config()
    return config.get("id", config.get("name")).removeprefix("numcodecs.")


def read_array(array, path, selection=slice(None), **options):
    """``selection`` of a checked array; ValueError for a chunk that cannot be decoded."""
    try:
        return array.get_basic_selection(selection, **options)
    except Exception as error:  # codecs raise whatever their C library does
        raise ValueError(f"{path}: {array.path}: got a chunk that cannot be decoded ({error})") from error


def free_memory():
    """Bytes of memory that are free, infinite where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return math.inf
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1])


# Stores ------------------------------------------------------------------------------------------------------------


class _Guarded(zarr.storage.WrapperStore):
    """A store whose chunks cannot decompress to far more than their array declares.

    limits: {path of an array: (names of its compressors, the last first, and bytes that a chunk may become)}.
    """

    def __init__(self, store):
        super().__init__(store)
        self.limits = {}

    async def get(self, key, prototype, byte_range=None):
        value = await self._store.get(key, prototype, byte_range)
        if value is not None and not key.endswith(METADATA):
            for path, (codecs, limit) in self.limits.items():
                if key.startswith(f"{path}/") and exceeds(codecs, value.to_bytes(), limit):
                    raise ValueError(f"{key}: more than {limit:,} bytes when decompressed")
        return value


class _Folder(_Guarded):
    def __init__(self, path):
        super().__init__(zarr.storage.LocalStore(str(path), read_only=True))
        self._path = path

    def size(self, key):
        """Bytes of what is stored as ``key``, None for nothing."""
        try:
            found = os.stat(self._path / key)
        except OSError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def names(self, group):
        """Names of what lies in the folder ``group``."""
        return os.listdir(self._path / group) if (self._path / group).is_dir() else []


class _ZipFile(_Guarded):
    def __init__(self, path):
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
        for member in members:
            if member.file_size > max(LARGE / 16, 100 * member.compress_size):
                raise ValueError(f"{member.filename}: got {member.file_size:,} bytes in {member.compress_size:,}")
        super().__init__(zarr.storage.ZipStore(str(path), mode="r"))
        self._sizes = {member.filename: member.file_size for member in members}

    def size(self, key):
        """Bytes of what is stored as ``key``, None for nothing."""
        return self._sizes.get(key)

    def names(self, group):
        """Names of what lies in the folder ``group``."""
        return {name.split("/")[1] for name in self._sizes if name.startswith(f"{group}/")}


def exceeds(codecs, data, limit):
    """Whether ``data`` decompresses to more than ``limit`` bytes; False where no codec tells beforehand."""
    for name in codecs:  # checksums stand behind what they are of, so that it begins as it would without
        if name in _SIZES:
            return _SIZES[name](data, limit) > limit
    return False


def _streamed(reader):
    """A function that tells the size of data by reading it, up to the limit."""

    def size(data, limit):
        try:
            return len(reader(io.BytesIO(data)).read(limit + 1))
        except (OSError, EOFError, lzma.LZMAError):  # the decoder says it better
            return 0

    return size


def _deflated(size):
    """As ``size``, where it can matter: deflate never gains more than 1032 times."""
    return lambda data, limit: size(data, limit) if len(data) * 1032 > limit else 0


def _zlib_size(data, limit):
    try:
        return len(zlib.decompressobj().decompress(data, limit + 1))
    except zlib.error:  # the decoder says it better
        return 0


def _zstd_size(data, _limit):
    """Bytes that a zstd frame says to hold (RFC 8878, section 3.1.1.1), 0 where it does not say."""
    if len(data) < 5:
        return 0
    descriptor = data[4]
    single = descriptor >> 5 & 1
    start = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    width = (single, 2, 4, 8)[descriptor >> 6]
    return int.from_bytes(data[start : start + width], "little") + 256 * (width == 2)


_SIZES = {  # codec: bytes that data decompresses to, as far as its header or its first bytes tell
    "blosc": lambda data, _limit: int.from_bytes(data[4:8], "little"),
    "lz4": lambda data, _limit: int.from_bytes(data[:4], "little"),
    "zstd": _zstd_size,
    "zlib": _deflated(_zlib_size),
    "gzip": _deflated(_streamed(lambda file: gzip.GzipFile(fileobj=file))),
    "bz2": _streamed(bz2.BZ2File),
    "lzma": _streamed(lzma.LZMAFile),
}
