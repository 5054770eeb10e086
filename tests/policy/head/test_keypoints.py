"""Keypoint regression: the loss of one camera in the image plane and of two in space, by hand."""

import numpy as np
import pytest
import tiny
import torch

from policy.head.keypoints import BETA, KeypointRegressor

ENCODER = {**tiny.VIT, "out_dim": 6}
ENCODER = {key: value for key, value in ENCODER.items() if key not in ("init", "freeze")}


def keypoint_model(**changes):
    torch.manual_seed(0)
    options = {
        "shape_meta": {"obs": {**tiny.IMAGE, **tiny.LOW_DIM}, "keypoint": {"shape": [6]}},
        "crop": None,
        "encoder": ENCODER,
        "attention": {"name": "fibottention"},
        "px_per_unit": 256,
    }
    return KeypointRegressor(**{**options, **changes}).eval()


def smooth_l1(off):
    return np.where(abs(off) < BETA, off**2 / (2 * BETA), abs(off) - BETA / 2).mean()


def test_keypoint_loss_by_hand():
    model = keypoint_model()
    batch = {
        "obs": {"image": torch.randint(0, 256, (4, 3, 12, 12), dtype=torch.uint8)},
        "keypoint": torch.rand(4, 6) * 2 - 1,
    }
    batch["keypoint"][0] = model.encoder(batch["obs"])[0].detach() + 0.5 * BETA  # inside the quadratic part
    losses = model(batch, model.randomness(4, None))
    off = (model.encoder(batch["obs"]) - batch["keypoint"]).detach().double().numpy()
    assert losses["loss"].item() == pytest.approx(smooth_l1(off), rel=1e-5)
    distance = np.sqrt((off.reshape(4, 3, 2) ** 2).sum(axis=2)).mean()
    assert losses["px"].item() == pytest.approx(256 * distance, rel=1e-5) and not losses["px"].requires_grad


def test_keypoint_loss_of_two_cameras_in_space():
    """Each camera reads all targets; distances are between points of three coordinates, in mm, also per camera."""
    cameras = {key: {"type": "rgb", "shape": [3, 12, 12]} for key in ("front", "wrist")}
    model = keypoint_model(shape_meta={"obs": cameras, "keypoint": {"shape": [6]}}, px_per_unit=None, mm_per_unit=250)
    images = {key: torch.randint(0, 256, (4, 3, 12, 12), dtype=torch.uint8) for key in cameras}
    target = torch.rand(4, 6) * 2 - 1
    losses = model({"obs": images, "keypoint": target}, {})
    mm, smooth = [], []
    for key in cameras:
        read = model.encoder.encoders[key](images[key].float() / 127.5 - 1)
        off = (read - target).detach().double().numpy()
        smooth.append(smooth_l1(off))
        mm.append(250 * np.sqrt((off.reshape(4, 2, 3) ** 2).sum(axis=2)).mean())
        assert losses[f"mm_{key}"].item() == pytest.approx(mm[-1], rel=1e-5)
    assert losses["loss"].item() == pytest.approx(np.mean(smooth), rel=1e-5)
    assert losses["mm"].item() == pytest.approx(np.mean(mm), rel=1e-5)


def test_keypoint_models_that_cannot_be():
    five = {"obs": tiny.IMAGE, "keypoint": {"shape": [5]}}
    for key, changes in (
        ("crop", {"crop": 8}),
        ("out_dim", {"encoder": {**ENCODER, "out_dim": 5}}),
        ("px_per_unit", {"px_per_unit": None}),
        ("px_per_unit", {"mm_per_unit": 1}),
        ("keypoint", {"shape_meta": five, "encoder": {**ENCODER, "out_dim": 5}}),
    ):
        with pytest.raises(ValueError, match=key):
            keypoint_model(**changes)
