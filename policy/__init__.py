"""Diffusion policies with sparse-attention vision encoders; this package knows no simulator.

Public: ``load_policy`` and ``load_encoder`` (policy/checkpoint.py), ``policy.attention`` and the command lines named
in the README.
"""

from policy.torchvision_ops import declare_missing_operators

_TORCHVISION_OPERATORS = declare_missing_operators()  # before timm is first imported; must stay alive

from policy.checkpoint import load_encoder, load_policy  # noqa: E402

__all__ = ["load_encoder", "load_policy"]
