"""Fetch a published data set: python -m policy.dataset.download pusht|lift_ph|... [--output data]

An interrupted download goes on where it stopped. What was downloaded appears at its place only when complete. Without a
network, the last line says what to fetch by hand and where it belongs.
"""

import argparse
import fcntl
import os
import shutil
import sys
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import h5py

from policy.files import whole
from policy.registry import lookup


class DataSet(NamedTuple):
    """An HDF5 at ``url``, which belongs at ``place`` under --output, or a .zip with a file or folder of that path."""

    url: str
    place: str


def robomimic(task, kind):
    """Demonstrations of robomimic (arXiv 2108.03298) with the states of the simulator, made for robosuite 1.5."""
    name = f"{task}/{kind}/demo_v15.hdf5"
    hub = "https://huggingface.co/datasets/robomimic/robomimic_datasets/resolve/main/v1.5"
    return DataSet(f"{hub}/{name}", f"robomimic/{name}")


DATA_SETS = {
    # Published by Diffusion Policy (arXiv 2303.04137).
    "pusht": DataSet(
        "https://diffusion-policy.cs.columbia.edu/data/training/pusht.zip", "pusht/pusht_cchi_v7_replay.zarr"
    ),
    # One proficient human (ph) or several of mixed skill (mh).
    **{f"{task}_ph": robomimic(task, "ph") for task in ("lift", "can", "square", "transport", "tool_hang")},
    **{f"{task}_mh": robomimic(task, "mh") for task in ("lift", "can", "square", "transport")},
}


def fetch(url, partial):
    """Download ``url`` to the file ``partial``, after the bytes that an earlier, interrupted call left there.

    A broken connection is tried again a few times. Whatever is raised in the end, ``partial`` stays.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get  # from any server

    with open(partial, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else the bytes of two would be mixed
        except BlockingIOError as error:
            raise OSError("another process is fetching it") from error
        done = file.tell()
        try:
            http_get(url, file, resume_size=done)
        except HfHubHTTPError as error:
            if not (done and error.response.status_code == 416):  # nothing comes after our last byte
                raise


def unpack(archive, member, target):
    """Put the file or folder ``member`` of the zip file ``archive`` at ``target``, all of it or nothing.

    Raises ValueError for a file that is no zip, is damaged or lacks ``member``, and OSError without room for it.
    """
    with whole(target, shared=True) as place:
        folder = place.with_name("archive")
        try:
            with zipfile.ZipFile(archive) as file:
                needed = sum(member.file_size for member in file.infolist())
                free = shutil.disk_usage(place.parent).free
                if needed > free:
                    raise OSError(
                        f"{target}: got {free / 1e9:.2f} GB free, allowed: {needed / 1e9:.2f} GB to unpack it"
                    )
                file.extractall(folder)  # compares checksums, and writes nothing outside of the folder
                top = sorted({name.split("/")[0] for name in file.namelist()})
        except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{archive}: got a file that is not a whole zip ({error}), allowed: a zip") from error
        if not (folder / member).exists():
            raise ValueError(f"{archive}: got {', '.join(top) or 'nothing'}, allowed: a zip that holds {member}")
        os.replace(folder / member, place)


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
    url, place = lookup("data set", name, DATA_SETS)
    target, packed = Path(output) / place, url.endswith(".zip")
    if target.exists():
        return target, True
    partial = target.with_name(f"{target.name}.download")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetch(url, partial)
    except Exception as error:  # of whichever HTTP library huggingface_hub uses
        raise OSError(
            f"{url}: cannot be fetched ({error or type(error).__name__}); run this again to go on, or fetch it"
            f" elsewhere and {f'unpack it so that {target} exists' if packed else f'put it at {target}'}"
        ) from error
    try:
        if packed:
            unpack(partial, place, target)
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
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"already there: {path}" if present else f"wrote {path}")
    if path.suffix == ".hdf5":
        images = path.with_name(path.name.replace("demo", "image"))
        print(f"it holds no images; to render them: python -m envs.robomimic_images {path} {images}")


if __name__ == "__main__":
    main()
