"""Fetch a published data set: python -m policy.dataset.download pusht|lift_ph|... [--output data]

An interrupted download goes on where it stopped; what was downloaded appears at its place only when complete. Without
a network, one line says what to fetch by hand and where it belongs.
"""

import argparse
import http.client
import os
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import h5py
from tqdm import tqdm

from policy.registry import lookup

TIMEOUT = 30  # s without a single byte
BLOCK_BYTES = 1 << 20


class Archive(NamedTuple):
    """A zip file at ``url``, of which the file or folder ``member`` is wanted, at the same place under --output."""

    url: str
    member: str


class Hdf5(NamedTuple):
    """The HDF5 file at ``url``, which belongs at ``member`` under --output."""

    url: str
    member: str


def robomimic(task, kind):
    """Demonstrations of robomimic (arXiv 2108.03298) with the states of the simulator, made for robosuite 1.5."""
    name = f"{task}/{kind}/demo_v15.hdf5"
    return Hdf5(
        url=f"https://huggingface.co/datasets/robomimic/robomimic_datasets/resolve/main/v1.5/{name}",
        member=f"robomimic/{name}",
    )


DATA_SETS = {
    # Published by Diffusion Policy (arXiv 2303.04137).
    "pusht": Archive(
        url="https://diffusion-policy.cs.columbia.edu/data/training/pusht.zip",
        member="pusht/pusht_cchi_v7_replay.zarr",
    ),
    # One proficient human (ph) or several of mixed skill (mh).
    **{f"{task}_ph": robomimic(task, "ph") for task in ("lift", "can", "square", "transport", "tool_hang")},
    **{f"{task}_mh": robomimic(task, "mh") for task in ("lift", "can", "square", "transport")},
}


def fetch(url, partial):
    """Download ``url`` to the file ``partial``, after the bytes that an earlier, interrupted call left there.

    Raises OSError or http.client.HTTPException when the connection fails or ends early; ``partial`` then stays.
    """
    done = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing comes after our last byte: the file is whole, or not this one
            return
        raise
    with response:
        if response.status != 206:  # the server sends everything again
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        with (
            open(partial, "ab" if done else "wb") as file,
            tqdm(total=total, initial=done, desc=url.rsplit("/", 1)[-1], unit="B", unit_scale=True) as bar,
        ):
            while block := response.read(BLOCK_BYTES):
                file.write(block)
                bar.update(len(block))
            received = file.tell()
    if total is not None and received != total:
        raise ConnectionError(f"the connection ended after {received} of {total} bytes")


def unpack(archive, member, target):
    """Put the file or folder ``member`` of the zip file ``archive`` at ``target``, all of it or nothing.

    Raises ValueError for a file that is no zip, is damaged, lacks ``member``, or names paths outside of itself.
    """
    partial = target.with_name(f"{target.name}.partial{os.getpid()}")
    try:
        with zipfile.ZipFile(archive) as file:
            entries = [e for e in file.infolist() if e.filename == member or e.filename.startswith(f"{member}/")]
            for entry in entries:
                _check_inside(entry.filename, archive)
            if all(entry.is_dir() for entry in entries):
                top = sorted({name.split("/")[0] for name in file.namelist()})
                raise ValueError(f"{archive}: got {', '.join(top) or 'nothing'}, allowed: a zip that holds {member}")
            for entry in tqdm(entries, desc="unpacking", unit="file", leave=False):
                place = Path(f"{partial}{entry.filename.removeprefix(member)}")
                if entry.is_dir():
                    place.mkdir(parents=True, exist_ok=True)
                    continue
                place.parent.mkdir(parents=True, exist_ok=True)
                with file.open(entry) as source, open(place, "wb") as out:
                    shutil.copyfileobj(source, out)  # verifies the checksum at the end
        if not target.exists():  # another process may have been faster
            os.replace(partial, target)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{archive}: got a file that is not a whole zip ({error}), allowed: a zip") from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def _check_inside(name, archive):
    """Refuse entry names that would be written outside of the folder they are unpacked into."""
    if ".." in PurePosixPath(name).parts or "\\" in name:
        raise ValueError(f"{archive}: got the entry {name!r}, allowed: paths inside the archive")


def put(file, target):
    """Move the HDF5 ``file`` to ``target``; raises ValueError for a file that is none or is cut off."""
    try:
        h5py.File(file, "r").close()
    except OSError as error:
        raise ValueError(f"{file}: got a file that is not a whole HDF5 ({error}), allowed: an HDF5") from error
    os.replace(file, target)


def download(name, output):
    """Bring the data set ``name`` under the folder ``output``; returns (its path, whether it was there already).

    Raises ValueError for an unknown name or a bad file and OSError when it cannot be fetched.
    """
    entry = lookup("data set", name, DATA_SETS)
    target = Path(output) / entry.member
    if target.exists():
        return target, True
    is_archive = isinstance(entry, Archive)
    partial = Path(output) / f"{name}.zip.partial" if is_archive else target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetch(entry.url, partial)
    except (OSError, http.client.HTTPException) as error:
        by_hand = f"unpack it so that {target} exists" if is_archive else f"put it at {target}"
        raise OSError(
            f"{entry.url}: cannot be fetched ({error or type(error).__name__}); run this again to go on, or fetch it"
            f" elsewhere and {by_hand}"
        ) from error
    try:
        if is_archive:
            unpack(partial, entry.member, target)
        else:
            put(partial, target)
    except ValueError as error:
        partial.unlink()  # going on from it would fail in the same way
        raise ValueError(f"{error}; it was removed, run this again to start afresh") from error
    partial.unlink(missing_ok=True)
    return target, False


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m policy.dataset.download", description=__doc__.split("\n")[0])
    parser.add_argument("name", help=f"which one: {', '.join(DATA_SETS)}")
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder of the data sets, default: data")
    args = parser.parse_args(argv)
    try:
        path, present = download(args.name, args.output)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"already there: {path}" if present else f"wrote {path}")
    if isinstance(DATA_SETS[args.name], Hdf5):
        images = path.with_name(path.name.replace("demo", "image"))
        print(f"it holds no images; to render them: python -m envs.robomimic_images {path} {images}")


if __name__ == "__main__":
    main()
