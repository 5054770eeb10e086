"""The CPU kernels of Fibottention: work on the attended pairs only, one (batch, head) after another (arXiv 2406.19391).

The published rule gives an unattended pair the score 0. Its softmax row is therefore exactly

    out_i = [sum_S (exp(s_ij - m) - exp(-m)) v_j + exp(-m) sum_all v_j] / [sum_S exp(s_ij - m) + (T - |S|) exp(-m)]

with the attended set S of query i, T tokens and m = max(0, max_S s): one sum of v per head stands for all unattended
pairs. The pattern is symmetric, so the gradients of keys and values are gathers over the same diagonals.
"""

import math

import numpy as np

from policy.kernels.vector import (
    LANES,
    add_four_rows,
    bits32_array,
    compiled,
    count_lanes,
    exp,
    f32,
    fetch_increment,
    float_array,
    float_of_bits,
    inline,
    int32_array,
    load_row,
    pointer,
    prefetch,
    raise_lanes,
    store_row,
    sum_rows,
    u64,
)

# A task is one int64 array: these scalars, ...
COUNTERS, BATCH, HEADS, PREFIX, PATCHES, WIDTH, TABLE, DIAGONALS, LSE, HALF, ZERO, SCALE, THREADS = range(13)
# ... the addresses of working memory, each with a part for every thread, ...
ROWS, VECTORS, LANE_VALUES, SCORES, PAIRS, PREFIX_PAIRS, UNATTENDED, INDEX = range(13, 21)
# ... and address and strides (batch, head, token; in bytes) of each tensor.
Q, K, V, OUT, GRAD, GRAD_Q, GRAD_K, GRAD_V = range(21, 53, 4)
TASK_SIZE = 53


# Memory ----------------------------------------------------------------------------------------------------------


@inline
def _address(task, tensor, batch, head):
    """Address of token 0; the next one is task[tensor + 3] bytes on."""
    return task[tensor] + batch * task[tensor + 1] + head * task[tensor + 2]


@inline
def _in_place(task, tensor, padded_width):
    """Whether the tokens of one head stand in memory as a float32 matrix (tokens, padded_width)."""
    return task[HALF] == 0 and task[WIDTH] == padded_width and task[tensor + 3] == 4 * padded_width


@inline
def _rows_of_head(task, tensor, batch, head, memory, copy, copy_bits):
    """The vectors of all tokens as float32: ``memory`` where they stand like that, else after copying them."""
    if _in_place(task, tensor, copy.shape[1]):
        return memory
    address = _address(task, tensor, batch, head)
    for t in range(len(copy)):
        load_row(copy, copy_bits, t, address + t * task[tensor + 3], task[HALF] != 0, task[WIDTH])
    return copy


