"""The compiled half of policy/kernels/unet1d.py: one call runs a whole U-Net step, which is a list of operations.

At few rows (batch x horizon) a convolution is as fast as its weights can be read, so each is laid out to be read once,
from front to back: (blocks of LANES output channels, tap, input channel, LANES). Its input stands ready as (sample,
channel, step) with zeros for padding. There are two kinds of operation:

    MULTIPLY  data (row, channel) = convolution of the input, where row = sample * steps + step
    FINISH    group normalisation, Mish, FiLM and residual of ``data`` in place, then copies to the inputs of later ones

The threads share the units of an operation through a counter and wait for each other behind it.
"""

import functools
import math

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from policy.kernels import vector as numba_tools
from policy.kernels.compile import compile_function, sources
from policy.kernels.vector import (
    LANES,
    compiled,
    exp,
    f32,
    fetch_increment,
    float_array,
    float_of_bits,
    inline,
    int64_array,
    pointer,
)

MULTIPLY, FINISH = range(2)
# An operation is one row of int64. Both kinds: number of units of work, whether all threads wait behind it, address and
# row stride of data, steps of a sample there.
KIND, UNITS, WAIT, DATA, STRIDE, STEPS = range(6)
# MULTIPLY: a unit is all rows of BLOCKS blocks; registers hold the sums of TILE of its rows at a time.
WEIGHTS, BIAS, BLOCK_BYTES, BLOCKS, TILE, FUNCTION, INPUT, WIDTH, TAPS, IN_CHANNELS, HOP, SAMPLES = range(6, 18)
# FINISH: a unit is PART of a sample's CHANNELS, in groups of SIZE. SCALE and SHIFT (of the normalisation) and RESIDUAL
# are addresses or 0, FILM an index or -1; WORK is room for (sample, 4, STRIDE) numbers.
CHANNELS, PART, SIZE, SCALE, SHIFT, EPSILON, FILM, RESIDUAL, WORK, FIRST_COPY, LAST_COPY = range(6, 17)
OPERATION_SIZE = 18
# A copy: address of step 0 of the first channel, and the input's channels and steps with padding.
TARGET, TARGET_CHANNELS, TARGET_WIDTH = range(3)
COPY_SIZE = 3
# The task of a step: addresses of these, the number of operations and OpenMP's barrier (0 for one thread).
COUNTERS, OPERATIONS, COUNT, COPIES, FILMS, BARRIER = range(6)
TASK_SIZE = 6

CHUNK = 256  # products that are added up in registers; sums of sums lose fewer digits than one long sum
AHEAD = 4096  # bytes that a core asks for beforehand: the processor's own guesses end with the page

INT, LONG, FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
VECTOR = ir.VectorType(FLOAT, LANES)


def _everywhere(builder, number):
    single = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), number, INT(0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(INT, LANES), [INT(0)] * LANES))


def _load_weights(builder, address, half):
    """LANES weights at ``address`` as float32; bfloat16 is the upper half of a float32."""
    if not half:
        return builder.load(builder.inttoptr(address, VECTOR.as_pointer()), align=4 * LANES)
    halves = ir.VectorType(ir.IntType(16), LANES)
    words = ir.VectorType(INT, LANES)
    numbers = builder.load(builder.inttoptr(address, halves.as_pointer()), align=2 * LANES)
    return builder.bitcast(builder.shl(builder.zext(numbers, words), ir.Constant(words, [INT(16)] * LANES)), VECTOR)


def _ask_for(builder, address):
    """Prefetch into the first level."""
    kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, INT, INT, INT])
    function = builder.module.declare_intrinsic("llvm.prefetch", (cgutils.voidptr_t,), kind)
    builder.call(function, [builder.inttoptr(address, cgutils.voidptr_t), INT(0), INT(3), INT(1)])


