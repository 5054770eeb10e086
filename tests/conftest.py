"""Before any test: ``policy`` cures the torchvision beside a CPU-only torch, so that tests may import timm first."""

import policy  # noqa: F401
