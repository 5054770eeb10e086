"""The Triton kernels of Fibottention against dense float64 formulas; on a machine without CUDA they are interpreted."""

import importlib.util
import math
import os
import subprocess
import sys

import fibottention_reference
import pytest
import torch
from fibottention_reference import RULES, attended

from policy.attention import fibottention, wythoff_offsets
from policy.kernels import fibottention_triton as kernels

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, on lanes that the kernels leave out

BLOCK = kernels.BLOCK
FAR = (BLOCK + 3, 1000)  # beyond one tile, beyond all tokens
HEADS = ((0, 1, 3, 5), (), FAR, (4,))  # offsets: counts that differ, one head without any
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest number


# Independent reference -------------------------------------------------------------------------------------------


def table_of(heads):
    """int32 (H, 1+S): the number of signed diagonals of each head, the diagonals ascending, rubbish."""
    signed = [sorted({sign * o for o in offsets for sign in (-1, 1)}) for offsets in heads]
    width = max(map(len, signed)) + 2
    rows = [[len(deltas), *deltas, *[1] * (width - len(deltas))] for deltas in signed]
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE).reshape(len(heads), width + 1)


def dense(q, k, v, mask, rule, scale):
    """out, lse in float64 from all pairs."""
    score = scale * torch.einsum("bhid,bhjd->bhij", q, k)
    score = torch.where(mask, score, 0.0 if rule == "zero" else -torch.inf)
    empty = (score == -torch.inf).all(-1)
    lse = torch.where(empty[..., None], 0.0, score).logsumexp(-1)
    weight = torch.where(empty[..., None], 0.0, (score - lse[..., None]).exp())
    return torch.einsum("bhij,bhjd->bhid", weight, v), torch.where(empty, torch.inf, lse)


def tokens(*sizes, dtype=torch.float32):
    return [x.to(DEVICE) for x in fibottention_reference.tokens(*sizes, dtype=dtype)]


def run(q, k, v, grad_out, *, heads=HEADS, prefix=1, rule="zero", scale=0.3):
    """out, lse, dq, dk, dv of the kernels."""
    options = {"prefix_tokens": prefix, "masked_score": rule, "scale": scale}
    table = table_of(heads)
    out, lse = kernels.forward(q, k, v, table, **options)
    return out, lse, *kernels.backward(grad_out, q, k, v, out, lse, table, **options)


def check(q, k, v, grad_out, *, tolerance=None, heads=HEADS, prefix=1, rule="zero", scale=0.3):
    """``run`` equals autograd through ``dense``, within ``tolerance`` of the largest number of each result."""
    found = run(q, k, v, grad_out, heads=heads, prefix=prefix, rule=rule, scale=scale)
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    out, lse = dense(*exact, attended(heads, q.shape[2], prefix), rule, scale)
    wanted = out, lse, *torch.autograd.grad(out, exact, grad_out.cpu().double())
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        dtype = torch.float32 if name == "lse" else q.dtype
        assert (name, got.dtype, got.shape) == (name, dtype, want.shape)
        finite = want[want.isfinite()].abs()
        allowed = (tolerance or TOLERANCE[dtype]) * max(1.0, finite.max().item() if finite.numel() else 0.0)
        torch.testing.assert_close(got.cpu().double(), want.detach(), rtol=0, atol=allowed, msg=f"{name}: {{}}".format)


