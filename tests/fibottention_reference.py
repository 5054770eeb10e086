"""Fibottention from its description, in float64, and the code under test called in the same way."""

import math

import pytest
import torch

from policy.attention import build_attention, fibottention

RULES, BACKENDS = ("zero", "exclude"), ("dense", "cpu")
HEADS = ((0, 1, 3), (), (2, 17), (5, 40))  # offsets: counts that differ, one head without any, one beyond all tokens
GEOMETRY = {"dim": 24, "num_heads": 3, "num_patches": 16, "grid": (4, 4), "layer": 1, "depth": 3, "prefix_tokens": 1}
each_rule = pytest.mark.parametrize("rule", RULES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def attended(offsets, size, prefix):
    """bool (H, T, T), pair by pair."""
    mask = torch.zeros(len(offsets), size, size, dtype=torch.bool)
    mask[:, :prefix, :] = True
    mask[:, :, :prefix] = True
    for head, head_offsets in enumerate(offsets):
        for i in range(prefix, size):
            for o in head_offsets:
                for j in (i - o, i + o):
                    if prefix <= j < size:
                        mask[head, i, j] = True
    return mask


def exact(q, k, v, grad, offsets, *, prefix, rule, scale=None):
    """out, dq, dk, dv in float64 from all pairs."""
    q, k, v = leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    mask = attended(offsets, q.shape[2], prefix)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if rule == "zero":
        weights = (scores * mask).softmax(dim=3)
    else:
        any_key = mask.any(dim=2, keepdim=True)
        weights = scores.masked_fill(~mask & any_key, -math.inf).softmax(dim=3) * any_key
    out = torch.einsum("bhij,bhjd->bhid", weights, v)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.double())


def evaluate(q, k, v, grad, offsets, *, prefix=1, rule="zero", backend="cpu", scale=None):
    """out, dq, dk, dv of the code under test."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = fibottention(*leaves, offsets, prefix_tokens=prefix, masked_score=rule, backend=backend, scale=scale)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def check(*inputs, backend, atol=None, rtol=None, **options):
    """``evaluate`` gives what ``exact`` gives; default tolerances are those of float32."""
    found = evaluate(*inputs, backend=backend, **options)
    wanted = exact(*inputs, **options)
    for name, got, want in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert (name, got.dtype, got.shape) == (name, inputs[0].dtype, want.shape)
        small = {"atol": 1e-5, "rtol": 1e-6} if name == "out" else {"atol": 1e-4, "rtol": 1e-4}
        close = {"atol": small["atol"] if atol is None else atol, "rtol": small["rtol"] if rtol is None else rtol}
        torch.testing.assert_close(got.double(), want, **close, msg=f"{name}: {{}}".format)


def tokens(batch, heads, size, width, *, dtype=torch.float32, seed=0):
    """q, k, v as an attention block makes them from one projection, and a gradient: each (B, H, T, D)."""
    numbers = torch.randn(batch, size, 4, heads, width, generator=torch.Generator().manual_seed(seed))
    return numbers.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)


def build(**options):
    torch.manual_seed(0)
    return build_attention("fibottention", **{**GEOMETRY, **options})


def bitwise(found, wanted):
    return all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))
