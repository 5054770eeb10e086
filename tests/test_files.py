"""Atomic writes, locks and digests of policy/files.py and of its copy for simulators."""

import hashlib
import inspect
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT

import envs.robomimic.hdf5_checks
import envs.shared.files
import envs.shared.numba_cache
import envs.shared.zarr_checks
import policy.dataset.robomimic.hdf5_checks
import policy.dataset.zarr_checks
import policy.files
import policy.kernels.numba_cache

BOTH = pytest.mark.parametrize("files", [policy.files, envs.shared.files], ids=["policy", "envs"])
COPIES = [
    (policy.files, envs.shared.files),
    (policy.dataset.zarr_checks, envs.shared.zarr_checks),
    (policy.dataset.robomimic.hdf5_checks, envs.robomimic.hdf5_checks),
    (policy.kernels.numba_cache, envs.shared.numba_cache),
]


@pytest.mark.parametrize("modules", COPIES, ids=lambda modules: modules[1].__name__)
def test_the_copies_are_the_same(modules):
    first, second = (inspect.getsource(module).removeprefix(f'"""{module.__doc__}"""') for module in modules)
    assert first == second


@BOTH
def test_a_file_appears_whole_or_not_at_all(files, tmp_path):
    path = tmp_path / "sub" / "file.txt"
    files.write_whole(path, "first")
    with pytest.raises(KeyboardInterrupt), files.whole(path) as place:
        place.write_text("half")
        assert place.name == path.name and path.read_text() == "first"
        raise KeyboardInterrupt
    assert path.read_text() == "first"
    files.write_whole(path, b"second")
    assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


@BOTH
def test_a_folder_appears_whole_and_the_first_of_several_writers_wins(files, tmp_path):
    path = tmp_path / "folder"
    for content in ("first", "second"):
        with files.whole(path, shared=True) as place:
            place.mkdir()
            (place / "file").write_text(content)
    assert (path / "file").read_text() == "first" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError), files.whole(path) as place:
        place.mkdir()
    assert (path / "file").read_text() == "first" and list(tmp_path.iterdir()) == [path]


@BOTH
def test_the_next_writer_clears_away_what_a_killed_one_left(files, tmp_path):
    path = tmp_path / "file"
    program = (
        f"import os, sys; from {files.__name__} import whole\n"
        "with whole(sys.argv[1]) as place:\n"
        "    place.write_text('half'); os.kill(os.getpid(), 9)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT)
    assert result.returncode == -signal.SIGKILL and not path.exists() and len(list(tmp_path.iterdir())) == 1
    files.write_whole(tmp_path / "other", "whole")  # whatever its name
    assert list(tmp_path.iterdir()) == [tmp_path / "other"]


@BOTH
def test_writers_at_once_do_not_meet_and_only_what_is_abandoned_goes(files, tmp_path):
    path, theirs = tmp_path / "file", tmp_path / "thesis.partial-0123456789ab"
    theirs.mkdir()
    (theirs / "chapter").touch()
    (tmp_path / "file.partial-0123456789ab").mkdir()  # of a writer that was killed in its first moment
    with files.whole(path) as first, files.whole(path) as second:
        first.write_text("first")
        second.write_text("second")
        files.write_whole(tmp_path / "other", "other")
        assert first.read_text() == "first" and second.read_text() == "second"
    assert path.read_text() == "first" and sorted(tmp_path.iterdir()) == [path, tmp_path / "other", theirs]
    assert list(theirs.iterdir()) == [theirs / "chapter"]


@BOTH
def test_a_lock_is_held_by_one_and_freed_by_a_kill(files, tmp_path):
    """Threads stand for processes in the first half: the lock belongs to the open file."""
    folder, inside, most = tmp_path / "folder", [], []

    def work():
        with files.locked(folder):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()
            if len(most) % 2:
                (folder / "lock").unlink()  # a holder may remove everything
                folder.rmdir()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6

    program = (
        f"import sys, time; from {files.__name__} import locked\n"
        "with locked(sys.argv[1]):\n"
        "    print('held', flush=True); time.sleep(100)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    waiter = threading.Thread(target=work)
    waiter.start()
    time.sleep(0.1)
    assert len(most) == 6
    holder.kill()
    holder.communicate()
    waiter.join(timeout=10)
    assert len(most) == 7


@BOTH
def test_errors_inside_a_lock_pass(files, tmp_path):
    with pytest.raises(FileNotFoundError), files.locked(tmp_path / "folder"):
        raise FileNotFoundError


@BOTH
def test_a_digest_is_the_sha256_of_the_parts_joined(files, tmp_path):
    path, array = tmp_path / "file", np.asfortranarray(np.arange(6.0).reshape(2, 3))
    path.write_bytes(b"content" * 300_000)
    joined = "ä".encode() + path.read_bytes() + b"bytes" + array.tobytes()
    assert files.digest("ä", Path(path), b"bytes", array) == hashlib.sha256(joined).hexdigest()
    assert files.digest() == hashlib.sha256().hexdigest()