# Against the reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("patches", "prefix", "width", "heads"),
    [
        (BLOCK + 5, 0, 20, HEADS),
        (BLOCK + 5, 1, 128, HEADS),
        (2 * BLOCK, 5, 8, HEADS[:3]),
        (9, 1, 64, HEADS),  # fewer patches than the largest offset
        (2, BLOCK + 1, 8, HEADS[:1]),  # more prefix tokens than one step of theirs takes
        (4, 0, 8, ((0, 1, 2, 3), (1, 2, 3), (0, 1), (7,))),  # rows that attend to all, to all but themselves, to none
        (4, 1, 8, ((0, 1, 2, 3, 9), (0, 1, 2), (1, 2, 3))),
        (1, 0, 8, HEADS),
        (0, 5, 8, HEADS[:1]),
    ],
)
def test_results_and_gradients(patches, prefix, width, heads, rule):
    batch = 2 if patches < BLOCK else 1
    check(*tokens(batch, len(heads), prefix + patches, width), heads=heads, prefix=prefix, rule=rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, rule):
    """Sums are float32: lse is as exact as for float32 tokens."""
    check(*tokens(1, len(HEADS), BLOCK + 4, 20, dtype=dtype), rule=rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("times", [100, 10_000])
def test_large_scores(times, rule):
    """Scores to about +-``times`` of whole numbers, which float32 holds exactly; lse itself is rounded to float32."""
    q, k, v, grad_out = tokens(1, len(HEADS), 14, 8)
    q, k = (x.mul(2).round().clamp(-4, 4) for x in (q, k))
    largest = torch.einsum("bhid,bhjd->bhij", q, k).abs().max().item()
    scale = 2.0 ** math.floor(math.log2(times / largest))
    check(q, k, v, grad_out, rule=rule, scale=scale, tolerance=max(1e-5, 2e-7 * times))


@pytest.mark.parametrize("rule", RULES)
def test_all_scores_far_below_zero(rule):
    """Under rule "zero" the unattended pairs take all the weight, but a row that attends to all keeps its digits."""
    heads = (*HEADS[1:], (0, 1), (0, 1, 2, 9))  # the last two join the middle patch of three, or every one, to all
    q, k, v, grad_out = tokens(1, len(heads), 4, 8)
    check(q.abs() + 1, -k.abs() - 1, v, grad_out, heads=heads, rule=rule, scale=50.0, tolerance=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_as_a_backend(rule):
    """``fibottention(backend="triton")`` with the published offsets equals backend "dense", gradients included."""
    offsets = wythoff_offsets(20, 4, variant="robot")
    results = []
    for backend in ("triton", "dense"):
        q, k, v, grad_out = (x.detach().requires_grad_() for x in tokens(1, 4, 21, 8))
        out = fibottention(q, k, v, offsets, masked_score=rule, backend=backend)
        results.append((out, *torch.autograd.grad(out, (q, k, v), grad_out)))
    for sparse, dense_result in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense_result, rtol=1e-4, atol=1e-5)


# Properties ------------------------------------------------------------------------------------------------------


def test_any_strides():
    """Each tensor may lie in memory in its own way; results lie as (B, T, H, D), so that joining heads is free."""
    q, k, v, grad_out = tokens(2, len(HEADS), 7, 8)
    padded = torch.nn.functional.pad(v, (3, 2))[..., 3:-2]
    columns = k.transpose(2, 3).contiguous().transpose(2, 3)  # last stride not 1
    by_token = grad_out.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    out, lse, *gradients = run(q, k, v, grad_out)
    check(q.contiguous(), columns, padded, by_token)
    check(columns, padded, q.contiguous(), torch.ones((), device=DEVICE).expand(q.shape))  # as of out.sum()
    assert all(x.transpose(1, 2).is_contiguous() for x in (out, *gradients))
    assert lse.is_contiguous()


@pytest.mark.parametrize("rule", RULES)
def test_two_runs_are_equal_bit_by_bit(rule):
    inputs = tokens(1, len(HEADS), BLOCK + 6, 20, dtype=torch.bfloat16)
    for first, second in zip(run(*inputs, rule=rule), run(*inputs, rule=rule), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("value", "prefix", "bad"), [(torch.nan, 1, 6), (torch.inf, 0, 0)])
def test_a_bad_token_reaches_only_those_that_attend_to_it(value, prefix, bad):
    q, k, v, grad_out = tokens(1, len(HEADS), BLOCK + 6, 8)
    clean = run(q, k, v, grad_out, prefix=prefix, rule="exclude")
    for x in (q, k, v):
        x[:, :, bad] = value
    out, lse, *_ = run(q, k, v, grad_out, prefix=prefix, rule="exclude")
    meet = attended(HEADS, q.shape[2], prefix)
    reached = meet[:, :, bad].clone()
    reached[:, bad] = meet[:, bad].any(-1)  # it is a query too
    reached = reached[None].to(DEVICE)
    assert torch.equal(out[~reached], clean[0][~reached])
    assert torch.equal(lse[~reached], clean[1][~reached])
    assert not out[reached].isfinite().all(-1).any()


def test_a_token_that_meets_none_gives_zero_whatever_it_holds():
    bad = torch.full((1, 2, 5, 8), torch.nan, device=DEVICE)
    out, lse, *gradients = run(bad, bad, bad, torch.ones_like(bad), heads=((), (1000,)), prefix=0, rule="exclude")
    assert (lse == torch.inf).all()
    assert all((x == 0).all() for x in (out, *gradients))


@pytest.mark.parametrize("shape", [(0, 4, 7, 8), (2, 0, 7, 8), (2, 4, 0, 8), (2, 4, 7, 0)])
def test_empty_tensors(shape):
    q = torch.zeros(shape, device=DEVICE)
    out, lse, *gradients = run(q, q, q, q, heads=HEADS[: shape[1]] or [()], prefix=min(1, shape[2]))
    assert lse.shape == shape[:3]
    assert all(x.shape == shape for x in (out, *gradients))


def fresh_module():
    """The kernels as they come up in the environment of the moment: a copy, which no other test sees."""
    spec = importlib.util.spec_from_file_location("fibottention_triton", kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_why_not(monkeypatch):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert kernels.why_not(torch.zeros(1, 1, 1, 128, dtype=dtype, device=DEVICE)) is None
    assert kernels.why_not(torch.zeros(1, 1, 1, 8, dtype=torch.float64, device=DEVICE)).startswith("dtype")
    assert kernels.why_not(torch.zeros(1, 1, 1, 129, device=DEVICE)).startswith("head width")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert fresh_module().why_not(torch.zeros(1, 1, 1, 8)).startswith("device")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in fresh_module().why_not(torch.zeros(1, 1, 1, 8, device=DEVICE))


COMPILE = r"""
import importlib.util, re, subprocess, sys
import torch
try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    tools = triton.knobs.nvidia.ptxas.path, triton.knobs.nvidia.cuobjdump.path
except Exception as error:
    sys.exit(f"cannot cross-compile: {error!r}")
spec = importlib.util.spec_from_file_location("fibottention_triton", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)

FLOATS = ("lse", "sum_v", "delta", "base_weight", "base_sum")
NUMBERS = ("tiles", "H", "T", "P", "table_row")
path = sys.argv[2] + "/kernel.cubin"
for arch in (80, 90):
    for dtype, rule, width in (("bf16", "zero", 64), ("fp32", "zero", 64), ("fp32", "exclude", 128)):
        for kernel in (kernels._forward_kernel, kernels._delta_kernel, kernels._backward_kernel):
            options = kernels._shape(torch.empty(1, 1, 1, width), rule)
            constants = {name: options.pop(name) for name in ("ZERO", "D", "WIDTH", "BLOCK")}
            if rule == "exclude":
                constants |= {name: None for name in kernel.arg_names if name in ("sum_v", "base_weight", "base_sum")}
            signature, hints = {}, {}
            for index, name in enumerate(kernel.arg_names):
                stride = name[-2:] in ("_b", "_h", "_t")
                if name in constants:
                    signature[name] = "constexpr"
                elif stride or name in NUMBERS:
                    signature[name] = "i32"
                elif name == "scale":
                    signature[name] = "fp32"
                else:
                    signature[name] = "*fp32" if name in FLOATS else "*i32" if name == "table" else "*" + dtype
                if stride or signature[name][0] == "*":
                    hints[(index,)] = [["tt.divisibility", 16]]
            source = ASTSource(kernel, signature, constants, hints)
            binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]
            open(path, "wb").write(binary)
            usage = subprocess.run([tools[1], "--dump-resource-usage", path], capture_output=True, text=True).stdout
            registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
            print(arch, dtype, rule, width, kernel.__name__, registers, stack)
"""


@pytest.mark.slow
def test_kernels_compile_for_real_devices(tmp_path):
    """For A100 and H100 without either: both rules, bf16 and float32; next to nothing is spilled from registers."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, kernels.__file__, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.stderr.startswith("cannot cross-compile"):
        pytest.skip(result.stderr)
    assert result.returncode == 0, result.stderr
    stack = [int(line.split()[-1]) for line in result.stdout.splitlines()]  # bytes a thread
    assert len(stack) == 18
    assert max(stack) <= 64, result.stdout
