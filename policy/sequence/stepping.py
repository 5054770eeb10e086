"""Decoding token by token: the next token through a causal attention, with what it keeps of those before it."""

import dataclasses

import torch
import torch.nn.functional as F

from policy.attention.performer import PerformerAttention
from policy.attention.softmax import SoftmaxAttention


def step(attention, x, state=None):
    """The next token x (B, C), after those of ``state`` (None: none) -> (its output (B, C), the new state).

    Equals, in evaluation, the last row of ``attention(whole sequence, is_causal=True)``.
    """
    return WAYS[way_of(attention)](attention, x, state)


def way_of(attention):
    """How ``step`` decodes with this attention: a key of ``WAYS``.

    A mechanism with a ``step`` takes it; softmax keeps keys and values, performer one sum for each feature. Any other
    keeps its inputs and attends anew over all of them, which costs as much as full evaluation.
    """
    if hasattr(attention, "step"):
        return "own state"
    if isinstance(attention, SoftmaxAttention):
        return "keys and values"
    if isinstance(attention, PerformerAttention) and attention.period is None:  # the cosine needs all places
        return "sums"
    return "whole prefix"


def _with_own_state(attention, x, state):
    return attention.step(x, state)


def _with_whole_prefix(attention, x, state):
    inputs = x[:, None] if state is None else torch.cat([state, x[:, None]], dim=1)
    return attention(inputs, is_causal=True)[:, -1], inputs


def _with_keys_and_values(attention, x, state):
    q, k, v = attention.split(x[:, None])
    if state is not None:
        k, v = (torch.cat(pair, dim=2) for pair in zip(state, (k, v), strict=True))
    out = attention.attend(q, k, v)
    return attention.proj(out.transpose(1, 2).flatten(1)), (k, v)


def _with_sums(attention, x, state):
    """State: the largest log feature of all keys (B, H, 1, M) and sums of features times values (B, H, M, D+1)."""
    q, k, v = attention.split(x[:, None])
    dtype = torch.promote_types(v.dtype, torch.float32)
    v = F.pad(v.to(dtype), (0, 1), value=1.0)  # the last column becomes the denominator
    (q_log, q_base), (k_log, k_base) = attention.features(q.to(dtype), k.to(dtype))
    top = k_log if state is None else torch.maximum(k_log, state[0])
    sums = (k_base * (k_log - top).exp()).mT @ v
    if state is not None:
        sums = sums + state[1] * (state[0] - top).exp().mT
    q_log = q_log + top
    out = (q_base * (q_log - q_log.amax(dim=-1, keepdim=True)).exp()) @ sums
    out = out[..., :-1] / out[..., -1:].clamp(min=attention.smallest)
    return attention.proj(out.transpose(1, 2).flatten(1).to(x.dtype)), (top, sums)


WAYS = {
    "own state": _with_own_state,
    "keys and values": _with_keys_and_values,
    "sums": _with_sums,
    "whole prefix": _with_whole_prefix,
}


def rows_of(state, index):
    """The rows ``index`` (n,) of all tensors of a state, which may be tensors, tuples, dataclasses and plain values."""
    if torch.is_tensor(state):
        return state[index]
    if isinstance(state, tuple):
        parts = [rows_of(part, index) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(state):
        names = [field.name for field in dataclasses.fields(state)]
        return dataclasses.replace(state, **{name: rows_of(getattr(state, name), index) for name in names})
    return state
