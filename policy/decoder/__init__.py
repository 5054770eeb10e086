"""State decoders behind one interface; a new one is one class, one line below and one config."""

from policy.decoder.crossway import DecoderA, DecoderB, DecoderC, DecoderD, StateDecoder
from policy.registry import check_options, lookup

__all__ = ["build_decoder", "list_decoders"]

DECODERS = {"a": DecoderA, "b": DecoderB, "c": DecoderC, "d": DecoderD, "none": None}


def list_decoders():
    """Names that ``build_decoder`` and ``decoder.name`` accept."""
    return sorted(DECODERS)


def build_decoder(name, **options):
    """The decoder called ``name`` (policy.decoder.crossway.StateDecoder), None for "none".

    Raises ValueError for an unknown name or option.
    """
    decoder = lookup("decoder", name, DECODERS)
    if decoder is None:
        return None
    check_options("decoder", name, options, StateDecoder)
    return decoder(**options)
