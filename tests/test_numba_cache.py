"""Whatever is wrong with numba's cache, results are those of a fresh compilation, and one line names the folder."""

import errno
import importlib
import os
import subprocess
import sys

import pytest
from paths import ROOT

import envs.shared.numba_cache  # noqa: F401, found by name
import policy.kernels.numba_cache
from policy.kernels.compile import compile_function

MODULE = """
from numba import njit
from {package}.numba_cache import keep

def compiled(function):
    return keep(njit(function))

@compiled
def double(x):
    return 2 * x

@compiled
def triple(x):
    return double(x) + x
"""
BOTH = pytest.mark.parametrize("package", ["policy.kernels", "envs.shared"])


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """(what a module with two kept functions gives, what it says), as a process does that begins."""
    (tmp_path / "code").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "code")

    def run(package, argument=7):
        (tmp_path / "code" / "kept.py").write_text(MODULE.format(package=package))
        sys.modules[f"{package}.numba_cache"]._tell.cache_clear()
        sys.modules.pop("kept", None)
        result = importlib.import_module("kept").triple(argument)
        return result, capsys.readouterr().err.splitlines()

    yield run
    sys.modules.pop("kept", None)


def files(tmp_path, ending):
    return sorted((tmp_path / "code" / "__pycache__").glob(f"*{ending}"))


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {
    "emptied": lambda content: b"",
    "garbage": lambda content: b"garbage" * 9,
    "a pickle of something else": lambda content: b"\x80\x04K\x01.",
    "truncated": lambda content: content[:-20],
    "half": lambda content: content[: len(content) // 2],
    "a flipped bit": flip,
    "another's": None,
}


@BOTH
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
def test_damaged_files_are_compiled_anew(call, tmp_path, package, ending, damage):
    assert call(package) == (21, [])
    assert len(files(tmp_path, ending)) == 2 and call(package) == (21, [])
    contents = [path.read_bytes() for path in files(tmp_path, ending)]
    change = DAMAGES[damage]
    others = contents[::-1] if change is None else [change(content) for content in contents]
    for path, content in zip(files(tmp_path, ending), others, strict=True):
        path.write_bytes(content)
    result, lines = call(package)
    assert result == 21
    assert len(lines) <= 1 and all(str(tmp_path / "code" / "__pycache__") in line for line in lines)
    assert lines or ending == ".nbi"  # an index that names no code that fits is none
    assert call(package) == (21, []), "what was damaged has been replaced"


@BOTH
def test_code_of_another_source_is_not_taken(call, tmp_path, package, monkeypatch):
    """No room for new code after the index was written: the code that is there is of an older source."""
    assert call(package) == (21, [])
    monkeypatch.setitem(globals(), "MODULE", MODULE.replace("double(x) + x", "double(x) + x + 1"))
    kept = sys.modules[f"{package}.numba_cache"]

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(kept._SealedFiles, "_save_data", full)
        result, lines = call(package)
        assert result == 22 and len(lines) == 1 and "No space left" in lines[0]
        assert call(package)[0] == 22
    assert call(package) == (22, []) == call(package)


@BOTH
def test_without_a_folder_it_is_compiled(call, tmp_path, package, monkeypatch):
    """Files stand where folders would be: for root, too, nothing can be written."""
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, os.devnull)
    (tmp_path / "code" / "__pycache__").write_text("a file")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    result, lines = call(package)
    assert result == 21 and len(lines) == 1 and str(tmp_path / "code" / "__pycache__") in lines[0]


def test_c_functions_are_kept_and_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))

    def kernel(x):
        return x + 5

    for content in (None, b"", b"garbage"):
        for path in tmp_path.rglob("*.nb*") if content is not None else ():
            path.write_bytes(content)
        policy.kernels.numba_cache._tell.cache_clear()
        compiled = compile_function(kernel, "int64(int64)", "a test")
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("numba")]
        assert compiled.ctypes(1) == 6 and len(lines) == (content is not None)
        assert compile_function(kernel, "int64(int64)", "a test")._cache_hits == 1


@pytest.mark.parametrize("module", ["envs.pusht.geometry", "policy.kernels.fibottention_cpu"])
def test_a_checkout_that_cannot_be_written(module, tmp_path):
    """NUMBA_CACHE_DIR, too, is a file: importing takes no cache, and says so where something is to be kept."""
    (tmp_path / "cache").write_text("a file")
    places = {"NUMBA_CACHE_DIR": tmp_path / "cache", "HOME": os.devnull, "XDG_CACHE_HOME": os.devnull}
    code = f"""
from numba.core.caching import InTreeCacheLocator
InTreeCacheLocator.get_cache_path = lambda self: {os.devnull!r}
import {module}
"""
    environment = {**os.environ, **{key: str(path) for key, path in places.items()}}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("numba: ") == module.startswith("envs")
    assert not module.startswith("envs") or str(tmp_path / "cache") in result.stderr