@inline
def _prefetch_tile(task, tensor, unit, first, size, padded_width):
    """Ask for ``size`` rows of a later unit, if there is one and the processor does not foresee them itself."""
    if unit < task[BATCH] * task[HEADS] and not _in_place(task, tensor, padded_width):
        address = _address(task, tensor, unit // task[HEADS], unit % task[HEADS])
        row_bytes = task[WIDTH] * (2 if task[HALF] != 0 else 4)
        for t in range(first, first + size):
            for byte in range(0, row_bytes, 64):
                prefetch(address + t * task[tensor + 3] + byte)


# Tiles -----------------------------------------------------------------------------------------------------------
# A tile is LANES consecutive tokens, all prefix or all patch tokens. Its scores stand in an array (slot, lane): first a
# slot for each token that all of them attend to, then a slot for each diagonal.


@inline
def _lanes_on_diagonal(delta, first, size, prefix, tokens):
    """Lanes [begin, end) of the tile whose token + delta is a patch token."""
    begin = min(max(prefix - first - delta, 0), size)
    end = max(min(tokens - first - delta, size), begin)
    return begin, end


@inline
def _dot_tile(scores, scale, rows, matrix, first, size, full, deltas, count, prefix, outside, padded_width):
    """scores[slot, lane] = scale * rows[first + lane] . matrix[key]; ``outside`` where there is no such key."""
    for slot in range(full):
        for lane in range(size):
            total = f32(0.0)
            for d in range(padded_width):
                total += rows[u64(first + lane), d] * matrix[slot, d]
            scores[slot, lane] = scale * total
    tokens = len(matrix)
    for n in range(count):
        begin, end = _lanes_on_diagonal(deltas[n], first, size, prefix, tokens)
        slot = u64(full + n)
        if end - begin < LANES:
            for lane in range(LANES):
                scores[slot, lane] = outside
        queries, keys = rows[first + begin :], matrix[first + begin + deltas[n] :]
        for lane in range(end - begin):
            total = f32(0.0)
            for d in range(padded_width):
                total += queries[lane, d] * keys[lane, d]
            scores[slot, u64(begin + lane)] = scale * total


@inline
def _add_weighted(vector, scores, slot, lane, matrix, base, shifts, begin, end, padded_width):
    """vector += sum over begin <= n < end of scores[slot + n, lane] matrix[base + shifts[n]], four at a time."""
    whole = begin + max(end - begin, 0) // 4 * 4
    for n in range(begin, whole, 4):
        w0, w1 = scores[u64(slot + n), lane], scores[u64(slot + n + 1), lane]
        w2, w3 = scores[u64(slot + n + 2), lane], scores[u64(slot + n + 3), lane]
        j0, j1 = u64(base + shifts[u64(n)]), u64(base + shifts[u64(n + 1)])
        j2, j3 = u64(base + shifts[u64(n + 2)]), u64(base + shifts[u64(n + 3)])
        for d in range(0, padded_width, LANES):
            add_four_rows(vector, matrix, d, j0, j1, j2, j3, w0, w1, w2, w3)
    if end - whole == 1:
        w0, j0 = scores[u64(slot + whole), lane], u64(base + shifts[u64(whole)])
        for d in range(padded_width):
            vector[d] += w0 * matrix[j0, d]
    elif end > whole:
        # Two or three: where the third is missing, the second stands in with weight 0.
        w0, w1 = scores[u64(slot + whole), lane], scores[u64(slot + whole + 1), lane]
        w2 = scores[u64(slot + end - 1), lane] if end - whole == 3 else f32(0.0)
        j0, j1 = u64(base + shifts[u64(whole)]), u64(base + shifts[u64(whole + 1)])
        j2 = u64(base + shifts[u64(end - 1)])
        for d in range(0, padded_width, LANES):
            add_four_rows(vector, matrix, d, j0, j1, j2, j2, w0, w1, w2, f32(0.0))


@inline
def _narrow(low, high, i, deltas, prefix, tokens):
    """The diagonals [low, high) whose i + delta is a patch token; both ends only fall as i grows."""
    while low > 0 and i + deltas[u64(low - 1)] >= prefix:
        low -= 1
    while high > low and i + deltas[u64(high - 1)] >= tokens:
        high -= 1
    return low, max(high, low)


@inline
def _add_all_weighted(vector, scores, lane, matrix, every, full, i, deltas, low, high, padded_width):
    """vector += sum over the keys of token i of their scores times their rows of ``matrix``."""
    _add_weighted(vector, scores, 0, lane, matrix, 0, every, 0, full, padded_width)
    _add_weighted(vector, scores, full, lane, matrix, i, deltas, low, high, padded_width)


@inline
def _count_attended(attended, full, deltas, count, first, size, prefix, tokens):
    for lane in range(LANES):
        attended[lane] = f32(full)
    for n in range(count):
        begin, end = _lanes_on_diagonal(deltas[n], first, size, prefix, tokens)
        count_lanes(attended, begin, end)


@inline
def _next_tile(first, prefix, tokens, count):
    """Size of the tile that begins with token ``first``, number of keys of all its tokens, number of its diagonals."""
    if first < prefix:
        return min(LANES, prefix - first), tokens, 0
    return min(LANES, tokens - first), prefix, count


# Kernels ---------------------------------------------------------------------------------------------------------


@compiled
def forward(task, padded_width):
    """Take (batch, head) units from a counter until none is left."""
    heads, prefix, width, diagonals = task[HEADS], task[PREFIX], task[WIDTH], task[DIAGONALS]
    half, zero, scale = task[HALF] != 0, task[ZERO] != 0, float_of_bits(np.int32(task[SCALE]))
    tokens, threads = prefix + task[PATCHES], task[THREADS]
    thread = fetch_increment(task[COUNTERS] + 8)
    table = int32_array(pointer(task[TABLE]), (heads, 1 + diagonals))
    every = int32_array(pointer(task[INDEX]), (tokens,))
    rows = float_array(pointer(task[ROWS]), (threads, 4, tokens, padded_width))[thread]
    row_bits = bits32_array(pointer(task[ROWS]), (threads, 4, tokens, padded_width))[thread]
    vectors = float_array(pointer(task[VECTORS]), (threads, 2, padded_width))[thread]
    vector_bits = bits32_array(pointer(task[VECTORS]), (threads, 2, padded_width))[thread]
    v_sum, total, total_bits = vectors[0], vectors[1:], vector_bits[1:]
    lanes = float_array(pointer(task[LANE_VALUES]), (threads, 4, LANES))[thread]
    attended, largest, unattended, norm = lanes[0], lanes[1], lanes[2], lanes[3]
    scores = float_array(pointer(task[SCORES]), (threads, 2, tokens + diagonals, LANES))[thread][0]
    next_unit = fetch_increment(task[COUNTERS])
    while next_unit < task[BATCH] * heads:
        unit, next_unit = next_unit, fetch_increment(task[COUNTERS])
        batch, head = unit // heads, unit % heads
        memory = float_array(pointer(_address(task, K, batch, head)), (tokens, padded_width))
        k = _rows_of_head(task, K, batch, head, memory, rows[1], row_bits[1])
        memory = float_array(pointer(_address(task, V, batch, head)), (tokens, padded_width))
        v = _rows_of_head(task, V, batch, head, memory, rows[2], row_bits[2])
        memory = float_array(pointer(_address(task, Q, batch, head)), (tokens, padded_width))
        q = _rows_of_head(task, Q, batch, head, memory, rows[0], row_bits[0])
        if zero:
            sum_rows(v_sum, v, padded_width)
        lse = float_array(pointer(task[LSE] + 4 * unit * tokens), (tokens,))
        out_address = _address(task, OUT, batch, head)
        deltas, diagonals_of_head = table[head, 1:], np.int64(table[head, 0])
        low = high = diagonals_of_head
        first = 0
        while first < tokens:
            size, full, count = _next_tile(first, prefix, tokens, diagonals_of_head)
            _prefetch_tile(task, Q, next_unit, first, size, padded_width)
            _prefetch_tile(task, K, next_unit, first, size, padded_width)
            _prefetch_tile(task, V, next_unit, first, size, padded_width)
            _dot_tile(scores, scale, q, k, first, size, full, deltas, count, prefix, f32(-np.inf), padded_width)
            _count_attended(attended, full, deltas, count, first, size, prefix, tokens)
            for lane in range(LANES):
                largest[lane] = f32(-np.inf)
            for slot in range(full + count):
                raise_lanes(largest, scores, slot)
            for lane in range(LANES):
                # A row that attends to everything has no unattended pair; one that attends to nothing has no score.
                base = zero and attended[lane] < f32(tokens)
                floor = f32(0.0) if base or attended[lane] == f32(0.0) else f32(-np.inf)
                largest[lane] = largest[lane] if largest[lane] > floor else floor
                unattended[lane] = exp(-largest[lane]) if base else f32(0.0)
                norm[lane] = unattended[lane] * (f32(tokens) - attended[lane])
            for slot in range(full + count):
                for lane in range(LANES):
                    weight = exp(scores[slot, lane] - largest[lane])
                    norm[lane] += weight
                    scores[slot, lane] = weight - unattended[lane]
            for lane in range(size):
                i = first + lane
                if first >= prefix:
                    low, high = _narrow(low, high, i, deltas, prefix, tokens)
                begin, end = (low, high) if first >= prefix else (0, 0)
                for d in range(padded_width):
                    total[0, d] = unattended[lane] * v_sum[d] if zero else f32(0.0)
                _add_all_weighted(total[0], scores, lane, v, every, full, i, deltas, begin, end, padded_width)
                # Without any key the row is zero, and its infinite lse gives it no weight in the backward pass.
                empty = norm[lane] == f32(0.0)
                lse[i] = f32(np.inf) if empty else largest[lane] + f32(math.log(norm[lane]))
                inverse = f32(0.0) if empty else f32(1.0) / norm[lane]
                store_row(total, total_bits, inverse, out_address + i * task[OUT + 3], half, width)
            first += size


@inline
def _keep_tile(scores, pairs, prefix_pairs, first, size, slots, prefix):
    """Keep what a tile of queries found: pairs[slot, patch query], prefix_pairs[key, prefix query]."""
    for slot in range(slots):
        for lane in range(size):
            if first < prefix:
                prefix_pairs[slot, u64(first + lane)] = scores[slot, lane]
            else:
                pairs[slot, u64(first + lane)] = scores[slot, lane]


@inline
def _gather_tile(scores, pairs, prefix_pairs, first, size, deltas, count, prefix, tokens):
    """The same for a tile of keys: scores[slot, lane] of the query of each slot.

    The pattern is symmetric: the keys of a token are also the queries that attend to it, each along the diagonal of
    the opposite sign.
    """
    if first < prefix:
        for lane in range(size):
            for i in range(prefix):
                scores[i, lane] = prefix_pairs[u64(first + lane), i]
            for i in range(prefix, tokens):
                scores[u64(i), lane] = pairs[u64(first + lane), u64(i)]
        return
    for p in range(prefix):
        for lane in range(size):
            scores[p, lane] = prefix_pairs[u64(first + lane), p]
    for n in range(count):
        begin, end = _lanes_on_diagonal(deltas[n], first, size, prefix, tokens)
        opposite, query = u64(prefix + count - 1 - n), first + deltas[n]
        for lane in range(begin, end):
            scores[u64(prefix + n), u64(lane)] = pairs[opposite, u64(query + lane)]


@compiled
def backward(task, padded_width):
    """Take (batch, head) units from a counter: first every token as a query, then every token as a key."""
    heads, prefix, width, diagonals = task[HEADS], task[PREFIX], task[WIDTH], task[DIAGONALS]
    half, zero, scale = task[HALF] != 0, task[ZERO] != 0, float_of_bits(np.int32(task[SCALE]))
    tokens, threads = prefix + task[PATCHES], task[THREADS]
    thread = fetch_increment(task[COUNTERS] + 8)
    table = int32_array(pointer(task[TABLE]), (heads, 1 + diagonals))
    every = int32_array(pointer(task[INDEX]), (tokens,))
    rows = float_array(pointer(task[ROWS]), (threads, 4, tokens, padded_width))[thread]
    row_bits = bits32_array(pointer(task[ROWS]), (threads, 4, tokens, padded_width))[thread]
    vectors = float_array(pointer(task[VECTORS]), (threads, 2, padded_width))[thread]
    vector_bits = bits32_array(pointer(task[VECTORS]), (threads, 2, padded_width))[thread]
    g_sum, total, total_bits = vectors[0], vectors[1:], vector_bits[1:]
    lanes = float_array(pointer(task[LANE_VALUES]), (threads, 4, LANES))[thread]
    attended, lse, unattended, delta = lanes[0], lanes[1], lanes[2], lanes[3]
    scores = float_array(pointer(task[SCORES]), (threads, 2, tokens + diagonals, LANES))[thread]
    s, w = scores[0], scores[1]
    # Of each pair: d loss / d score, and its weight beyond that of an unattended pair; then that of unattended pairs.
    pairs = float_array(pointer(task[PAIRS]), (threads, 2, prefix + diagonals, tokens))[thread]
    prefix_pairs = float_array(pointer(task[PREFIX_PAIRS]), (threads, 2, tokens, prefix))[thread]
    unattended_of = float_array(pointer(task[UNATTENDED]), (threads, tokens, 1))[thread]
    next_unit = fetch_increment(task[COUNTERS])
    while next_unit < task[BATCH] * heads:
        unit, next_unit = next_unit, fetch_increment(task[COUNTERS])
        batch, head = unit // heads, unit % heads
        memory = float_array(pointer(_address(task, Q, batch, head)), (tokens, padded_width))
        q = _rows_of_head(task, Q, batch, head, memory, rows[0], row_bits[0])
        memory = float_array(pointer(_address(task, K, batch, head)), (tokens, padded_width))
        k = _rows_of_head(task, K, batch, head, memory, rows[1], row_bits[1])
        memory = float_array(pointer(_address(task, V, batch, head)), (tokens, padded_width))
        v = _rows_of_head(task, V, batch, head, memory, rows[2], row_bits[2])
        memory = float_array(pointer(_address(task, GRAD, batch, head)), (tokens, padded_width))
        g = _rows_of_head(task, GRAD, batch, head, memory, rows[3], row_bits[3])
        all_lse = float_array(pointer(task[LSE] + 4 * unit * tokens), (tokens,))
        out_address, grad_q_address = _address(task, OUT, batch, head), _address(task, GRAD_Q, batch, head)
        deltas, diagonals_of_head = table[head, 1:], np.int64(table[head, 0])
        low = high = diagonals_of_head
        first = 0
        while first < tokens:
            size, full, count = _next_tile(first, prefix, tokens, diagonals_of_head)
            _prefetch_tile(task, Q, next_unit, first, size, padded_width)
            _prefetch_tile(task, K, next_unit, first, size, padded_width)
            for lane in range(size):
                i = u64(first + lane)
                lse[lane] = all_lse[i]
                load_row(total, total_bits, 0, out_address + (first + lane) * task[OUT + 3], half, width)
                product = f32(0.0)
                for d in range(padded_width):
                    product += g[i, d] * total[0, d]
                delta[lane] = product
            _dot_tile(s, scale, q, k, first, size, full, deltas, count, prefix, f32(-np.inf), padded_width)
            _dot_tile(w, f32(1.0), g, v, first, size, full, deltas, count, prefix, f32(0.0), padded_width)
            _count_attended(attended, full, deltas, count, first, size, prefix, tokens)
            for lane in range(LANES):
                unattended[lane] = exp(-lse[lane]) if zero and attended[lane] < f32(tokens) else f32(0.0)
            for slot in range(full + count):
                for lane in range(LANES):
                    probability = exp(s[slot, lane] - lse[lane])
                    s[slot, lane] = probability * (w[slot, lane] - delta[lane])
                    w[slot, lane] = probability - unattended[lane]
            _keep_tile(s, pairs[0], prefix_pairs[0], first, size, full + count, prefix)
            _keep_tile(w, pairs[1], prefix_pairs[1], first, size, full + count, prefix)
            for lane in range(size):
                i = first + lane
                unattended_of[u64(i), 0] = unattended[lane]
                if first >= prefix:
                    low, high = _narrow(low, high, i, deltas, prefix, tokens)
                begin, end = (low, high) if first >= prefix else (0, 0)
                for d in range(padded_width):
                    total[0, d] = f32(0.0)
                _add_all_weighted(total[0], s, lane, k, every, full, i, deltas, begin, end, padded_width)
                store_row(total, total_bits, scale, grad_q_address + i * task[GRAD_Q + 3], half, width)
            first += size
        for d in range(padded_width):
            g_sum[d] = f32(0.0)
        if zero:
            _add_weighted(g_sum, unattended_of, 0, 0, g, 0, every, 0, tokens, padded_width)
        grad_k_address, grad_v_address = _address(task, GRAD_K, batch, head), _address(task, GRAD_V, batch, head)
        low = high = diagonals_of_head
        first = 0
        while first < tokens:
            size, full, count = _next_tile(first, prefix, tokens, diagonals_of_head)
            _prefetch_tile(task, V, next_unit, first, size, padded_width)
            _prefetch_tile(task, GRAD, next_unit, first, size, padded_width)
            _gather_tile(s, pairs[0], prefix_pairs[0], first, size, deltas, count, prefix, tokens)
            _gather_tile(w, pairs[1], prefix_pairs[1], first, size, deltas, count, prefix, tokens)
            for lane in range(size):
                j = first + lane
                if first >= prefix:
                    low, high = _narrow(low, high, j, deltas, prefix, tokens)
                begin, end = (low, high) if first >= prefix else (0, 0)
                for d in range(padded_width):
                    total[0, d] = f32(0.0)
                _add_all_weighted(total[0], s, lane, q, every, full, j, deltas, begin, end, padded_width)
                store_row(total, total_bits, scale, grad_k_address + j * task[GRAD_K + 3], half, width)
                for d in range(padded_width):
                    total[0, d] = g_sum[d]
                _add_all_weighted(total[0], w, lane, g, every, full, j, deltas, begin, end, padded_width)
                store_row(total, total_bits, f32(1.0), grad_v_address + j * task[GRAD_V + 3], half, width)
            first += size
