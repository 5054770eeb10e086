"""Decoded arrays in a cache folder: what is damaged is made again, and a full disk is one error that says the cure."""

import os
import resource
import shutil
from collections import namedtuple

import numpy as np
import pytest

from policy.dataset.cache import cached_map

ROWS = np.random.default_rng(0).integers(0, 256, (40, 30, 30), dtype=np.uint8)


def write(create):
    out = create(ROWS.shape, ROWS.dtype)
    for start in range(0, len(ROWS), 10):
        out[start : start + 10] = ROWS[start : start + 10]


def mapped(target):
    """(the map, whether it was made)."""
    made = []
    array = cached_map(target, "data/img", lambda create: (made.append(1), write(create)))
    assert isinstance(array, np.memmap) and not array.flags.writeable
    np.testing.assert_array_equal(array, ROWS, strict=True)
    return bool(made)


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1000]),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "half zeroed": lambda file: file.write_bytes(file.read_bytes()[:18000] + bytes(file.stat().st_size - 18000)),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "a bit": lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    "without note": lambda file: file.with_suffix(".json").unlink(),
    "another note": lambda file: file.with_suffix(".json").write_text("["),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("old_time", [False, True])
def test_what_is_not_as_it_was_written_is_made_again_and_named(tmp_path, capsys, damage, old_time):
    target = tmp_path / "cache" / "map.npy"
    assert mapped(target) and not mapped(target)
    assert capsys.readouterr().out == ""
    before = target.stat()
    DAMAGE[damage](target)
    if old_time:
        os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert mapped(target) and not mapped(target)
    assert str(target) in capsys.readouterr().out


def full(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))


def limited(monkeypatch):
    """A limit on the size of files stands for the disk that fills up while it is written to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("disk", [full, limited])
def test_a_disk_without_room_is_an_error_that_names_the_cure_and_leaves_nothing(tmp_path, monkeypatch, disk):
    target = tmp_path / "cache" / "map.npy"
    restore = disk(monkeypatch)
    try:
        with pytest.raises(OSError, match="cache_dir.*storage=ram") as caught:
            cached_map(target, "data/img", write)
    finally:
        if restore:
            restore()
    assert str(target.parent) in str(caught.value) and list(target.parent.iterdir()) == []


def test_a_folder_that_cannot_be_made_names_the_cure(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(OSError, match="cache_dir.*storage=ram"):
        cached_map(tmp_path / "cache" / "map.npy", "data/img", write)
