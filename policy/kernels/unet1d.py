"""The diffusion U-Net on a CPU at few rows: packed weights, and one compiled call for each denoising step.

torch multiplies a few rows by large weights at a fraction of the memory's speed, and small U-Nets wait for Python. Here
the weights are laid out once in the order in which the kernels of unet1d_numba.py read them, in torch's own threads.

What it buys (docs/speed/runtimes.md: ``python -m eval.speed runtimes`` on two idle cores, Push-T's shipped policy, 10
steps of DDIM, batch 1, 8 and 25), as time over ours. One step: onnxruntime 5.7, 5.2, 4.8; torch.compile 13, 3.3, 2.2;
torch 15, 3.8, 2.1. From observation to chunk: onnxruntime 2.6, 3.7, 3.8; torch.compile 4.1, 2.2, 2.0; torch 4.5, 2.4,
1.7. The threads wait for each other after every operation. Where other programs hold the cores, one thread is faster:
``torch.set_num_threads(1)``.
"""

import functools
import math
import threading
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from policy.denoiser.unet1d import ConditionalUNet1D
from policy.kernels import unet1d_numba as kernels
from policy.kernels.compile import openmp
from policy.kernels.transforms import transform
from policy.kernels.vector import LANES
from policy.registry import choose

WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS_LIMIT = 512  # batch x horizon up to which the kernels were faster than torch wherever measured


# Packing ---------------------------------------------------------------------------------------------------------


