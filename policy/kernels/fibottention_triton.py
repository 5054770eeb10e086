"""Fibottention (arXiv 2406.19391) as Triton kernels: each tile of tokens gathers only the diagonals of its head.

The attended pairs are symmetric, so key j finds its queries j + delta along the same diagonals: the backward pass
gathers too, without atomics, and repeats bit by bit. Under rule "zero" an unattended pair keeps score 0, so

    out_i = [sum_{j in S} (e^{s_ij - m} - e^{-m}) v_j + e^{-m} sum_all v]
          / [sum_{j in S} (e^{s_ij - m} - e^{-m}) + T e^{-m}],         m = max(0, max_S s)

is exact with work on the attended set S alone; a row that attends to all T tokens has no such base term, nor has any
under rule "exclude". ``table`` int32 (H, 1+S) holds per head the number of its signed diagonals and then the
diagonals; every patch token and every prefix (class) token besides see each other.
"""

from __future__ import annotations

import torch

from policy.kernels.layout import empty_gradients, empty_output

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: ``why_not`` says so
    triton = tl = None

BLOCK = 32  # tokens a program; with the warps of ``_shape`` at most 32 bytes a thread are spilled (sm_80, sm_90)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(q):
    """Why these kernels cannot run for a tensor such as ``q`` (B, H, T, D): a sentence, or None when they can."""
    if triton is None:
        return "triton: got no such package, allowed: any version that fits torch (pip install triton)"
    if q.device.type != "cuda" and isinstance(_forward_kernel, triton.JITFunction):
        return f"device: got {q.device.type}, allowed: cuda (or TRITON_INTERPRET=1 set before triton is imported)"
    if q.dtype not in DTYPES:
        return f"dtype: got {q.dtype}, allowed: {', '.join(map(str, DTYPES))}"
    if q.shape[-1] > 128:
        return f"head width: got {q.shape[-1]}, allowed: at most 128"
    return None


def forward(q, k, v, table, *, prefix_tokens, masked_score, scale):
    """q, k, v (B, H, T, D), table (H, 1+S) -> out (B, H, T, D), lse (B, H, T) float32.

    lse is the logarithm of the softmax's normaliser, +inf for a row that attends to nothing (whose out is 0). ``out``
    lies in memory as (B, T, H, D).
    """
    q, k, v = map(_rows, (q, k, v))
    heads, tokens = q.shape[1:3]
    out, lse = empty_output(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel() == 0:
        return out, lse.fill_(0)
    shape = _shape(q, masked_score)
    sum_v = v.sum(2, dtype=torch.float32) if shape["ZERO"] else None  # (B, H, D)
    grid, tiles = _grid(q, prefix_tokens)
    with torch.cuda.device_of(q):
        _forward_kernel[grid](
            *(q, k, v, out, lse, sum_v, table),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], table.stride(0)),
            *(tiles, heads, tokens, prefix_tokens, scale),
            **shape,
        )
    return out, lse


def backward(grad_out, q, k, v, out, lse, table, *, prefix_tokens, masked_score, scale):
    """Gradients of q, k and v (3, B, H, T, D) for grad_out (B, H, T, D) of ``forward``."""
    grad_out, q, k, v, out = map(_rows, (grad_out, q, k, v, out))
    lse = lse.contiguous()
    batch, heads, tokens, width = q.shape
    gradients = empty_gradients(q)
    if q.numel() == 0:
        return gradients
    shape = _shape(q, masked_score)
    delta, base_weight, base_sum = torch.empty_like(lse), None, None
    row_tiles = triton.cdiv(tokens, BLOCK)
    if shape["ZERO"]:
        base_weight = torch.empty_like(lse)
        base_sum = lse.new_empty(batch, heads, row_tiles, width)
    grid, tiles = _grid(q, prefix_tokens)
    with torch.cuda.device_of(q):
        _delta_kernel[(batch * heads * row_tiles,)](
            *(grad_out, out, lse, table, delta, base_weight, base_sum),
            *(*grad_out.stride()[:3], *out.stride()[:3], table.stride(0)),
            *(row_tiles, heads, tokens, prefix_tokens),
            **shape,
        )
        base_sum = base_sum.sum(2) if shape["ZERO"] else None  # (B, H, D)
        _backward_kernel[grid](
            *(q, k, v, grad_out, lse, delta, base_weight, base_sum, table, *gradients),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], table.stride(0)),
            *(tiles, heads, tokens, prefix_tokens, scale),
            **shape,
        )
    return gradients


