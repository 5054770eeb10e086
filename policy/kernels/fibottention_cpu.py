"""Fibottention on a CPU: compiles the kernels of fibottention_numba.py and runs them in torch's threads.

numba compiles a kernel for each head width, once: it is kept on disk.
"""

import ctypes
import functools
import itertools
import math
import threading

import numpy as np
import torch
from numba import types

from policy.kernels import fibottention_numba as tiles
from policy.kernels import vector as numba_tools
from policy.kernels.compile import compile_function, openmp, sources
from policy.kernels.layout import empty_gradients, empty_output
from policy.kernels.vector import LANES

MAX_HEAD_WIDTH = 128
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def _compile(direction, padded_width):
    """The kernel "forward" or "backward" as a C function of a task, for a head width that the compiler knows."""
    files = sources(tiles, numba_tools)

    def run_forward(task):
        if files:
            tiles.forward(numba_tools.int64_array(task, (tiles.TASK_SIZE,)), padded_width)

    def run_backward(task):
        if files:
            tiles.backward(numba_tools.int64_array(task, (tiles.TASK_SIZE,)), padded_width)

    run = {"forward": run_forward, "backward": run_backward}[direction]
    return compile_function(run, types.void(types.voidptr), f"Fibottention {direction}, heads of {padded_width}")


def _run(direction, tensors, lse, table, *, prefix_tokens, masked_score, scale):
    batch, heads, tokens, width = tensors[0].shape
    threads, diagonals = min(torch.get_num_threads(), batch * heads), table.shape[1] - 1
    padded_width = -(-width // LANES) * LANES
    counters = np.zeros(2, np.int64)  # units and threads that have begun
    every = np.arange(tokens, dtype=np.int32)
    shapes = (
        (4, tokens, padded_width),  # ROWS
        (2, padded_width),  # VECTORS
        (4, LANES),  # LANE_VALUES
        (2, tokens + diagonals, LANES),  # SCORES
        (2, prefix_tokens + diagonals, tokens),  # PAIRS
        (2, tokens, prefix_tokens),  # PREFIX_PAIRS
        (tokens,),  # UNATTENDED
    )
    # One allocation for all; each part begins with a cache line.
    sizes = [-(-threads * math.prod(shape) // LANES) * LANES for shape in shapes]
    begins = list(itertools.accumulate(sizes, initial=0))
    memory = torch.empty(begins.pop(), dtype=torch.float32)
    scalars = {
        tiles.COUNTERS: counters.ctypes.data,
        tiles.BATCH: batch,
        tiles.HEADS: heads,
        tiles.PREFIX: prefix_tokens,
        tiles.PATCHES: tokens - prefix_tokens,
        tiles.WIDTH: width,
        tiles.TABLE: table.data_ptr(),
        tiles.DIAGONALS: diagonals,
        tiles.LSE: lse.data_ptr(),
        tiles.HALF: tensors[0].dtype == torch.bfloat16,
        tiles.ZERO: masked_score == "zero",
        tiles.SCALE: np.float32(scale).view(np.int32),
        tiles.THREADS: threads,
        tiles.INDEX: every.ctypes.data,
    }
    task = np.zeros(tiles.TASK_SIZE, np.int64)
    task[list(scalars)] = list(scalars.values())
    task[tiles.ROWS : tiles.INDEX] = [memory.data_ptr() + 4 * begin for begin in begins]
    for number, tensor in enumerate(tensors):
        strides = [stride * tensor.element_size() for stride in tensor.stride()[:3]]
        task[tiles.Q + 4 * number : tiles.Q + 4 * number + 4] = tensor.data_ptr(), *strides
    function, (parallel, _) = _compile(direction, padded_width), openmp()
    if threads > 1 and parallel is not None:
        parallel(function.address, task.ctypes.data, threads, 0)
        return
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address)  # releases the interpreter lock
    workers = [threading.Thread(target=call, args=(task.ctypes.data,)) for _ in range(threads - 1)]
    for worker in workers:
        worker.start()
    call(task.ctypes.data)
    for worker in workers:
        worker.join()


def why_not(q):
    """Why these kernels cannot take a tensor (B, H, T, D), in words, or None."""
    if q.device.type != "cpu":
        return f"device: got {q.device.type}, allowed: cpu"
    if q.dtype not in DTYPES:
        return f"dtype: got {q.dtype}, allowed: {', '.join(map(str, DTYPES))}"
    if q.shape[-1] > MAX_HEAD_WIDTH:
        return f"head width: got {q.shape[-1]}, allowed: up to {MAX_HEAD_WIDTH}"
    return None


def _dense_vectors(*tensors):
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def forward(q, k, v, table, **options):
    """q, k, v (B, H, T, D) and table (H, 1+S) of ``diagonal_table`` -> out (B, H, T, D), lse (B, H, T) float32.

    lse is the logarithm of the normaliser of each softmax row. options: prefix_tokens, masked_score, scale.
    """
    out, lse = empty_output(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel():
        _run("forward", [*_dense_vectors(q, k, v), out], lse, table, **options)
    return out, lse


def backward(grad, q, k, v, out, lse, table, **options):
    """grad, q, k, v, out (B, H, T, D), lse (B, H, T) -> gradients of q, k and v (3, B, H, T, D)."""
    grads = empty_gradients(q)
    if q.numel():
        _run("backward", [*_dense_vectors(q, k, v, out, grad), *grads], lse, table, **options)
    return grads
