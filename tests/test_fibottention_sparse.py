"""Fibottention on attended pairs only (CPU kernels) and over all pairs, against float64; its place in torch.

Head widths are few: numba compiles the kernels once for each multiple of 16 and keeps them on disk.
"""

import concurrent.futures
import copy
import io
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numba.core.caching
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from policy.attention import (
    build_attention,
    fibottention,
    fibottention_cpu,
    fibottention_mask,
    fibottention_tiles,
    numba_tools,
    shuffle_heads,
    wythoff_offsets,
)
from policy.attention.fibottention import diagonal_table
from policy.attention.fibottention_sparse import sparse_backward, sparse_forward

ROOT = Path(__file__).parent.parent
RULES, BACKENDS = ("zero", "exclude"), ("dense", "cpu")
WIDTHS = (1, 8, 16, 20, 64)
HEADS = ((0, 1, 3), (), (2, 17), (5, 40))  # offsets: counts that differ, one head without any, one beyond all tokens
GEOMETRY = {"dim": 24, "num_heads": 3, "num_patches": 16, "grid": (4, 4), "layer": 1, "depth": 3, "prefix_tokens": 1}

each_rule = pytest.mark.parametrize("rule", RULES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


# Independent reference -------------------------------------------------------------------------------------------


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


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# Results and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@each_rule
@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize("variant", ["paper", "robot"])
@pytest.mark.parametrize(
    ("patches", "heads", "prefix", "width", "layer"), [(49, 12, 0, 8, 3), (100, 6, 1, 20, 7), (196, 3, 5, 64, 0)]
)
def test_published_offsets(patches, heads, prefix, width, layer, variant, modified, rule, backend):
    offsets = shuffle_heads(wythoff_offsets(patches, heads, variant=variant, modified=modified), layer)
    check(*tokens(1, heads, prefix + patches, width), offsets, prefix=prefix, rule=rule, backend=backend)


@each_rule
def test_784_tokens_and_the_widest_heads(rule):
    offsets = wythoff_offsets(784, 12, variant="robot")[4:6]
    check(*tokens(1, 2, 785, 128), offsets, prefix=1, rule=rule, backend="cpu")


LAYOUTS = {
    "contiguous": lambda randn, b, h, t, d: randn(b, h, t, d),
    "qkv": lambda randn, b, h, t, d: randn(b, t, 3, h, d).permute(2, 0, 3, 1, 4)[1],
    "behind others": lambda randn, b, h, t, d: randn(b, h, t, d + 3)[..., 3:],
    "columns": lambda randn, b, h, t, d: randn(b, h, d, t).transpose(2, 3),
    "every second": lambda randn, b, h, t, d: randn(b, h, t, 2 * d)[..., ::2],
    "one token": lambda randn, b, h, t, d: randn(b, h, 1, d).expand(b, h, t, d),
    "one row for all": lambda randn, b, h, t, d: randn(1, 1, t, d).expand(b, h, t, d),
    "one number": lambda randn, b, h, t, d: (randn(b, h, t, 1) / d**0.5).expand(b, h, t, d),  # no larger scores
}
layouts = st.sampled_from(sorted(LAYOUTS))


@each_backend
@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(
    batch=st.integers(0, 3),
    offsets=st.lists(st.lists(st.integers(0, 45), max_size=6), min_size=1, max_size=4),
    patches=st.integers(0, 40),
    prefix=st.sampled_from([0, 1, 5, 17]),
    width=st.sampled_from(WIDTHS),
    rule=st.sampled_from(RULES),
    scale=st.sampled_from([None, 0.3, -0.5, 0.0]),
    laid_out=st.tuples(layouts, layouts, layouts, layouts),
    seed=st.integers(0, 2**16),
)
@example(2, [[0, 1, 2, 3], [1, 2, 3], [7]], 4, 0, 8, "zero", None, ("qkv",) * 4, 0)  # all, all but itself, none
@example(2, [[0, 1, 2, 3], [1, 2, 3], [7]], 4, 0, 8, "exclude", None, ("qkv",) * 4, 0)
@example(1, [[0, 3, 3, 0, 16, 35]], 33, 17, 64, "zero", None, ("contiguous",) * 4, 0)  # tiles of one token
@example(2, [[1]], 0, 0, 16, "zero", None, ("contiguous",) * 4, 0)  # no tokens
def test_any_offsets_sizes_and_strides(backend, batch, offsets, patches, prefix, width, rule, scale, laid_out, seed):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = [LAYOUTS[name](randn, batch, len(offsets), prefix + patches, width) for name in laid_out]
    check(*inputs, offsets, prefix=prefix, rule=rule, backend=backend, scale=scale)


def test_a_given_table_may_lie_in_memory_in_any_way():
    inputs = tokens(1, 4, 20, 8)
    wanted = evaluate(*inputs, HEADS)[0]
    table = diagonal_table(HEADS, 19)
    for given_table in (table, table.t().contiguous().t(), table.repeat_interleave(2, dim=0)[::2]):
        assert torch.equal(fibottention(*inputs[:3], HEADS, backend="cpu", table=given_table), wanted)


@each_rule
def test_logarithm_of_the_normaliser(rule):
    """What the backward pass gets from the forward pass; a row that attends to nothing has +inf."""
    q, k, v, _ = tokens(2, 4, 20, 8)
    options = {"prefix_tokens": 0, "masked_score": rule, "scale": 0.3}
    lse = fibottention_cpu.forward(q, k, v, diagonal_table(HEADS, 20), **options)[1]
    scores = 0.3 * torch.einsum("bhid,bhjd->bhij", q.double(), k.double())
    scores = torch.where(attended(HEADS, 20, 0), scores, 0.0 if rule == "zero" else -math.inf)
    wanted = scores.logsumexp(dim=3).float()
    torch.testing.assert_close(lse, torch.where(wanted == -math.inf, math.inf, wanted))


@each_rule
def test_gradient_of_one_input_alone(rule):
    q, k, v, grad = tokens(2, 4, 20, 8)
    _, *wanted = evaluate(q, k, v, grad, HEADS, rule=rule)
    for place, want in enumerate(wanted):
        inputs = [x.detach().requires_grad_(place == number) for number, x in enumerate((q, k, v))]
        out = fibottention(*inputs, HEADS, masked_score=rule, backend="cpu")
        assert torch.equal(torch.autograd.grad(out, inputs[place], grad)[0], want)


@each_rule
@each_backend
def test_gradcheck(backend, rule):
    """Finite differences in float64 of the reference, in float32 of the kernels."""
    dtype, steps = {
        "dense": (torch.float64, {}),
        "cpu": (torch.float32, {"eps": 1e-2, "atol": 1e-2, "rtol": 1e-2}),
    }[backend]
    inputs = [x.to(dtype).requires_grad_() for x in tokens(2, 2, 6, 3)[:3]]

    def attend(q, k, v):
        return fibottention(q, k, v, ((0, 1), (3,)), masked_score=rule, backend=backend)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input #. requires gradient and is not a double precision")
        assert torch.autograd.gradcheck(attend, inputs, nondet_tol=0.0, **steps)


def test_second_derivative_raises_on_the_kernels():
    q, k, v, grad = tokens(1, 4, 12, 8)
    first = {}
    for backend in BACKENDS:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = fibottention(*inputs, HEADS, backend=backend)
        first[backend] = torch.autograd.grad(out, inputs, grad, create_graph=True)[0], inputs
    gradient, inputs = first["cpu"]
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(gradient.square().sum(), inputs)
    gradient, inputs = first["dense"]
    assert all(x.abs().max() > 0 for x in torch.autograd.grad(gradient.square().sum(), inputs))


@each_backend
@each_rule
@pytest.mark.parametrize("times", [1_000, 10_000])
def test_large_queries(times, rule, backend):
    """Scores up to about ``times``, of whole numbers that float32 holds; its logarithm of their sum it must round."""
    q, k, v, grad = tokens(1, 4, 30, 16)
    q, k = (x.mul(2).round().clamp(-4, 4) for x in (q, k))
    largest = torch.einsum("bhid,bhjd->bhij", q, k).abs().max().item() / 4
    q = q * 2.0 ** math.floor(math.log2(times / largest))
    check(q, k, v, grad, HEADS, prefix=1, rule=rule, backend=backend, atol=1e-7 * times, rtol=1e-7 * times)


@each_backend
@each_rule
def test_scores_far_below_zero(rule, backend):
    """Under the published rule unattended pairs take all the weight, but a row that attends to all keeps its digits."""
    offsets = ((), (2, 17), (0, 1), (0, 1, 2, 9))  # the last two join the middle of three patches, or each, to all
    q, k, v, grad = (x.clone() for x in tokens(1, 4, 4, 8))
    q[..., 0], k[..., 0] = 20, -20
    check(q, k, v, grad, offsets, prefix=1, rule=rule, backend=backend, scale=0.5, atol=1e-3)  # scores near -200
    out = evaluate(q, k, v, grad, offsets, prefix=1, rule="zero", backend=backend, scale=0.5)[0]
    torch.testing.assert_close(out[0, 0, 1:], v[0, 0, 1:].mean(dim=0).expand(3, -1))  # of the unattended patches


# Bfloat16 --------------------------------------------------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("layout", ["qkv", "behind others", "every second", "one row for all"])
@pytest.mark.parametrize(("prefix", "patches", "width"), [(0, 40, 20), (5, 30, 16), (1, 49, 64)])
def test_bfloat16_is_rounded_once(prefix, patches, width, layout, rule):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    inputs = [LAYOUTS[layout](randn, 2, 4, prefix + patches, width) for _ in range(4)]
    found = evaluate(*inputs, HEADS, prefix=prefix, rule=rule)
    wanted = exact(*inputs, HEADS, prefix=prefix, rule=rule)
    for name, got, want in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert got.dtype == torch.bfloat16
        # Half a unit in the last place; gradients of q and k see the rounded output, too.
        more = 1e-5 if name in ("out", "dv") else 4e-3 * want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=more, msg=f"{name}: {{}}".format)


