"""What numba lacks for kernels on raw memory: arrays at an address, an atomic counter, prefetching, a fast exp.

Nothing counts references (numba's ``nrt``), which would cost as much as the arithmetic: memory comes from the caller.
"""

import functools

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import get_cfarray_intrinsic

LANES = 16  # float32 numbers in the widest vector register
f32 = np.float32
u64 = np.uint64  # an index without a sign is not checked for counting from the end
# Sums may be reordered (vector lanes); NaN and infinity keep their meaning.
compiled = functools.partial(njit, fastmath={"reassoc", "contract", "nsz"}, _nrt=False)
inline = functools.partial(compiled, forceinline=True)

# Arrays over given memory; numba's public ``carray`` wants reference counts.
float_array = get_cfarray_intrinsic("C", types.DType(types.float32))
int32_array = get_cfarray_intrinsic("C", types.DType(types.int32))
int64_array = get_cfarray_intrinsic("C", types.DType(types.int64))
bits32_array = get_cfarray_intrinsic("C", types.DType(types.uint32))
bits16_array = get_cfarray_intrinsic("C", types.DType(types.uint16))


@intrinsic
def pointer(typing_context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def fetch_increment(typing_context, address):
    """Atomically add one to the int64 at ``address``; the value before."""

    def generate(context, builder, signature, arguments):
        integer = ir.IntType(64)
        place = builder.inttoptr(arguments[0], integer.as_pointer())
        return builder.atomic_rmw("add", place, integer(1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def float_of_bits(typing_context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def bits_of_float(typing_context, number):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def prefetch(typing_context, address):
    """Ask for the cache line at ``address`` (into the second level)."""

    def generate(context, builder, signature, arguments):
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch", (cgutils.voidptr_t,), kind)
        read, second_level, data = flag(0), flag(2), flag(1)
        builder.call(function, [builder.inttoptr(arguments[0], cgutils.voidptr_t), read, second_level, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def raise_lanes(typing_context, largest, scores, slot):
    """largest[lane] = max(largest[lane], scores[slot, lane]) in one step; LLVM would take the lanes one by one."""

    def generate(context, builder, signature, arguments):
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[:2], arguments[:2], strict=True)
        ]
        vector = ir.VectorType(ir.FloatType(), LANES)
        old_pointer = builder.bitcast(arrays[0].data, vector.as_pointer())
        row = builder.gep(arrays[1].data, [builder.mul(arguments[2], ir.IntType(64)(LANES))])
        old = builder.load(old_pointer, align=4)
        new = builder.load(builder.bitcast(row, vector.as_pointer()), align=4)
        larger = builder.fcmp_ordered(">", new, old)
        builder.store(builder.select(larger, new, old), old_pointer, align=4)
        return context.get_dummy_value()

    return types.void(largest, scores, types.int64), generate


@intrinsic
def count_lanes(typing_context, counts, begin, end):
    """counts[lane] += 1 for the lanes begin <= lane < end, in one step."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        integer = ir.IntType(32)
        lanes = ir.Constant(ir.VectorType(integer, LANES), [integer(lane) for lane in range(LANES)])
        bounds = []
        for bound in arguments[1:]:
            lane = builder.insert_element(
                ir.Constant(lanes.type, ir.Undefined), builder.trunc(bound, integer), integer(0)
            )
            bounds.append(builder.shuffle_vector(lane, lane, ir.Constant(lanes.type, [integer(0)] * LANES)))
        inside = builder.and_(builder.icmp_signed(">=", lanes, bounds[0]), builder.icmp_signed("<", lanes, bounds[1]))
        vector = ir.VectorType(ir.FloatType(), LANES)
        place = builder.bitcast(array.data, vector.as_pointer())
        old = builder.load(place, align=4)
        builder.store(builder.fadd(old, builder.uitofp(inside, vector)), place, align=4)
        return context.get_dummy_value()

    return types.void(counts, types.int64, types.int64), generate


@intrinsic
def add_four_rows(typing_context, vector, matrix, d, j0, j1, j2, j3, w0, w1, w2, w3):
    """vector[d + lane] += w0 matrix[j0, d + lane] + ... + w3 matrix[j3, d + lane] for LANES lanes.

    As a loop over arrays LLVM would ask each time whether the rows overlap, which takes as long as adding them.
    """

    def generate(context, builder, signature, arguments):
        target, rows = (
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[:2], arguments[:2], strict=True)
        )
        lanes = ir.VectorType(ir.FloatType(), LANES)
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [ir.IntType(32)(0)] * LANES)
        width = builder.extract_value(rows.shape, 1)
        offset = arguments[2]
        place = builder.bitcast(builder.gep(target.data, [offset]), lanes.as_pointer())
        total = builder.load(place, align=4)
        for row, weight in zip(arguments[3:7], arguments[7:], strict=True):
            start = builder.gep(rows.data, [builder.add(builder.mul(row, width), offset)])
            numbers = builder.load(builder.bitcast(start, lanes.as_pointer()), align=4)
            single = builder.insert_element(ir.Constant(lanes, ir.Undefined), weight, ir.IntType(32)(0))
            weights = builder.shuffle_vector(single, single, everywhere)
            product = builder.fmul(weights, numbers, flags=("contract",))
            total = builder.fadd(total, product, flags=("contract",))
        builder.store(total, place, align=4)
        return context.get_dummy_value()

    weights, rows = (types.float32,) * 4, (types.uint64,) * 4
    return types.void(vector, matrix, types.int64, *rows, *weights), generate


@njit(forceinline=True, fastmath=False, _nrt=False)  # adding and subtracting ROUND must not be cancelled
def exp(x):
    """exp of a float32 below 88 within two units in the last place (coefficients of Cephes' expf); vectorises."""
    ROUND = f32(12582912.0)  # 1.5 * 2^23: adding it leaves an integer in the low bits
    shifted = x * f32(1.44269504088896341) + ROUND
    power = shifted - ROUND
    r = x - power * f32(0.693359375)
    r = r - power * f32(-2.12194440e-4)
    y = f32(1.9875691500e-4)
    y = y * r + f32(1.3981999507e-3)
    y = y * r + f32(8.3334519073e-3)
    y = y * r + f32(4.1665795894e-2)
    y = y * r + f32(1.6666665459e-1)
    y = y * r + f32(5.0000001201e-1)
    y = y * r * r + r + f32(1.0)
    two_to_power = float_of_bits(np.int32((bits_of_float(shifted) << 23) + 0x3F800000))
    return f32(0.0) if x < f32(-87.0) else y * two_to_power


@inline
def load_row(rows, bits, row, address, half, width):
    """Copy one token's vector into float32 ``rows``, zeros behind it; bfloat16 is the upper half of a float32."""
    if half:
        halves = bits16_array(pointer(address), (width,))
        for d in range(width):
            bits[row, d] = np.uint32(halves[d]) << np.uint32(16)
    else:
        numbers = float_array(pointer(address), (width,))
        for d in range(width):
            rows[row, d] = numbers[d]
    for d in range(width, rows.shape[1]):
        rows[row, d] = f32(0.0)


@inline
def store_row(rows, bits, factor, address, half, width):
    """Write ``factor`` times row 0, rounded to nearest even where the tensor is bfloat16."""
    for d in range(width):
        rows[0, d] *= factor
    if half:
        halves = bits16_array(pointer(address), (width,))
        for d in range(width):
            word = bits[0, d]
            rounded = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            halves[d] = np.uint16(rounded) if rows[0, d] == rows[0, d] else np.uint16(0x7FC0)
    else:
        numbers = float_array(pointer(address), (width,))
        for d in range(width):
            numbers[d] = rows[0, d]


@inline
def sum_rows(vector, matrix, padded_width):
    """vector = sum of the rows of ``matrix``, four at a time."""
    whole = len(matrix) // 4 * 4
    for d in range(padded_width):
        vector[d] = f32(0.0)
    for t in range(0, whole, 4):
        for d in range(padded_width):
            vector[d] += (matrix[t, d] + matrix[t + 1, d]) + (matrix[t + 2, d] + matrix[t + 3, d])
    for t in range(whole, len(matrix)):
        for d in range(padded_width):
            vector[d] += matrix[t, d]
