"""One cure for one trap: the PyPI torchvision beside a CPU-only torch.

That pair cannot load torchvision's C++ operators, and ``import torchvision`` (so timm, robomimic) then raises
"operator torchvision::nms does not exist", because torchvision registers fake kernels for operators whose schemas
the missing library would have declared. Declaring the two schemas first cures it; nothing here uses the operators.
"""

import torch


def declare_missing_operators():
    """Make ``import torchvision`` work beside a CPU-only torch; does nothing where torchvision loads normally.

    Returns the ``torch.library.Library`` that holds the declarations (it must stay alive), or None.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    except ImportError:
        return None  # not installed; timm will say so in its own words
    else:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

    return library
