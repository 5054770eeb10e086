"""Floating-point operations of attention: torch counts its matrix products, a multiply-add is 2, and computes nothing.

A mechanism made of torch's operators needs nothing here. An operator of our own needs a formula as below.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from policy.kernels.fibottention import sparse_forward  # noqa: F401  defines the operator


def attention_flops(module, tokens):
    """FLOPs of ``module.attend`` on one sample of ``tokens`` = P+n without padding, in the mode of ``module``."""
    shape = 3, 1, module.num_heads, tokens, module.proj.in_features // module.num_heads
    # Fused kernels are not counted, their plain form is; tensors without memory allow any number of tokens.
    fake, counter = FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False)
    with fake, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        module.attend(*torch.empty(shape))
    return counter.get_total_flops()


@register_flop_formula(torch.ops.fibottention.forward, get_raw=True)
def fibottention_flops(q, k, v, table, prefix_tokens, *_, **__):
    """Rows and columns of the prefix and the diagonals of each head: the sparse kernels look at no other pair."""
    batch, heads, tokens, width = q.shape
    patches = tokens - prefix_tokens
    with unset_fake_temporarily():
        real = torch.arange(1, table.shape[1]) <= table[:, :1]
        pairs = heads * (tokens**2 - patches**2) + int(((patches - table[:, 1:].abs()) * real).sum())
    return 4 * batch * width * pairs
