"""The operators and the module of Fibottention inside torch: what they refuse, compilation, export, autocast, DDP."""

import copy
import io
import json
import os
import re
import subprocess
import sys
import warnings

import numba.core.caching
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fibottention_reference import BACKENDS, HEADS, attended, bitwise, build, each_rule, evaluate, tokens
from paths import ROOT
from torch import nn
from torch.utils.checkpoint import checkpoint

from policy.attention import fibottention, fibottention_mask
from policy.attention.fibottention import diagonal_table
from policy.kernels import fibottention_cpu
from policy.kernels import fibottention_numba as fibottention_tiles
from policy.kernels import vector as numba_tools
from policy.kernels.fibottention import sparse_backward, sparse_forward

# What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_inputs_that_do_not_fit(backend):
    q, k, v, _ = tokens(1, 4, 20, 8)
    table = diagonal_table(HEADS, 19)
    refused = [("offsets", (q, k, v), {"offsets": ((0, 1), (2, wrong), (3,), (4,))}) for wrong in (-1, 1.5, "1", None)]
    refused += [("q, k, v", qkv, {}) for qkv in ((q.bfloat16(), k, v), (q, k.double(), v), (q, k, v.half()))]
    refused += [("q, k, v", qkv, {}) for qkv in ((q[0], k[0], v[0]), (q, k[:, :, 1:], v), (q, k, v[..., 1:]))]
    refused += [("offsets", (q, k, v), {"offsets": HEADS[:3]}), ("masked_score", (q, k, v), {"masked_score": "inf"})]
    refused += [("table", (q, k, v), {"table": wrong}) for wrong in (table.long(), table[:3], table.to("meta"))]
    refused += [("prefix_tokens", (q, k, v), {"prefix_tokens": wrong}) for wrong in (-1, 21)]
    for key, inputs, options in refused:
        with pytest.raises(ValueError, match=key):
            fibottention(*inputs, **{"offsets": HEADS, "backend": backend, **options})


def test_what_a_named_backend_cannot_do():
    q, k, v, _ = tokens(1, 4, 20, 8)
    refused = [("dtype", [x.to(dtype) for x in (q, k, v)], {}) for dtype in (torch.float64, torch.float16)]
    refused += [("head width", tokens(1, 4, 5, 129)[:3], {}), ("device", [x.to("meta") for x in (q, k, v)], {})]
    refused += [("dropout", (q, k, v), {"backend": name, "dropout_p": 0.1}) for name in ("cpu", "triton")]
    refused += [("backend", (q, k, v), {"backend": "cuda"})]
    for key, inputs, options in refused:
        with pytest.raises(ValueError, match=key):
            fibottention(*inputs, HEADS, **{"backend": "cpu", **options})


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


@pytest.mark.slow
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
