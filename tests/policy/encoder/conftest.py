"""Fixtures of the tests of encoders."""

import warnings
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import save_file


@pytest.fixture
def on_meta():
    """Everything is built without memory."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks that copying weights without storage does nothing
        yield


@pytest.fixture
def local_weights(monkeypatch, tmp_path):
    """Function that makes timm's pretrained weights of ``arch`` those of a random model, which it returns."""

    def save(arch, **sizes):
        torch.manual_seed(7)
        model = timm.create_model(arch, **sizes).eval()
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        overlay = {"file": str(tmp_path / "weights.safetensors")}
        monkeypatch.setattr(timm, "create_model", partial(timm.create_model, pretrained_cfg_overlay=overlay))
        return model

    return save
