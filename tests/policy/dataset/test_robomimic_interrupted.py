"""Conversions of robomimic files that are killed, repeated, asked for at once, or meet a full disk."""

import os
import resource
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from paths import ROOT
from robomimic_files import CAMERAS, call, each, make_hdf5, read

from policy.dataset.robomimic import conversion as robomimic
from policy.dataset.robomimic.conversion import convert, ensure_zarr


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


KILLED = """
import json, os, signal, sys
import policy.dataset.robomimic.conversion as robomimic
robomimic.BLOCK_BYTES = 1
save = robomimic.write_whole
def save_and_die(path, content):
    save(path, content)
    if json.loads(content)["frames"] == 128:
        os.kill(os.getpid(), signal.SIGKILL)
robomimic.write_whole = save_and_die
robomimic.convert(sys.argv[1], sys.argv[2])
"""


def interrupted(source, output):
    """A conversion killed after 128 frames; returns the folder it leaves."""
    result = subprocess.run([sys.executable, "-c", KILLED, source, output], cwd=ROOT, capture_output=True, check=False)
    assert result.returncode == -9 and not output.exists()
    return output.with_name(f"{output.name}.partial")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(source, interrupted conversion, folder) to copy from."""
    folder = tmp_path_factory.mktemp("killed")
    source = make_hdf5(folder / "in.hdf5", lengths=(100, 150, 50))
    return source, interrupted(source, folder / "out.zarr")


@pytest.mark.slow
def test_a_killed_conversion_goes_on_where_it_stopped(killed, tmp_path, capsys):
    source, left = killed
    partial = shutil.copytree(left, tmp_path / "out.zarr.partial")
    chunks = [partial / "zarr" / "data" / name / f"{chunk}.0.0.0" for name in CAMERAS for chunk in (0, 1)]
    before = [chunk.stat().st_mtime_ns for chunk in chunks]
    assert not (partial / "zarr/data" / CAMERAS[0] / "2.0.0.0").exists()
    code, out, errors = call(capsys, source, tmp_path / "out.zarr")
    assert (code, errors) == (0, []) and "after 128 of 300 frames" in out and not partial.exists()
    assert [(tmp_path / "out.zarr" / c.relative_to(partial / "zarr")).stat().st_mtime_ns for c in chunks] == before
    convert(source, tmp_path / "whole.zarr")
    assert contents(tmp_path / "out.zarr") == contents(tmp_path / "whole.zarr")


@pytest.mark.parametrize("change", ["source", "options"])
def test_another_source_or_other_options_start_afresh(killed, tmp_path, capsys, change):
    source, left = killed
    shutil.copytree(left, tmp_path / "out.zarr.partial")
    if change == "source":
        source = make_hdf5(tmp_path / "in.hdf5", lengths=(100, 150, 50), seed=1)
    kind = "absolute" if change == "source" else "recorded"
    code, out, _ = call(capsys, source, tmp_path / "out.zarr", "--actions", kind)
    assert code == 0 and "starting afresh" in out
    assert contents(tmp_path / "out.zarr") == contents(convert(source, tmp_path / "whole.zarr", actions=kind))


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, capsys):
    (tmp_path / "out.zarr.partial").mkdir()
    (tmp_path / "out.zarr.partial" / "thesis.tex").touch()
    code, _, (error,) = call(capsys, make_hdf5(tmp_path / "in.hdf5"), tmp_path / "out.zarr")
    assert code == 1 and "thesis.tex" in error and (tmp_path / "out.zarr.partial" / "thesis.tex").exists()


def test_what_is_there_stays_and_something_else_is_refused(tmp_path, capsys):
    source, output = make_hdf5(tmp_path / "in.hdf5"), tmp_path / "out.zarr"
    assert call(capsys, source, output)[0] == 0
    before = contents(output)
    code, out, _ = call(capsys, source, output)
    assert code == 0 and f"already there: {output}" in out
    for words in ("3 episodes, 15 frames", "action float32 (10,)", "image uint8 (8, 8, 3)", "state float64 (32,)"):
        assert words in out
    for arguments in ((source, output, "--actions", "recorded"), (make_hdf5(tmp_path / "b.hdf5", seed=1), output)):
        code, _, (error,) = call(capsys, *arguments)
        assert code == 1 and f"output: got {output}" in error
    (tmp_path / "folder").mkdir()
    assert "got" in call(capsys, source, tmp_path / "folder")[2][0]
    assert contents(output) == before


def test_a_full_disk_is_one_line_and_can_be_resumed(tmp_path, capsys, monkeypatch):
    """A limit on the size of files stands for the disk: the second chunk, of noise, exceeds it."""
    monkeypatch.setattr(robomimic, "BLOCK_BYTES", 1)
    black = np.zeros((64, 64, 64, 3), np.uint8)
    calm = each(lambda demo: [demo[f"obs/{name}"].write_direct(black, np.s_[:], np.s_[:64]) for name in CAMERAS])
    source = make_hdf5(tmp_path / "in.hdf5", lengths=(80,), size=64, edit=calm)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        code, _, errors = call(capsys, source, tmp_path / "out.zarr")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and len(errors) == 1 and not (tmp_path / "out.zarr").exists()
    assert "out.zarr.partial" in errors[0] and "File too large" in errors[0]
    code, out, _ = call(capsys, source, tmp_path / "out.zarr")
    assert code == 0 and "after 64 of 80 frames" in out


def test_the_cache_notices_a_changed_source(tmp_path, capsys):
    source, cache = make_hdf5(tmp_path / "in.hdf5"), tmp_path / "cache"
    first = ensure_zarr(source, cache)
    assert ensure_zarr(source, cache) == first and ensure_zarr(source, cache, actions="recorded") != first
    assert capsys.readouterr().out.count("converting 15 frames") == 2
    stamp = source.stat()
    make_hdf5(source, seed=1)
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    second = ensure_zarr(source, cache)
    assert second != first and first.exists() and sorted(cache.iterdir()) == sorted({*cache.iterdir(), first, second})
    images = zarr.open_group(str(second), mode="r")[f"data/{CAMERAS[0]}"][:]
    np.testing.assert_array_equal(images, read(source, f"obs/{CAMERAS[0]}"))


def test_askers_at_once_get_one_complete_result(tmp_path, capsys):
    """Threads stand for processes: the lock belongs to the open file."""
    source, cache = make_hdf5(tmp_path / "in.hdf5", lengths=(200, 200)), tmp_path / "cache"
    barrier = threading.Barrier(4)

    def ask(_):
        barrier.wait()
        path = ensure_zarr(source, cache)
        return path, zarr.open_group(str(path), mode="r").attrs["complete"]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(ask, range(4)))
    assert results == [(results[0][0], True)] * 4 and [path.name for path in cache.iterdir()] == [results[0][0].name]
    assert capsys.readouterr().out.count("converting 400 frames") == 1


def test_ctrl_c_is_one_line_and_the_next_call_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(robomimic, "BLOCK_BYTES", 1)
    source, output = make_hdf5(tmp_path / "in.hdf5", lengths=(100,)), tmp_path / "out.zarr"
    read_block = robomimic._read_block

    def interrupted(file, layout, key, start, *others):
        if start:
            raise KeyboardInterrupt
        return read_block(file, layout, key, start, *others)

    with monkeypatch.context() as patch:
        patch.setattr(robomimic, "_read_block", interrupted)
        code, _, errors = call(capsys, source, output)
    assert code == 130 and errors == [] and not output.exists()
    code, out, _ = call(capsys, source, output)
    assert code == 0 and "after 64 of 100 frames" in out
    assert contents(output) == contents(convert(source, tmp_path / "whole.zarr"))
