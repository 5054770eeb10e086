"""Diffusion policies with sparse-attention vision encoders; this package knows no simulator.

Public: ``load_policy``, ``load_encoder`` (policy/checkpoint.py), ``policy.attention``, and the commands in README.
"""

from policy.torchvision_ops import declare_missing_operators

__all__ = ["load_encoder", "load_policy"]

_TORCHVISION_OPERATORS = declare_missing_operators()  # before timm is first imported; must stay alive


def __getattr__(name):
    """Import the two loaders at first use: they bring diffusers, which takes seconds (PEP 562)."""
    if name in __all__:
        from policy import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