def test_bfloat16_rounds_to_nearest_even():
    """Means of two values, half of which lie between two bfloat16 numbers; NaN and infinity stay what they are."""
    torch.manual_seed(0)
    special = torch.tensor([0x7F80, 0xFF80, 0x7FC0, 0x7FFF, 0xFFFF, 0x7F81, 0, 0x8000], dtype=torch.int32)
    a = torch.cat([torch.randn(8184).bfloat16(), special.to(torch.int16).view(torch.bfloat16)])
    b = torch.where(torch.rand(8192) < 0.5, a * (1 + 2**-7), torch.randn(8192).bfloat16())
    mean = (a.float() + b.float()) / 2
    ties = mean.view(torch.int32) & 0xFFFF == 0x8000
    assert ties.sum() > 1000 and mean.isnan().sum() >= 4
    v = torch.stack([a, b]).reshape(2, 128, 64).transpose(0, 1)[:, None]  # (128, 1, 2, 64)
    q = k = torch.zeros_like(v)
    out = fibottention(q, k, v, ((0, 1),), prefix_tokens=0, backend="cpu", masked_score="exclude")
    wanted = mean.bfloat16().reshape(128, 1, 1, 64).expand(out.shape)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0, equal_nan=True)


# NaN and infinity ------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("bad", [3, 19, 36])
def test_a_bad_token_reaches_those_that_attend_to_it(bad, prefix, place, value, backend):
    """Under rule "exclude": nothing else changes, on the kernels not by a bit."""
    inputs = dict(zip("qkv", tokens(2, 4, 37, 8)[:3], strict=True))
    options = {"prefix_tokens": prefix, "masked_score": "exclude", "backend": backend}
    clean = fibottention(*inputs.values(), HEADS, **options)
    inputs[place] = inputs[place].clone()
    inputs[place][1, 2, bad, 5] = value
    out = fibottention(*inputs.values(), HEADS, **options)
    hit = torch.zeros(2, 4, 37, dtype=torch.bool)
    if place == "q":
        hit[1, 2, bad] = True
    else:
        hit[1, 2] = attended(HEADS, 37, prefix)[2, :, bad]
    assert hit.any()
    if backend == "cpu":
        assert torch.equal(out[~hit], clean[~hit])
    else:
        torch.testing.assert_close(out[~hit], clean[~hit])
    if math.isnan(value) or place == "v":
        assert torch.equal(~out.isfinite().all(dim=3), hit)


