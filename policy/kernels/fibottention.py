"""The sparse backends of Fibottention as torch operators: one forward and one backward, for CPU and Triton kernels.

Being operators with known shapes they pass through torch.compile, torch.export, activation checkpointing and DDP.
"""

import torch

from policy.kernels import fibottention_cpu, fibottention_triton
from policy.kernels.layout import empty_gradients, empty_output
from policy.kernels.transforms import forward_mode, transform

KERNELS = {"cpu": fibottention_cpu, "triton": fibottention_triton}


def backend_for(q):
    """The sparse backend of a tensor's device, or None."""
    return {"cpu": "cpu", "cuda": "triton"}.get(q.device.type)


def why_not(backend, q, dropout_p):
    """Why ``backend`` cannot evaluate for q (B, H, T, D) now, in words, or None."""
    if transform():
        return f"transform: got {transform()}, allowed: backend=dense"
    if dropout_p:
        return f"dropout of attention weights: got {dropout_p}, allowed: 0 (it acts on unattended pairs, too)"
    return KERNELS[backend].why_not(q)


@torch.library.custom_op("fibottention::forward", mutates_args=())
def sparse_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    prefix_tokens: int,
    masked_score: str,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out (B, H, T, D), logarithm of the softmax normaliser (B, H, T) in float32."""
    return KERNELS[backend].forward(q, k, v, table, prefix_tokens=prefix_tokens, masked_score=masked_score, scale=scale)


@torch.library.custom_op("fibottention::backward", mutates_args=())
def sparse_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    table: torch.Tensor,
    prefix_tokens: int,
    masked_score: str,
    scale: float,
    backend: str,
) -> torch.Tensor:
    """-> gradients of q, k and v (3, B, H, T, D)."""
    return KERNELS[backend].backward(
        grad, q, k, v, out, lse, table, prefix_tokens=prefix_tokens, masked_score=masked_score, scale=scale
    )


@sparse_forward.register_fake
def _(q, k, v, table, prefix_tokens, masked_score, scale, backend):
    return empty_output(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@sparse_backward.register_fake
def _(grad, q, k, v, out, lse, table, prefix_tokens, masked_score, scale, backend):
    return empty_gradients(q)


def _save_for_backward(ctx, inputs, output):
    q, k, v, table, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, table)


def _differentiate(ctx, grad, _):
    if forward_mode():
        raise ValueError(f"second derivatives: got backend {ctx.options[-1]!r} under jvp, allowed: backend=dense")
    grads = sparse_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None, None)


sparse_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


def _refuse_second_derivatives(ctx, _):
    raise ValueError(f"second derivatives: got backend {ctx.backend!r}, allowed: backend=dense")


def _keep_backend(ctx, inputs, output):
    ctx.backend = inputs[-1]


sparse_backward.register_autograd(_refuse_second_derivatives, setup_context=_keep_backend)
