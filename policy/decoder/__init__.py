"""State decoders behind one interface; a new one is one class, one line below and one config."""

from policy.decoder.crossway import DecoderA, DecoderB, DecoderC, DecoderD
from policy.registry import lookup

__all__ = ["build_decoder", "list_decoders"]

DECODERS = {"a": DecoderA, "b": DecoderB, "c": DecoderC, "d": DecoderD, "none": None}


def list_decoders():
    """Names that ``build_decoder`` and ``decoder.name`` accept."""
    return sorted(DECODERS)


def build_decoder(name, **options):
    """The decoder called ``name`` (policy.decoder.crossway.StateDecoder), None for "none"."""
    decoder = lookup("decoder", name, DECODERS)
    return decoder and decoder(**options)
