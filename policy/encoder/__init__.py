"""Vision encoders behind one interface; a new one is one file here, one line below and one config.

An encoder is a module images (B, 3, h, w) in [-1, 1] -> (B, out_dim) that says its ``out_dim``. It names what it needs
of ``image_size`` and ``attention``. Layer-wise learning rates (training.layer_decay) also ask for ``num_layers`` and
``layer_of``.
"""

from policy.registry import Registry

__all__ = ["build_encoder", "list_encoders"]

ENCODERS = Registry(
    "encoder",
    __name__,
    {
        "pvt_v2": "pvt:PVTEncoder",
        "resnet18": "resnet:ResNet18Encoder",
        "vit": "vit:ViTEncoder",
    },
)


def list_encoders():
    """Names that ``build_encoder`` and ``encoder.name`` accept."""
    return list(ENCODERS)


def build_encoder(name, *, image_size, attention, **options):
    """An encoder of one camera: a module images (B, 3, h, w) in [-1, 1] -> (B, out_dim), with ``out_dim``.

    image_size: h = w after cropping; attention: {"name": ..., options}, for encoders that have one.
    Raises ValueError for an unknown name or option.
    """
    return ENCODERS.build(name, options, image_size=image_size, attention=attention)
