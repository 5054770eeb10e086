"""Before any test: kernels for a GPU are interpreted without one, and ``policy`` cures a CPU-only torchvision."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is first imported, by policy or timm

import policy  # noqa: E402, F401

torch.set_num_threads(1)  # the models are tiny; more threads only wait for each other, minutes long on a busy machine