@intrinsic(prefer_literal=True)
def multiply_tile(typing_context, weights, block_bytes, x, width, data, stride, depth, tile, blocks, hop, half):
    """data[row, lane] += sum over k < depth of x[k, hop * row] weights[k, lane], for ``tile`` rows, ``blocks`` blocks.

    x: rows of ``width`` numbers. The first seven are addresses and numbers at run time. The sums of a tile stay in
    registers, which LLVM would not do for an array.
    """
    tile_rows, tile_blocks, is_half = tile.literal_value, blocks.literal_value, bool(half.literal_value)
    step, weight_bytes = hop.literal_value, LANES * (2 if is_half else 4)

    def generate(context, builder, signature, arguments):
        weights, block_bytes, x, width, data, stride, depth = arguments[:7]
        zero = ir.Constant(VECTOR, None)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(tile_blocks)] for _ in range(tile_rows)]
        with cgutils.for_range(builder, depth) as loop:
            start = builder.add(weights, builder.mul(loop.index, LONG(weight_bytes)))
            places = [builder.add(start, builder.mul(block_bytes, LONG(block))) for block in range(tile_blocks)]
            for place in places:
                _ask_for(builder, builder.add(place, LONG(AHEAD)))
            vectors = [_load_weights(builder, place, is_half) for place in places]
            numbers = builder.gep(builder.inttoptr(x, FLOAT.as_pointer()), [builder.mul(loop.index, width)])
            for row in range(tile_rows):
                number = _everywhere(builder, builder.load(builder.gep(numbers, [LONG(step * row)]), align=4))
                for place, vector in zip(sums[row], vectors, strict=True):
                    product = builder.fmul(number, vector, flags=("contract",))
                    builder.store(builder.fadd(builder.load(place), product, flags=("contract",)), place)
        for row in range(tile_rows):
            begin = builder.gep(builder.inttoptr(data, FLOAT.as_pointer()), [builder.mul(stride, LONG(row))])
            for block in range(tile_blocks):
                place = builder.bitcast(builder.gep(begin, [LONG(LANES * block)]), VECTOR.as_pointer())
                total = builder.fadd(builder.load(place, align=4 * LANES), builder.load(sums[row][block]))
                builder.store(total, place, align=4 * LANES)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, tile, blocks, hop, half), generate


