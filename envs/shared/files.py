"""Files and folders that appear whole or not at all, locks between processes, and digests: a copy of policy/files.py.

The packages do not import each other; tests/test_files.py tests both and compares them.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from pathlib import Path

PARTIAL = re.compile(r".+\.partial-[0-9a-f]{12}")


@contextlib.contextmanager
def whole(path, *, shared=False):
    """A place for a file or folder that moves to ``path`` when the block ends without an error.

    The place has the name of ``path`` and lies in a folder of its own, PATH.partial-RANDOM, which is locked while its
    writer lives. The next writer beside it clears away what killed ones left. A file is flushed to the disk before it
    moves.

    shared: several processes may write the folder ``path`` at once: the first one's stays. Raises OSError where the
    disk refuses; ``path`` then stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(path.parent)
    with _private_folder(path) as folder:
        place = folder / path.name
        yield place
        if place.is_file():
            with open(place, "rb") as file:
                os.fsync(file.fileno())
        try:
            os.replace(place, path)
        except OSError:
            if not (shared and path.is_dir()):  # else another process was faster
                raise


@contextlib.contextmanager
def _private_folder(path):
    """A new folder beside ``path``, with a file in it that this process keeps locked; both are gone at the end."""
    while True:
        folder = path.with_name(f"{path.name}.partial-{secrets.token_hex(6)}")
        folder.mkdir()
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                lock = stack.enter_context(open(folder / "lock", "w"))
                with contextlib.suppress(OSError):  # a disk without locks, on which nothing is ever cleared away
                    fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / "lock").exists():  # else another writer took the folder for abandoned before it was locked
                yield folder
                return


def _clear_abandoned(parent):
    """Remove the folders in ``parent`` that ``whole`` made and whose writer is dead: nobody holds their lock."""
    for folder in (parent / name for name in os.listdir(parent) if PARTIAL.fullmatch(name)):
        with contextlib.suppress(OSError):
            if not (folder / "lock").exists():
                folder.rmdir()  # of a writer that died before it could lock it, and then empty
                continue
            with open(folder / "lock", "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


def write_whole(path, content):
    """Write text or bytes to ``path``; a reader finds all of it or what was there before."""
    with whole(path) as place:
        place.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def locked(folder):
    """Hold ``folder``, made if need be, while other processes wait; whoever holds it may remove it.

    The system frees it when the process ends, also by a kill.
    """
    path = Path(folder) / "lock"
    with contextlib.ExitStack() as stack:
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the holder before may remove the folder at any moment
                lock = stack.enter_context(open(path, "w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(f"waiting for another process that works on {folder}")
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if os.path.samestat(os.stat(path), os.fstat(lock.fileno())):
                    break
        yield


def digest(*parts):
    """sha256, hexadecimal, of the parts one after the other: files (Path), text, bytes and arrays."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                hashlib.file_digest(file, lambda: found)
        elif isinstance(part, str):
            found.update(part.encode())
        else:
            found.update(part if isinstance(part, bytes) else part.tobytes())
    return found.hexdigest()
