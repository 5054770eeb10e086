"""What torch does around a call and compiled code does not see, which would leave results silently wrong."""

import torch
from torch.autograd import forward_ad


def forward_mode():
    """Whether forward-mode derivatives are taken, by ``forward_ad`` or ``jvp``: compiled code loses the tangents."""
    return forward_ad._current_level >= 0


def transform():
    """What transforms a call that is made now, in words, or None."""
    if forward_mode():
        return "forward-mode derivatives (jvp, jacfwd)"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func (grad, vmap)"
    return None
