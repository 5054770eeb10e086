"""Before any test: ``policy`` cures the torchvision beside a CPU-only torch, so that tests may import timm first."""

import torch

import policy  # noqa: F401

torch.set_num_threads(1)  # the models are tiny; more threads only wait for each other, minutes long on a busy machine
