"""Before any test: without a GPU its kernels are interpreted, and ``policy`` cures the torchvision of a CPU-only torch."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is first imported, by policy or timm

import policy  # noqa: E402, F401

torch.set_num_threads(1)  # the models are tiny; more threads only wait for each other, minutes long on a busy machine
