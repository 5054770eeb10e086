"""Before any test: kernels for a GPU are interpreted without one, and ``policy`` cures a CPU-only torchvision."""

import os

import numpy as np
import pytest
import torch
import zarr

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is first imported, by policy or timm

from accelerate.state import AcceleratorState  # noqa: E402

from policy.training import run_folder  # noqa: E402

torch.set_num_threads(1)  # the models are tiny; more threads only wait for each other, minutes long on a busy machine


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with demos.zarr: four episodes of 20 frames with images."""
    folder = tmp_path_factory.mktemp("workplace")
    rng = np.random.default_rng(0)
    root = zarr.open_group(str(folder / "demos.zarr"), mode="w", zarr_format=2)
    root.create_array("data/img", data=rng.integers(0, 256, (80, 96, 96, 3), dtype=np.uint8))
    root.create_array("data/state", data=rng.uniform(50, 450, (80, 5)).astype(np.float32))
    root.create_array("data/action", data=rng.uniform(50, 450, (80, 2)).astype(np.float32))
    root.create_array("meta/episode_ends", data=np.arange(20, 81, 20))
    return folder


@pytest.fixture
def runs(monkeypatch):
    """Trainers may be made: curves are not drawn, and accelerate forgets the precision of this process."""
    monkeypatch.setattr(run_folder, "plot_curves", lambda run_dir: None)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
