"""State decoders behind one interface; a new one is one file here, one line below and one config.

A decoder is a ``policy.decoder.crossway.StateDecoder`` that says what each key is decoded from. It takes part in
training only.
"""

from policy.registry import Registry

__all__ = ["build_decoder", "list_decoders"]


DECODERS = Registry(
    "decoder",
    __name__,
    {
        "a": "crossway:DecoderA",
        "b": "crossway:DecoderB",
        "c": "crossway:DecoderC",
        "d": "crossway:DecoderD",
        "none": None,  # the plain diffusion policy
    },
)


def list_decoders():
    """Names that ``build_decoder`` and ``decoder.name`` accept."""
    return list(DECODERS)


def build_decoder(name, *, shape_meta, obs_steps, bottleneck, condition_dim, **options):
    """The decoder called ``name``, None for "none".

    shape_meta: {key: {"type", "shape"}} of the observation; obs_steps: To; bottleneck: (C, T') of the denoiser;
    condition_dim: K of a step. Raises ValueError for an unknown name or option.
    """
    if DECODERS[name] is None:
        return None
    given = {"shape_meta": shape_meta, "obs_steps": obs_steps, "bottleneck": bottleneck, "condition_dim": condition_dim}
    return DECODERS.build(name, options, **given)
