"""Compiling numba kernels to C functions that are kept on disk, and running them in torch's own threads.

A second pool of threads would wait for the first one, which keeps its cores busy for a while after every operation.
"""

import ctypes
import functools
import pathlib
import sys
import threading
import zlib

import torch
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature

from policy.kernels.numba_cache import keep


def compile_function(function, signature, description):
    """``function`` as a C function of numba's ``signature``; says what it is compiling where that takes long."""
    words = f"compiling {description} (once, some seconds) ..."
    patience = threading.Timer(1.0, print, [words], {"file": sys.stderr})
    patience.start()
    compiled = keep(CFunc(function, normalize_signature(signature), {}, {"_nrt": False}))
    try:
        compiled.compile()
    finally:
        patience.cancel()
    return compiled


@functools.cache
def sources(*modules):
    """A number that changes with the files of ``modules``, to be closed over by a kernel that calls them.

    numba keeps the code of a function under its own file's time and the values that it closes over.
    """
    return sum(zlib.crc32(pathlib.Path(module.__file__).read_bytes()) for module in modules)


@functools.cache
def openmp():
    """(a function that calls another in threads, its barrier's address) of GNU OpenMP in the library that torch uses.

    (None, 0) where torch brings none (macOS).
    """
    library = next((pathlib.Path(torch.__file__).parent / "lib").glob("libtorch_cpu.so"), None)
    functions = ctypes.CDLL(str(library)) if library else None
    if not hasattr(functions, "GOMP_parallel") or not hasattr(functions, "GOMP_barrier"):
        return None, 0
    parallel = functions.GOMP_parallel
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel, ctypes.cast(functions.GOMP_barrier, ctypes.c_void_p).value
