"""What denoises action chunks behind one interface; a new one is one file here, one line below and one config.

A denoiser is a ``policy.denoiser.base.Denoiser``. Samplers are tables of numbers (samplers.py) that one loop runs.
"""

from policy.registry import Registry

__all__ = ["build_denoiser", "list_denoisers"]

DENOISERS = Registry(
    "denoiser",
    __name__,
    {
        "unet1d": "unet1d:ConditionalUNet1D",
    },
)


def list_denoisers():
    """Names that ``build_denoiser`` and ``denoiser.name`` accept."""
    return list(DENOISERS)


def build_denoiser(name="unet1d", *, action_dim, condition_dim, **options):
    """The denoiser called ``name``: actions (B, T, Da), steps (B,), condition (B, K) -> noise (B, T, Da).

    Checkpoints from before there was a choice name none. Raises ValueError for an unknown name or option.
    """
    return DENOISERS.build(name, options, action_dim=action_dim, condition_dim=condition_dim)
