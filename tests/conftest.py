"""Before any test: kernels for a GPU are interpreted without one, and ``policy`` cures a CPU-only torchvision."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is first imported, by policy or timm

import tiny  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

from policy.training import run_folder  # noqa: E402

torch.set_num_threads(1)  # the models are tiny; more threads only wait for each other, minutes long on a busy machine


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with demos.zarr: four episodes of 20 frames with images."""
    folder = tmp_path_factory.mktemp("workplace")
    tiny.write_demos(folder / "demos.zarr")
    return folder


@pytest.fixture
def runs(monkeypatch):
    """Trainers may be made: curves are not drawn, and accelerate forgets the precision of this process."""
    monkeypatch.setattr(run_folder, "plot_curves", lambda run_dir: None)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