# The same bits every time ----------------------------------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_threads_and_batches_change_no_bit(dtype, rule):
    inputs = tokens(3, 4, 45, 20, dtype=dtype)
    once = evaluate(*inputs, HEADS, rule=rule)
    assert bitwise(evaluate(*inputs, HEADS, rule=rule), once)
    before = torch.get_num_threads()
    try:
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert bitwise(evaluate(*inputs, HEADS, rule=rule), once)
    finally:
        torch.set_num_threads(before)
    for row in range(3):
        alone = evaluate(*(x[row : row + 1] for x in inputs), HEADS, rule=rule)
        assert bitwise(alone, [x[row : row + 1] for x in once])


def test_layout_of_the_inputs_changes_no_bit():
    inputs = tokens(2, 4, 45, 16)
    assert bitwise(evaluate(*(x.contiguous() for x in inputs), HEADS), evaluate(*inputs, HEADS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_heads_copies_nothing(dtype):
    for result in evaluate(*tokens(2, 4, 20, 8, dtype=dtype), HEADS):
        assert result.transpose(1, 2).is_contiguous()


def test_calls_from_several_python_threads(two_threads):
    inputs = [tokens(2, 4, 60, 16, seed=seed) for seed in range(8)]
    wanted = [evaluate(*x, HEADS) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda x: evaluate(*x, HEADS), inputs))
            assert all(bitwise(got, want) for got, want in zip(found, wanted, strict=True))


class Evaluations:
    """A dataset whose items are computed by the kernels."""

    def __len__(self):
        return 3

    def __getitem__(self, seed):
        return evaluate(*tokens(2, 4, 60, 16, seed=seed), HEADS)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_calls_in_a_forked_worker(two_threads):
    wanted = [Evaluations()[seed] for seed in range(3)]  # starts the OpenMP threads, which a fork does not inherit
    found = list(DataLoader(Evaluations(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60))
    assert all(bitwise(got, want) for got, want in zip(found, wanted, strict=True))


# What is refused -------------------------------------------------------------------------------------------------


def test_errors_name_what_came_and_what_may():
    q, k, v, _ = tokens(1, 4, 20, 8)
    with pytest.raises(ValueError, match="backend: got 'cuda', allowed: 'auto', 'dense', 'cpu', 'triton'"):
        fibottention(q, k, v, HEADS, backend="cuda")
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(ValueError, match=f"'cpu': dtype: got {dtype}, allowed: torch.float32, torch.bfloat16"):
            fibottention(q.to(dtype), k.to(dtype), v.to(dtype), HEADS, backend="cpu")
    with pytest.raises(ValueError, match="'cpu': head width: got 129, allowed: up to 128"):
        fibottention(*tokens(1, 4, 5, 129)[:3], HEADS, backend="cpu")
    for backend in ("cpu", "triton"):
        with pytest.raises(ValueError, match=f"'{backend}': dropout of attention weights: got 0.1, allowed: 0"):
            fibottention(q, k, v, HEADS, backend=backend, dropout_p=0.1)
    with pytest.raises(ValueError, match="'cpu': device: got meta, allowed: cpu"):
        fibottention(*(x.to("meta") for x in (q, k, v)), HEADS, backend="cpu")


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_inputs_that_do_not_fit(backend):
    q, k, v, _ = tokens(1, 4, 20, 8)
    for wrong in (-1, 1.0, 1.5, "1", None):
        offsets = ((0, 1), (2, wrong), (3,), (4,))
        with pytest.raises(ValueError, match=rf"offsets: got {wrong!r}, allowed: integers >= 0"):
            fibottention(q, k, v, offsets, backend=backend)
    for wrong in ((q.bfloat16(), k, v), (q, k.double(), v), (q, k, v.half())):
        with pytest.raises(ValueError, match="q, k, v: got .*, allowed: one dtype and device"):
            fibottention(*wrong, HEADS, backend=backend)
    for wrong in ((q[0], k[0], v[0]), (q, k[:, :, 1:], v), (q, k, v[..., 1:]), (q, k[:, :1], v)):
        with pytest.raises(ValueError, match=r"q, k, v: got \(.*allowed: one \(B, H, P\+N, D\)"):
            fibottention(*wrong, HEADS, backend=backend)
    with pytest.raises(ValueError, match="offsets: got 3 heads, allowed: 4"):
        fibottention(q, k, v, HEADS[:3], backend=backend)
    table = diagonal_table(HEADS, 19)
    for wrong in (table.long(), table[:3], table.to("meta")):
        with pytest.raises(ValueError, match="table: got .*, allowed: diagonal_table"):
            fibottention(q, k, v, HEADS, backend=backend, table=wrong)
    for prefix in (-1, 21):
        with pytest.raises(ValueError, match=f"prefix_tokens: got {prefix}, allowed: 0 to 20"):
            fibottention(q, k, v, HEADS, prefix_tokens=prefix, backend=backend)


FALLBACKS = {
    "dtype: got torch.float64": (torch.float64, 8, 0.0),
    "dtype: got torch.float16": (torch.float16, 8, 0.0),
    "head width: got 129": (torch.float32, 129, 0.0),
    "dropout of attention weights: got 0.25": (torch.float32, 8, 0.25),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_auto_warns_where_it_evaluates_densely(reason):
    dtype, width, dropout_p = FALLBACKS[reason]
    q, k, v, _ = tokens(1, 4, 20, width, dtype=dtype)

    def attend(backend):
        torch.manual_seed(0)
        return fibottention(q, k, v, HEADS, backend=backend, dropout_p=dropout_p)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = attend("auto")
        assert [(w.category, w.filename) for w in caught] == [(UserWarning, __file__)]
        assert re.match(f"Fibottention is evaluated densely, over all pairs. {reason}", str(caught[0].message))
        assert torch.equal(out, attend("dense"))
        assert len(caught) == 1, "what was asked for gives no warning"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            attend("auto")
    assert len(caught) == 1


def test_auto_takes_the_kernels_without_a_warning():
    for dtype in (torch.float32, torch.bfloat16):
        inputs = tokens(2, 4, 200, 16, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert bitwise(evaluate(*inputs, HEADS, backend="auto"), evaluate(*inputs, HEADS, backend="cpu"))


# Compilation -------------------------------------------------------------------------------------------------

FRESH = """
import json, torch
from numba.core import event
from policy.attention import fibottention
x = torch.ones(1, 2, 9, 16, requires_grad=True)
answers = {}
with event.install_recorder("numba:compile") as record:
    fibottention(x, x, x, ((0, 1), (2,)), backend="cpu").sum().backward()
answers["compiled"] = len(record.buffer)
try:
    fibottention(x, x, x, ((0, 1), (2,)), backend="triton")
except ValueError as error:
    answers["triton"] = str(error)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def fresh():
    """What a new process finds after this one has used the kernels for heads of 16."""
    evaluate(*tokens(1, 2, 9, 16), ((0, 1), (2,)))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", FRESH], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_kernels_are_compiled_once_for_all_processes(fresh):
    assert fresh["compiled"] == 0


def test_triton_refuses_tensors_of_the_cpu(fresh):
    assert re.match("backend 'triton': (device: got cpu, allowed: cuda|triton: got no such package)", fresh["triton"])


def test_kernels_compile_where_no_folder_can_be_written_to(monkeypatch):
    """The first task of a stand-in for the kernel, which takes seconds to compile, is to write its head width."""

    @numba_tools.compiled
    def stand_in(task, padded_width):
        task[0] = padded_width

    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    monkeypatch.setattr(fibottention_tiles, "forward", stand_in)
    task = np.zeros(fibottention_tiles.TASK_SIZE, np.int64)
    fibottention_cpu._compile.__wrapped__("forward", 48).ctypes(task.ctypes.data)
    assert task[0] == 48


# As part of torch ------------------------------------------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_keep_torchs_rules(dtype, rule):
    *inputs, grad = tokens(2, 4, 20, 8, dtype=dtype)
    options = diagonal_table(HEADS, 19), 1, rule, 0.25, "cpu"
    out, lse = sparse_forward(*inputs, *options)
    torch.library.opcheck(sparse_backward, (grad, *inputs, out, lse, *options))
    torch.library.opcheck(sparse_forward, (*(x.detach().requires_grad_() for x in inputs), *options))
    torch.library.opcheck(sparse_forward, (*(x.contiguous() for x in inputs), *options))


@pytest.mark.parametrize("table", [None, "given"])
def test_compiled_function(table):
    inputs = tokens(2, 4, 20, 8)
    if table:
        table = diagonal_table(HEADS, 19)

    def attend(q, k, v):
        return fibottention(q, k, v, HEADS, backend="cpu", table=table)

    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    torch._dynamo.reset()
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(*leaves)
    assert bitwise([out, *torch.autograd.grad(out, leaves, inputs[3])], evaluate(*inputs, HEADS))


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_compiled_module(backend):
    attention = build(backend=backend)
    torch._dynamo.reset()
    x, found = torch.randn(2, 17, 24), []
    for module in (torch.compile(attention, fullgraph=True, backend="aot_eager"), attention):
        out = module(x)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), attention.parameters())])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["auto", "cpu", "dense"])
def test_exported_module(backend):
    attention = build(backend=backend).eval()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(attention, (torch.randn(2, 17, 24),), dynamic_shapes=(batch,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.randn(5, 17, 24)
    torch.testing.assert_close(torch.export.load(file).module()(x), attention(x))


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_autocast_as_in_torchs_own_attention(backend):
    q, k, v, grad = tokens(2, 4, 20, 8)
    half = [x.bfloat16() for x in (q, k, v)]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = fibottention(*leaves, HEADS, backend=backend)
        mixed = fibottention(q, half[1], v, HEADS, backend=backend)
        assert out.dtype == mixed.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        double = fibottention(q.double(), k.double(), v.double(), HEADS, backend="dense")
        assert double.dtype == F.scaled_dot_product_attention(q.double(), k.double(), v.double()).dtype
    wanted, *gradients = evaluate(*half, grad.bfloat16(), HEADS, backend=backend)
    assert torch.equal(out, wanted) and torch.equal(mixed, wanted)
    found = torch.autograd.grad(out, leaves, grad.bfloat16())
    assert all(g.dtype == torch.float32 for g in found)
    assert bitwise(found, [g.float() for g in gradients])


@each_rule
def test_checkpointed_activations(rule):
    inputs = tokens(2, 4, 20, 8)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]

    def attend(q, k, v):
        return fibottention(q, k, v, HEADS, masked_score=rule, backend="cpu")

    for reentrant in (False, True):
        out = checkpoint(attend, *leaves, use_reentrant=reentrant)
        out.backward(inputs[3])
        assert bitwise([out.detach(), *(x.grad for x in leaves)], evaluate(*inputs, HEADS, rule=rule))
        for x in leaves:
            x.grad = None


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_distributed_training_step(tmp_path):
    attention, alone, x = build(), build(), torch.randn(2, 17, 24)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for module in (nn.parallel.DistributedDataParallel(attention), alone):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            module(x).square().sum().backward()
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(attention.state_dict(), alone.state_dict())
    assert not torch.equal(alone.qkv.weight, build().qkv.weight)


# Memory ----------------------------------------------------------------------------------------------------------


def peak_of(call):
    """Bytes by which the resident memory rose at most during ``call``."""

    def status(key):
        return 1024 * int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the peak of the resident memory cannot be reset here")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


@each_rule
def test_memory_grows_with_the_tokens_not_with_the_pairs(rule):
    patches = 4096
    square = 4 * patches**2
    offsets = wythoff_offsets(patches, 12)[:1]
    evaluate(*tokens(1, 1, 2, 16), offsets, rule=rule)  # compiles
    inputs = tokens(1, 1, 1 + patches, 16)
    assert peak_of(lambda: evaluate(*inputs, offsets, rule=rule)) < square / 8
    dense = peak_of(lambda: fibottention(*inputs[:3], offsets, masked_score=rule, backend="dense"))
    assert dense > square, "this measurement would not see a square matrix"


# The module ------------------------------------------------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_module_on_both_backends(prefix, rule):
    x = torch.randn(2, prefix + 16, 24)
    found = []
    for backend in (*BACKENDS, "auto"):
        attention = build(prefix_tokens=prefix, masked_score=rule, backend=backend, variant="robot")
        out = attention(x)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), attention.parameters())])
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_mask_is_made_on_demand(prefix):
    attention = build(prefix_tokens=prefix)
    assert set(attention.state_dict()) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert all(tensor.numel() < 16**2 for tensor in attention.buffers())
    mask = attention.mask
    assert mask.dtype == torch.bool and torch.equal(mask, attended(attention.offsets, prefix + 16, prefix))
    assert torch.equal(mask, fibottention_mask(attention.offsets, 16, prefix_tokens=prefix))
    density = mask[:, prefix:, prefix:].double().mean().item()
    assert attention.density() == pytest.approx(density, abs=1e-12)
    assert f"density={density:.3f}" in repr(attention)


@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, lambda m: m.bfloat16(), lambda m: m.half().float(), lambda m: m.double().to(torch.float32)],
    ids=["deepcopy", "bfloat16", "half", "double"],
)
def test_table_survives_copies_and_casts(change):
    attention = build()
    table = attention.table.clone()
    changed = change(attention)
    assert changed.table.dtype == torch.int32 and torch.equal(changed.table, table)
    x = torch.randn(2, 17, 24)
    half = next(changed.parameters()).dtype == torch.bfloat16
    out = changed(x.bfloat16() if half else x)
    tolerance = 3e-2 if half else 1e-3
    torch.testing.assert_close(out.float(), build()(x), rtol=tolerance, atol=tolerance)


def test_module_without_memory():
    """On the meta device shapes are known, the module prints, and ``auto`` has only the dense formula."""
    attention = build().to("meta")
    assert attention.table.dtype == torch.int32 and attention.mask.shape == (3, 17, 17)
    assert "density=" in repr(attention)
    with pytest.warns(UserWarning, match="device: got meta, allowed: cpu, cuda"):
        assert attention(torch.empty(2, 17, 24, device="meta")).shape == (2, 17, 24)


def test_dropout_of_weights_is_dense_and_warns():
    x = torch.randn(2, 17, 24)
    out = []
    for backend in ("auto", "dense"):
        attention = build(attn_drop=0.25, backend=backend)
        torch.manual_seed(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out.append(attention(x))
        assert len(caught) == (backend == "auto")
    assert torch.equal(*out)
    with pytest.raises(ValueError, match="backend 'cpu': dropout of attention weights: got 0.25"):
        build(attn_drop=0.25, backend="cpu")(x)
    build(attn_drop=0.25, backend="cpu").eval()(x)


# The kernels' exponential ----------------------------------------------------------------------------------------


@numba_tools.compiled
def exponentials(x, y):
    for i in range(len(x)):
        y[i] = numba_tools.exp(x[i])


def test_exponential():
    """Also inlined into code whose sums may be reordered, as the kernels' may."""
    x = np.linspace(-87, 88, 1_000_000, endpoint=False).astype(np.float32)
    x = np.concatenate([x[x < 88], np.linspace(-1, 1, 100_001, dtype=np.float32)])
    y = np.empty_like(x)
    exponentials(x, y)
    wanted = np.exp(x.astype(np.float64))
    assert np.abs(y / wanted - 1).max() < 3e-7
    x = np.array([0, -0.0, -np.inf, -1e30, -88, np.nan], np.float32)
    y = np.empty_like(x)
    exponentials(x, y)
    np.testing.assert_array_equal(y, np.array([1, 1, 0, 0, 0, np.nan], np.float32))