@intrinsic
def call_tile(typing_context, function, weights, block_bytes, x, width, data, stride, depth):
    """Call the compiled ``multiply_tile`` at an address."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [LONG] * 7)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


@intrinsic
def call_barrier(typing_context, function):
    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@inline
def _multiply(op, unit):
    """One unit. The weights of a chunk stay in the cache for all rows."""
    lanes, steps, stride, hop = op[BLOCKS] * LANES, op[STEPS], op[STRIDE], op[HOP]
    taps, channels, width = op[TAPS], op[IN_CHANNELS], op[WIDTH]
    bias = float_array(pointer(op[BIAS] + 4 * unit * lanes), (lanes,))
    data = float_array(pointer(op[DATA] + 4 * unit * lanes), (op[SAMPLES] * steps, stride))
    for row in data:
        for lane in range(lanes):
            row[lane] = bias[lane]
    row_bytes = op[BLOCK_BYTES] // (taps * channels)
    for tap in range(taps):
        for c in range(0, channels, CHUNK):
            weights = op[WEIGHTS] + unit * op[BLOCKS] * op[BLOCK_BYTES] + (tap * channels + c) * row_bytes
            depth = min(CHUNK, channels - c)
            for sample in range(op[SAMPLES]):
                x = op[INPUT] + 4 * ((sample * channels + c) * width + tap)
                sums = op[DATA] + 4 * (sample * steps * stride + unit * lanes)
                for t in range(0, steps, op[TILE]):
                    there = sums + 4 * t * stride
                    call_tile(op[FUNCTION], weights, op[BLOCK_BYTES], x + 4 * hop * t, width, there, stride, depth)


@inline(error_model="numpy")  # asking whether a divisor is zero would keep vectors from being used
def _mish(x):
    """x tanh(log(1 + e^x)), arXiv 1908.08681."""
    e = exp(x if x < f32(20.0) else f32(20.0))  # beyond 20 the quotient is 1
    product = e * (e + f32(2.0))
    return x * (product / (product + f32(2.0)))


@inline
def _normalisation(gain, offset, data, stride, size, groups, scale, shift, op):
    """Group normalisation (arXiv 1803.08494) of ``groups`` groups of ``size`` channels as gain[c] x + offset[c]."""
    steps, lanes = op[STEPS], len(gain)
    count = f32(steps * size)
    for c in range(lanes):
        gain[c] = f32(0.0)
    for t in range(steps):
        row = float_array(pointer(data + 4 * t * stride), (lanes,))
        for c in range(lanes):
            gain[c] += row[c]
    for group in range(groups):
        mean = f32(0.0)
        for c in range(group * size, (group + 1) * size):
            mean += gain[c]
        for c in range(group * size, (group + 1) * size):
            offset[c] = mean / count
    for c in range(lanes):
        gain[c] = f32(0.0)
    for t in range(steps):
        row = float_array(pointer(data + 4 * t * stride), (lanes,))
        for c in range(lanes):
            gain[c] += (row[c] - offset[c]) * (row[c] - offset[c])
    for group in range(groups):
        variance = f32(0.0)
        for c in range(group * size, (group + 1) * size):
            variance += gain[c]
        factor = f32(1.0) / f32(math.sqrt(variance / count + float_of_bits(np.int32(op[EPSILON]))))
        for c in range(group * size, (group + 1) * size):
            gain[c] = factor * scale[c]
            offset[c] = shift[c] - offset[c] * gain[c]


@inline
def _normalise(data, first, last, lanes, sample, op, films):
    """Group normalisation, Mish and FiLM (1 and 0 where the block has none)."""
    stride, channels, work = op[STRIDE], op[CHANNELS], op[WORK] + 4 * (4 * sample * op[STRIDE] + first)
    gain = float_array(pointer(work), (lanes,))
    offset = float_array(pointer(work + 4 * stride), (lanes,))
    film_scale = float_array(pointer(work + 8 * stride), (lanes,))
    film_shift = float_array(pointer(work + 12 * stride), (lanes,))
    scale = float_array(pointer(op[SCALE] + 4 * first), (lanes,))
    shift = float_array(pointer(op[SHIFT] + 4 * first), (lanes,))
    _normalisation(gain, offset, data, stride, op[SIZE], (last - first) // op[SIZE], scale, shift, op)
    if op[FILM] < 0:
        for c in range(last - first):
            film_scale[c], film_shift[c] = f32(1.0), f32(0.0)
    else:
        film = float_array(pointer(films[op[FILM]] + 8 * sample * channels), (2, channels))
        for c in range(last - first):
            film_scale[c], film_shift[c] = film[0, first + c], film[1, first + c]
    for t in range(op[STEPS]):
        row = float_array(pointer(data + 4 * t * stride), (lanes,))
        for c in range(lanes):
            row[c] = row[c] * gain[c] + offset[c]
        for c in range(lanes):
            row[c] = _mish(row[c])
        for c in range(lanes):
            row[c] = row[c] * film_scale[c] + film_shift[c]


@inline
def _finish(op, unit, copies, films):
    """One unit. Whole vectors are worked on, so the last one may hold channels that do not exist, zeros."""
    parts, steps, stride = -(-op[CHANNELS] // op[PART]), op[STEPS], op[STRIDE]
    sample, first = unit // parts, unit % parts * op[PART]
    last, lanes = min(first + op[PART], op[CHANNELS]), min(op[PART], stride - first)
    begin = 4 * (sample * steps * stride + first)
    if op[SCALE] != 0:
        _normalise(op[DATA] + begin, first, last, lanes, sample, op, films)
    if op[RESIDUAL] != 0:
        for t in range(steps):
            row = float_array(pointer(op[DATA] + begin + 4 * t * stride), (lanes,))
            residual = float_array(pointer(op[RESIDUAL] + begin + 4 * t * stride), (lanes,))
            for c in range(lanes):
                row[c] += residual[c]
    data = float_array(pointer(op[DATA] + begin), (steps, stride))
    for number in range(op[FIRST_COPY], op[LAST_COPY]):
        channels, width = copies[number, TARGET_CHANNELS], copies[number, TARGET_WIDTH]
        place = copies[number, TARGET] + 4 * (sample * channels + first) * width
        target = float_array(pointer(place), (last - first, width))
        for c in range(last - first):
            for t in range(steps):
                target[c, t] = data[t, c]


@compiled
def run(task):
    """One U-Net step, called by every thread at the same time."""
    counters, count, barrier = task[COUNTERS], task[COUNT], task[BARRIER]
    operations = int64_array(pointer(task[OPERATIONS]), (count, OPERATION_SIZE))
    copies = int64_array(pointer(task[COPIES]), (count * 3, COPY_SIZE))
    films = int64_array(pointer(task[FILMS]), (count,))
    for number in range(count):
        op = operations[number]
        unit = fetch_increment(counters + 8 * number)
        while unit < op[UNITS]:
            if op[KIND] == MULTIPLY:
                _multiply(op, unit)
            else:
                _finish(op, unit, copies, films)
            unit = fetch_increment(counters + 8 * number)
        if op[WAIT] != 0 and barrier != 0:
            call_barrier(barrier)


# Compiling -------------------------------------------------------------------------------------------------------


def _compile(function, arguments):
    return compile_function(function, types.void(*[types.int64] * arguments), "the U-Net")


@functools.cache
def compile_run():
    files = sources(numba_tools)

    def call(task):
        if files:
            run(int64_array(pointer(task), (TASK_SIZE,)))

    return _compile(call, 1)


@functools.cache
def compile_tile(tile, blocks, hop, half):
    files = sources(numba_tools)

    def multiply(weights, block_bytes, x, width, data, stride, depth):
        if files:
            multiply_tile(weights, block_bytes, x, width, data, stride, depth, tile, blocks, hop, half)

    return _compile(multiply, 7).address


def tile_size(steps, blocks):
    """(rows, blocks) of sums that registers hold: 32 of LANES numbers with AVX-512, else fewer or smaller ones."""
    wide = get_host_cpu_features().get("avx512f")
    rows = next(rows for rows in range(24 if wide else 4, 0, -1) if steps % rows == 0)
    most = 1 if not wide or rows > 12 else 2 if rows > 4 else 4
    return rows, next(count for count in (4, 2, 1) if count <= most and blocks % count == 0)