def _aligned(shape, dtype):
    """Uninitialised tensor that begins with a cache line; numpy asks for huge pages, torch does not."""
    size = dtype.itemsize
    memory = np.empty(int(np.prod(shape)) * size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return torch.from_numpy(memory[begin : memory.size - 64 + begin]).view(dtype).view(shape)


class _Packed:
    """One convolution: weight (C', C, taps) -> blocks (C' / LANES, taps, C, LANES), bias (C' rounded up)."""

    def __init__(self, weight, bias, dtype):
        missing = -weight.shape[0] % LANES
        weight = F.pad(weight, (0, 0, 0, 0, 0, missing)).unflatten(0, (-1, LANES)).permute(0, 3, 2, 1)
        self.blocks, self.taps = _aligned(weight.shape, dtype).copy_(weight), weight.shape[1]
        self.bias = F.pad(bias, (0, missing))


# The list of operations ------------------------------------------------------------------------------------------


class _Signal(NamedTuple):
    """data (rows, C rounded up) after its operation ``finish``, which also copies it to where it is needed."""

    data: torch.Tensor
    steps: int
    channels: int
    finish: dict


class _Plan:
    """The operations of one U-Net step for actions (batch, horizon, Da), and the memory that they work in."""

    def __init__(self, unet, packed, batch, horizon):
        self.packed, self.batch = packed, batch
        self.operations, self.memory, self.film_shapes = [], [], []
        if horizon % unet.multiple:
            raise ValueError(f"horizon: got {horizon}, allowed: a multiple of {unet.multiple} (U-Net levels)")
        action_dim = unet.out[1].out_channels
        self.input = self._data(horizon, action_dim)
        signal = self._finish(self.input, horizon, action_dim)
        skips = []
        for first, second, downsample in unet.down:
            signal = self._residual_block(second, [self._residual_block(first, [signal])])
            skips.append(signal)
            if isinstance(downsample, nn.Conv1d):
                signal = self._convolution(downsample, signal)
        for block in unet.middle:
            signal = self._residual_block(block, [signal])
        for first, second, upsample in unet.up:
            signal = self._residual_block(second, [self._residual_block(first, [signal, skips.pop()])])
            signal = self._upsample(upsample, signal)
        signal = self._conv_block(unet.out[0], self._padded([signal], unet.out[0][0].padding[0]), signal.steps)
        signal = self._convolution(unet.out[1], signal)
        self.output = signal.data.unflatten(0, (batch, horizon))[..., :action_dim]
        self._lower()

    def _zeros(self, *shape):
        self.memory.append(_aligned(shape, torch.float32).zero_())
        return self.memory[-1]

    def _data(self, steps, channels):
        return self._zeros(self.batch * steps, -(-channels // LANES) * LANES)

    def _padded(self, signals, padding):
        """A convolution's input (B, C, padding + T + padding): the signals' channels, one after another."""
        width, channels = signals[0].steps + 2 * padding, sum(signal.channels for signal in signals)
        x = self._zeros(self.batch, channels, width)
        first = 0
        for signal in signals:
            signal.finish["copies"].append([x[0, first, padding:].data_ptr(), channels, width])
            first += signal.channels
        return x

    def _multiply(self, packed, x, steps, data, *, hop=1, first_tap=0, wait=1):
        """data (rows, C') = convolution of x (B, C, width) in steps of ``hop``; rows may be every second one."""
        blocks, (_, channels, width) = len(packed.blocks), x.shape
        tile, tile_blocks = kernels.tile_size(steps, blocks)
        half = int(packed.blocks.dtype == torch.bfloat16)
        self.operations.append(
            {
                kernels.KIND: kernels.MULTIPLY,
                kernels.UNITS: blocks // tile_blocks,
                kernels.WAIT: wait,
                kernels.DATA: data.data_ptr(),
                kernels.STRIDE: data.stride(0),
                kernels.STEPS: steps,
                kernels.WEIGHTS: packed.blocks.data_ptr(),
                kernels.BIAS: packed.bias.data_ptr(),
                kernels.BLOCK_BYTES: packed.blocks[0].nbytes,
                kernels.BLOCKS: tile_blocks,
                kernels.TILE: tile,
                kernels.FUNCTION: kernels.compile_tile(tile, tile_blocks, hop, half),
                kernels.INPUT: x[0, 0, first_tap:].data_ptr(),
                kernels.WIDTH: width,
                kernels.TAPS: packed.taps,
                kernels.IN_CHANNELS: channels,
                kernels.HOP: hop,
                kernels.SAMPLES: self.batch,
            }
        )

    def _finish(self, data, steps, channels, norm=None, film=-1, residual=None):
        """The signal that ``data`` becomes. A unit of work is whole groups and, but for the last, whole vectors."""
        size = channels // norm.num_groups if norm else 1
        part = math.lcm(size, 4 * LANES)  # LLVM takes vectors in fours
        scale, shift = (tensor.data_ptr() for tensor in self.packed[norm]) if norm else (0, 0)
        operation = {
            kernels.KIND: kernels.FINISH,
            kernels.UNITS: self.batch * -(-channels // part),
            kernels.WAIT: 1,
            kernels.DATA: data.data_ptr(),
            kernels.STRIDE: data.stride(0),
            kernels.STEPS: steps,
            kernels.CHANNELS: channels,
            kernels.PART: part,
            kernels.SIZE: size,
            kernels.SCALE: scale,
            kernels.SHIFT: shift,
            kernels.EPSILON: int(np.float32(norm.eps).view(np.int32)) if norm else 0,
            kernels.FILM: film,
            kernels.RESIDUAL: 0 if residual is None else residual.data_ptr(),
            kernels.WORK: self._zeros(self.batch, 4, data.shape[1]).data_ptr() if norm else 0,
            "copies": [],
        }
        self.operations.append(operation)
        return _Signal(data, steps, channels, operation)

    def _conv_block(self, block, x, steps, **options):
        convolution, norm, _ = block
        data = self._data(steps, convolution.out_channels)
        self._multiply(self.packed[convolution], x, steps, data)
        return self._finish(data, steps, convolution.out_channels, norm, **options)

    def _residual_block(self, block, signals):
        film = len(self.film_shapes)
        self.film_shapes.append((self.batch, 2 * block.first[0].out_channels))
        padding, steps = block.first[0].padding[0], signals[0].steps
        x, residual = self._padded(signals, padding), signals[0].data
        if isinstance(block.skip, nn.Conv1d) or len(signals) > 1:
            residual = self._data(steps, block.first[0].out_channels)
            self._multiply(self._skip(block), x, steps, residual, first_tap=padding, wait=0)
        hidden = self._conv_block(block.first, x, steps, film=film)
        return self._conv_block(block.second, self._padded([hidden], padding), steps, residual=residual)

    def _skip(self, block):
        """The block's skip; where it is the identity, of two signals, a convolution that puts them into one tensor."""
        if block.skip not in self.packed:
            channels = block.first[0].out_channels
            self.packed[block.skip] = _Packed(torch.eye(channels)[..., None], torch.zeros(channels), torch.float32)
        return self.packed[block.skip]

    def _convolution(self, convolution, signal):
        (hop,), (padding,) = convolution.stride, convolution.padding
        steps, channels = signal.steps // hop, convolution.out_channels
        data = self._data(steps, channels)
        self._multiply(self.packed[convolution], self._padded([signal], padding), steps, data, hop=hop)
        return self._finish(data, steps, channels)

    def _upsample(self, convolution, signal):
        """Even output steps see an input step and the one before it, odd ones the step and the one behind it."""
        steps, channels = signal.steps, convolution.out_channels
        x, data = self._padded([signal], 1), self._data(2 * steps, channels)
        for odd, packed in enumerate(self.packed[convolution]):
            self._multiply(packed, x, steps, data[odd::2], first_tap=odd, wait=odd)
        return self._finish(data, 2 * steps, channels)

    def _lower(self):
        """Write the operations as the tables that the kernel reads."""
        self.table = np.zeros((len(self.operations), kernels.OPERATION_SIZE), np.int64)
        copies = []
        for row, operation in zip(self.table, self.operations, strict=True):
            wanted = operation.pop("copies", None)
            row[list(operation)] = list(operation.values())
            if wanted is not None:
                row[[kernels.FIRST_COPY, kernels.LAST_COPY]] = len(copies), len(copies) + len(wanted)
                copies += wanted
        self.copies = np.array(copies, np.int64)
        self.counters = np.zeros(len(self.operations), np.int64)
        self.film_addresses = np.zeros(len(self.film_shapes), np.int64)
        self.task = np.zeros(kernels.TASK_SIZE, np.int64)
        tables = self.counters, self.table, self.copies, self.film_addresses
        names = kernels.COUNTERS, kernels.OPERATIONS, kernels.COPIES, kernels.FILMS
        self.task[list(names)] = [table.ctypes.data for table in tables]
        self.task[kernels.COUNT] = len(self.operations)

    def check(self, actions, films):
        """The kernels do not see how long a tensor is."""
        if actions.shape != self.output.shape:
            raise ValueError(f"actions: got {tuple(actions.shape)}, allowed: {tuple(self.output.shape)}")
        shapes = [tuple(film.shape) for film in films]
        if shapes != self.film_shapes:
            raise ValueError(f"films: got {shapes}, allowed: {self.film_shapes}")

    def run(self, actions, films):
        """actions (B, T, Da), films [(B, 2C)], float32 and contiguous -> (B, T, Da)."""
        self.input[:, : actions.shape[2]] = actions.flatten(0, 1)
        self.film_addresses[:] = [film.data_ptr() for film in films]
        self.counters[:] = 0
        threads, (parallel, barrier), function = torch.get_num_threads(), openmp(), kernels.compile_run()
        if threads > 1 and parallel is not None:
            self.task[kernels.BARRIER] = barrier
            parallel(function.address, self.task.ctypes.data, threads, 0)
        else:
            self.task[kernels.BARRIER] = 0
            function.ctypes(self.task.ctypes.data)
        return self.output.clone()


# The U-Net -------------------------------------------------------------------------------------------------------


def unsupported(unet, actions, films=()):
    """Why ``PackedUNet`` cannot stand in for ``unet.denoise`` at actions (B, T, Da) and films, in words, or None."""
    if not isinstance(unet, ConditionalUNet1D):
        return f"denoiser: got {type(unet).__name__}, allowed: ConditionalUNet1D"
    parameter = next(unet.parameters())
    for tensor in (parameter, actions):
        if tensor.device.type != "cpu":
            return f"device: got {tensor.device.type}, allowed: cpu"
        if tensor.dtype != torch.float32:
            return f"dtype: got {tensor.dtype}, allowed: torch.float32"
    if unet.training:
        return "mode: got training, allowed: evaluation"
    if transform():
        return f"transform: got {transform()}, allowed: none"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (actions, *films, *unet.parameters())):
        return "gradients: got enabled, allowed: torch.no_grad()"
    rows = actions.shape[0] * actions.shape[1]
    if rows > ROWS_LIMIT:
        return f"rows (batch x horizon): got {rows}, allowed: up to {ROWS_LIMIT}"
    return None


class PackedUNet:
    """A copy of a ``ConditionalUNet1D``'s convolutions in the kernels' layout; ``denoise`` equals the U-Net's.

    weights: "float32", or "bfloat16", which halves the bytes to read; the arithmetic is float32 in both. Rounding them
    moved the output of one call by 0.1 % and normalised actions by 0.001 at most (Push-T's shipped policy, 100 steps of
    DDPM); in float32 these are rounding errors. The packed weights take as much memory again. Raises ValueError for
    other weights.
    """

    def __init__(self, unet, weights="float32"):
        self.unet, self.weights, self.lock = unet, choose("weights", weights, WEIGHTS), threading.Lock()
        packed = _pack(unet, WEIGHTS[weights])
        self.plan = functools.lru_cache(maxsize=8)(functools.partial(_Plan, unet, packed))

    def __reduce__(self):
        return PackedUNet, (self.unet, self.weights)  # a copy packs its own: plans are full of addresses

    def denoise(self, actions, films):
        """actions (B, T, Da), films [(B, 2C)] of the blocks in their order -> (B, T, Da).

        Raises ValueError where shapes do not fit the U-Net.
        """
        batch, horizon, _ = actions.shape
        with self.lock:  # a plan's memory serves one call at a time
            plan = self.plan(batch, horizon)
            plan.check(actions, films)
            return plan.run(actions, [film.float().contiguous() for film in films])


@torch.no_grad()
def _pack(unet, dtype):
    packed = {}
    for module in unet.modules():
        if isinstance(module, nn.Conv1d):
            packed[module] = _Packed(module.weight, module.bias, dtype)
        elif isinstance(module, nn.ConvTranspose1d):
            weight = module.weight.transpose(0, 1)  # (C', C, 4)
            packed[module] = [_Packed(weight[..., [3 - p, 1 - p]], module.bias, dtype) for p in (0, 1)]
        elif isinstance(module, nn.GroupNorm):
            packed[module] = module.weight.clone(), module.bias.clone()
    return packed
