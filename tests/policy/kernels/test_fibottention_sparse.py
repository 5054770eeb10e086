"""Fibottention on attended pairs only (CPU kernels) and over all pairs, against float64.

Head widths are few: numba compiles the kernels once for each multiple of 16 and keeps them on disk.
"""

import concurrent.futures
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fibottention_reference import (
    BACKENDS,
    HEADS,
    RULES,
    attended,
    bitwise,
    check,
    each_backend,
    each_rule,
    evaluate,
    exact,
    tokens,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from policy.attention import fibottention, shuffle_heads, wythoff_offsets
from policy.attention.fibottention import diagonal_table
from policy.kernels import fibottention_cpu
from policy.kernels import vector as numba_tools

WIDTHS = (1, 8, 16, 20, 64)


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


@pytest.mark.slow
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
    """Means of two values, half of which lie between two bfloat16 numbers."""
    torch.manual_seed(0)
    special = torch.tensor([0x7F80, 0xFF80, 0x7FC0, 0x7FFF, 0xFFFF, 0x7F81, 0, 0x8000], dtype=torch.int32)
    a = torch.cat([torch.randn(8184).bfloat16(), special.to(torch.int16).view(torch.bfloat16)])
    b = torch.where(torch.rand(8192) < 0.5, a * (1 + 2**-7), torch.randn(8192).bfloat16())
    mean = (a.float() + b.float()) / 2
    assert (mean.view(torch.int32) & 0xFFFF == 0x8000).sum() > 1000, "hardly any ties"
    v = torch.stack([a, b]).reshape(2, 128, 64).transpose(0, 1)[:, None]  # (128, 1, 2, 64)
    q = k = torch.zeros_like(v)
    out = fibottention(q, k, v, ((0, 1),), prefix_tokens=0, backend="cpu", masked_score="exclude")
    for token in out.transpose(0, 2)[:, 0]:
        token, finite, nan = token.flatten(), mean.isfinite(), mean.isnan()
        assert torch.equal(token[finite], mean.bfloat16()[finite])
        assert token[nan].isnan().all() and nan.sum() == 4
        assert not token[~finite].isfinite().any()


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
