"""Folders that results go to: a run's own, which no other process writes, and those of measurements of a run."""

import contextlib
import fcntl
import itertools
import os
from datetime import datetime
from pathlib import Path

SUFFIX = ".safetensors"


def run_dir_for(output, resume, name, label):
    """The folder of a run: the resumed one, the one asked for, or one named after task, preset and time.

    Of several processes only the first names and makes it; the others hear of it in train.py. A run to resume that is
    not there is no folder to make.
    """
    if int(os.environ.get("RANK", 0)) > 0 or (resume and not Path(resume).is_dir()):
        return "."
    return resume or output or f"runs/{name}/{label}_{_now()}"


def sweep_dir_for(output):
    """The folder of a sweep."""
    return output or f"runs/multirun/{_now()}"


def _now():
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}"


@contextlib.contextmanager
def own_folder(path, *, key=None):
    """Hold the folder ``path`` until the block ends; if it is empty then, it is removed, and so is one it is alone in.

    key: what the user named it by. A folder that nobody named gives way to PATH_2 and so on, where another run has it
    or has been there; a named one raises ValueError.
    """
    for number in itertools.count(1):
        folder = Path(path) if number == 1 else Path(f"{path}_{number}")
        lock = _lock(folder)
        if lock is not None and (key or not any(folder.iterdir())):
            break
        if lock is not None:
            os.close(lock)
        elif key:
            raise ValueError(f"{key}: got {path}, in which another process works, allowed: another folder")
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # a start that failed leaves no folder
            folder.rmdir()
            if not key:
                folder.parent.rmdir()
        os.close(lock)


def _lock(folder):
    """A handle that holds ``folder``, made where it is missing; None while another process holds it.

    The system frees it when the process ends, also by a kill.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # its holder removes an empty one
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                return None
            except OSError:  # a disk without file locks: nobody can tell, and work goes on
                return handle
            if folder.exists() and os.path.samestat(os.stat(folder), os.fstat(handle)):
                return handle
            os.close(handle)


def results_folder(given, base, checkpoint):
    """The folder of a measurement of ``checkpoint`` (run or file), made: the one ``given``, or a new one in ``base``.

    A new one is named after run and file, with a number where there is one already: nothing is overwritten. A given
    one that holds results is said to.
    """
    if given is not None:
        if (given / "summary.json").exists():
            print(f"{given} holds results, which these will replace")
        given.mkdir(parents=True, exist_ok=True)
        return given
    name = result_name(checkpoint)
    for number in itertools.count(1):
        folder = Path(base) / (name if number == 1 else f"{name}_{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def result_name(checkpoint):
    """runs/pusht/A -> pusht_A, runs/pusht/A/checkpoints/B.safetensors -> pusht_A_B, pretrained/C.safetensors -> C."""
    path = Path(checkpoint)
    if path.suffix != SUFFIX:
        parts = path.resolve().parts
        below = [part for number, part in enumerate(parts) if "runs" in parts[:number] and part != "runs"]
        return "_".join(below or parts[-1:])
    if path.parent.name == "checkpoints":
        return f"{result_name(path.parent.parent)}_{path.name.removesuffix(SUFFIX)}"
    return path.name.removesuffix(SUFFIX)