def _rows(x):
    """``x`` with every token's D numbers next to each other, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _grid(q, prefix_tokens):
    """One program a prefix token and one a tile of patch tokens, for each head of each sample -> (grid, per head).

    The grid has one axis only, since the others end at 65535.
    """
    batch, heads, tokens, _ = q.shape
    tiles = prefix_tokens + triton.cdiv(tokens - prefix_tokens, BLOCK)
    return (batch * heads * tiles,), tiles


def _shape(q, masked_score):
    """What the kernels are compiled for; fused multiply-adds by name, since triton 3.10 means to leave them out."""
    width = 1 << max(4, (q.shape[-1] - 1).bit_length())
    options = {"num_warps": 4 if width <= 64 else 8, "enable_fp_fusion": True}
    return {"ZERO": masked_score == "zero", "D": q.shape[-1], "WIDTH": width, "BLOCK": BLOCK, **options}


# Kernels ---------------------------------------------------------------------------------------------------------
# A program holds one token a lane and meets one other token a lane at each step: a tile of patches meets the P prefix
# tokens and then its neighbours along the diagonals; one prefix token, repeated in all lanes, meets all T tokens, BLOCK
# at a time, and joins its lanes at the end. A tensor argument is a pointer; x_b, x_h, x_t are the strides of x over
# samples, heads and tokens. A token that is not ``valid`` is never read and adds 0, be it NaN.
# fmt: off


def _kernel(function):
    return function if triton is None else triton.jit(function)


@_kernel
def _load(x, token, valid, x_t, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of the tokens in float32 (BLOCK, WIDTH), 0 where not ``valid``."""
    column = tl.arange(0, WIDTH)
    address = x + token.to(tl.int64)[:, None] * x_t + column[None, :]
    return tl.load(address, mask=valid[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)


@_kernel
def _store(x, token, valid, x_t, rows, D: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    address = x + token.to(tl.int64)[:, None] * x_t + column[None, :]
    tl.store(address, rows.to(x.dtype.element_ty), mask=valid[:, None] & (column < D)[None, :])


@_kernel
def _own(part, table, T, P, BLOCK: tl.constexpr):
    """Whether program ``part`` of a head is a prefix token's, its tokens (BLOCK,), which of them it stores, steps."""
    lane = tl.arange(0, BLOCK)
    prefix = part < P
    token = tl.where(prefix, part, P + (part - P) * BLOCK + lane)
    steps = tl.where(prefix, (T + BLOCK - 1) // BLOCK, P + tl.load(table))
    return prefix, token, (token < T) & (lane < tl.where(prefix, 1, BLOCK)), steps


@_kernel
def _meet(step, token, prefix, table, T, P, BLOCK: tl.constexpr):
    """The other token of each lane (BLOCK,) at this step and whether there is one."""
    diagonal = (step >= P) & (prefix == 0)
    delta = tl.load(table + 1 + step - P, mask=diagonal, other=0)
    other = tl.where(prefix, step * BLOCK + tl.arange(0, BLOCK), tl.where(diagonal, token + delta, step))
    return other, (token < T) & (other >= tl.where(diagonal, P, 0)) & (other < T)


@_kernel
def _has_base(token, table, T, P, ZERO: tl.constexpr, BLOCK: tl.constexpr):
    """Whether a row gives weight to unattended keys: rule "zero", a patch, and not attending to all tokens."""
    base = tl.full((BLOCK,), ZERO, tl.int1)
    if ZERO:
        base = token >= P
        count = tl.load(table)
        if count >= T - P:  # else no row can attend to all
            attended = tl.full((BLOCK,), 0, tl.int32)
            for n in range(count):
                other = token + tl.load(table + 1 + n)
                attended += ((other >= P) & (other < T)).to(tl.int32)
            base = base & (attended < T - P)
    return base


@_kernel
def _forward_kernel(
    q, k, v, out, lse, sum_v, table,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, table_row,
    tiles, H, T, P, scale,
    ZERO: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):
    """Softmax with a running maximum m, normaliser z (BLOCK,) and weighted sum of values acc (BLOCK, WIDTH)."""
    row = (tl.program_id(0) // tiles).to(tl.int64)  # of (B, H)
    b, h = row // H, row % H
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    table += h * table_row
    prefix, token, stored, steps = _own(tl.program_id(0) % tiles, table, T, P, BLOCK)
    query = _load(q + b * q_b + h * q_h, token, token < T, q_t, D, WIDTH) * scale
    base = _has_base(token, table, T, P, ZERO, BLOCK)
    m = tl.where(base, 0.0, -3.4e38)  # finite: -inf would make e^(m - m) of a row without keys NaN
    z = tl.full((BLOCK,), 0.0, tl.float32)
    acc = tl.full((BLOCK, WIDTH), 0.0, tl.float32)
    for step in range(steps):
        other, valid = _meet(step, token, prefix, table, T, P, BLOCK)
        key, value = _load(k, other, valid, k_t, D, WIDTH), _load(v, other, valid, v_t, D, WIDTH)
        score = tl.where(valid, tl.sum(query * key, 1), float("-inf"))
        top = tl.maximum(m, score)
        shrink = tl.exp(m - top)
        weight = tl.where(valid, tl.exp(score - top) - tl.where(base, tl.exp(-top), 0.0), 0.0)
        z = z * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * value
        m = top
    if prefix:
        top = tl.broadcast_to(tl.max(m, 0, keep_dims=True), (BLOCK,))
        shrink = tl.exp(m - top)
        z = tl.broadcast_to(tl.sum(z * shrink, 0, keep_dims=True), (BLOCK,))
        acc = tl.broadcast_to(tl.sum(acc * shrink[:, None], 0, keep_dims=True), (BLOCK, WIDTH))
        m = top
    if ZERO:
        unattended = tl.where(base, tl.exp(-m), 0.0)
        z += T * unattended
        one = tl.arange(0, 1)
        acc += tl.where(base[:, None], unattended[:, None] * _load(sum_v + row * D, one, one < 1, D, D, WIDTH), 0.0)
    nothing = z == 0
    _store(out + (b * T * H + h) * D, token, stored, H * D, acc / tl.where(nothing, 1.0, z)[:, None], D, WIDTH)
    tl.store(lse + row * T + token, tl.where(nothing, float("inf"), m + tl.log(z)), mask=stored)


@_kernel
def _delta_kernel(
    grad, out, lse, table, delta, base_weight, base_sum,
    g_b, g_h, g_t, o_b, o_h, o_t, table_row,
    tiles, H, T, P,
    ZERO: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):
    """delta_i = dO_i . O_i, weight c_i = e^{-lse_i} of each unattended key of row i, and sum_i c_i dO_i of a tile."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    b, h = row // H, row % H
    token = tile * BLOCK + tl.arange(0, BLOCK)
    inside = token < T
    grads = _load(grad + b * g_b + h * g_h, token, inside, g_t, D, WIDTH)
    outs = _load(out + b * o_b + h * o_h, token, inside, o_t, D, WIDTH)
    tl.store(delta + row * T + token, tl.sum(grads * outs, 1), mask=inside)
    if ZERO:
        base = inside & _has_base(token, table + h * table_row, T, P, ZERO, BLOCK)
        weight = tl.where(base, tl.exp(-tl.load(lse + row * T + token, mask=inside, other=0.0)), 0.0)
        tl.store(base_weight + row * T + token, weight, mask=inside)
        one = tile + tl.arange(0, 1)
        total = tl.sum(weight[:, None] * grads, 0, keep_dims=True)
        _store(base_sum + row * tiles * D, one, one < tiles, D, total, D, WIDTH)


@_kernel
def _backward_kernel(
    q, k, v, grad, lse, delta, base_weight, base_sum, table, dq, dk, dv,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, table_row,
    tiles, H, T, P, scale,
    ZERO: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):
    """dq of the program's tokens as queries, then their dk, dv as keys: two passes, each with half of the registers."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = row // H, row % H
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    grad += b * g_b + h * g_h
    lse += row * T
    delta += row * T
    first = (b * T * H + h) * D
    table += h * table_row
    prefix, token, stored, steps = _own(tl.program_id(0) % tiles, table, T, P, BLOCK)
    own = token < T

    query, grads = _load(q, token, own, q_t, D, WIDTH) * scale, _load(grad, token, own, g_t, D, WIDTH)
    row_lse = tl.load(lse + token, mask=own, other=0.0)
    row_delta = tl.load(delta + token, mask=own, other=0.0)
    sum_q = tl.full((BLOCK, WIDTH), 0.0, tl.float32)
    for step in range(steps):
        other, valid = _meet(step, token, prefix, table, T, P, BLOCK)
        key, value = _load(k, other, valid, k_t, D, WIDTH), _load(v, other, valid, v_t, D, WIDTH)
        p = tl.exp(tl.sum(query * key, 1) - row_lse)
        ds = tl.where(valid, p * (tl.sum(grads * value, 1) - row_delta), 0.0)
        sum_q += ds[:, None] * key
    if prefix:
        sum_q = tl.broadcast_to(tl.sum(sum_q, 0, keep_dims=True), (BLOCK, WIDTH))
    _store(dq + first, token, stored, H * D, sum_q * scale, D, WIDTH)

    key, value = _load(k, token, own, k_t, D, WIDTH), _load(v, token, own, v_t, D, WIDTH)
    sum_k = tl.full((BLOCK, WIDTH), 0.0, tl.float32)
    sum_v = tl.full((BLOCK, WIDTH), 0.0, tl.float32)
    for step in range(steps):
        other, valid = _meet(step, token, prefix, table, T, P, BLOCK)
        query, grads = _load(q, other, valid, q_t, D, WIDTH) * scale, _load(grad, other, valid, g_t, D, WIDTH)
        p = tl.exp(tl.sum(query * key, 1) - tl.load(lse + other, mask=valid, other=0.0))
        ds = p * (tl.sum(grads * value, 1) - tl.load(delta + other, mask=valid, other=0.0))
        if ZERO:  # base_sum holds c_i dO_i of every row; a prefix key, which all attend to, does without both
            p -= tl.load(base_weight + row * T + other, mask=valid & (token >= P), other=0.0)
        sum_k += tl.where(valid, ds, 0.0)[:, None] * query
        sum_v += tl.where(valid, p, 0.0)[:, None] * grads
    if prefix:
        sum_k = tl.broadcast_to(tl.sum(sum_k, 0, keep_dims=True), (BLOCK, WIDTH))
        sum_v = tl.broadcast_to(tl.sum(sum_v, 0, keep_dims=True), (BLOCK, WIDTH))
    elif ZERO:
        one = tl.arange(0, 1)
        sum_v += _load(base_sum + row * D, one, one < 1, D, D, WIDTH)
    _store(dk + first, token, stored, H * D, sum_k, D, WIDTH)
    _store(dv + first, token, stored, H * D, sum_v, D, WIDTH)
