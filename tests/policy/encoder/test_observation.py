"""Crops, and several cameras and low-dimensional keys to one vector."""

import numpy as np
import pytest
import torch

from policy.encoder.observation import ObservationEncoder, crop_images
from policy.normalizer import Normalizer

ENCODER = {"name": "vit", "arch": "vit_tiny_patch16_224", "patch_size": 4, "dim": 24, "depth": 1, "num_heads": 3}


def test_crop_equals_slicing():
    images = torch.randint(0, 256, (40, 3, 13, 11), dtype=torch.uint8)
    centre = crop_images(images, 8)
    assert torch.equal(centre, images[..., 2:10, 1:9])
    position = torch.rand(40, 2)
    position[0], position[1] = 0.0, 1 - 1e-7
    cropped = crop_images(images, 8, position=position)
    corners = set()
    for i, (y, x) in enumerate(position.tolist()):
        top, left = int(y * 6), int(x * 4)  # 6 and 4 places for the corner
        corners.add((top, left))
        assert torch.equal(cropped[i], images[i, :, top : top + 8, left : left + 8])
    assert {(0, 0), (5, 3)} < corners and len(corners) > 15


def observation_encoder(*, crop=8, cameras=("a", "b"), size=(12, 12)):
    torch.manual_seed(0)
    meta = {name: {"type": "rgb", "shape": [3, *size]} for name in cameras}
    meta = {"speed": {"type": "low_dim", "shape": [1]}, **meta, "place": {"type": "low_dim", "shape": [2]}}
    normalizer = Normalizer({"speed": (1,), "place": (2,)})
    normalizer.fit("speed", torch.tensor([[2.0], [4.0]]))
    normalizer.fit("place", torch.tensor([[0.0, -1.0], [10.0, 1.0]]))
    parts = {"encoder": ENCODER, "attention": {"name": "softmax"}, "normalizer": normalizer}
    return ObservationEncoder(shape_meta=meta, crop=crop, **parts).eval()


def observations(count=5):
    rng = np.random.default_rng(0)
    images = {name: torch.from_numpy(rng.integers(0, 256, (count, 3, 12, 12), dtype=np.uint8)) for name in "ab"}
    low_dim = {"speed": torch.rand(count, 1) + 2, "place": torch.rand(count, 2)}
    return {**images, **low_dim}


def test_observation_vector():
    """Both cameras through encoders of their own, then the normalised low-dim keys in the order of shape_meta."""
    encoder, obs = observation_encoder(), observations()
    out = encoder(obs)
    assert encoder.feature_dim == 48 and encoder.out_dim == 51 and out.shape == (5, 51)
    for number, key in enumerate("ab"):
        pixels = obs[key][..., 2:10, 2:10].float() / 127.5 - 1
        torch.testing.assert_close(out[:, 24 * number : 24 * (number + 1)], encoder.encoders[key](pixels))
    torch.testing.assert_close(out[:, 48:49], obs["speed"] - 3)
    torch.testing.assert_close(out[:, 49:], torch.stack([obs["place"][:, 0] / 5 - 1, obs["place"][:, 1]], dim=1))
    assert not torch.equal(encoder.encoders["a"].vit.pos_embed, encoder.encoders["b"].vit.pos_embed)


def test_random_crop_of_an_observation_equals_slicing():
    encoder, obs = observation_encoder(), observations()
    position = torch.tensor([[0.0, 0.0], [0.99, 0.99], [0.5, 0.0], [0.21, 0.79], [0.4, 0.6]])
    out = encoder.encode_images(obs, position)
    for i, (top, left) in enumerate([(0, 0), (4, 4), (2, 0), (1, 3), (2, 3)]):  # five places for a corner
        pixels = obs["b"][i : i + 1, :, top : top + 8, left : left + 8].float() / 127.5 - 1
        torch.testing.assert_close(out[i : i + 1, 24:], encoder.encoders["b"](pixels))


def test_images_as_uint8_or_float_and_features():
    encoder, obs = observation_encoder(), observations()
    out = encoder(obs)
    assert torch.equal(encoder({key: value.float() for key, value in obs.items()}), out)
    features = {"features": encoder.encode_images(obs), "speed": obs["speed"], "place": obs["place"]}
    assert torch.equal(encoder(features), out)


@pytest.mark.parametrize("options", [{"crop": 13}, {"crop": 0}, {"crop": None, "size": (12, 16)}], ids=str)
def test_crops_that_cannot_be(options):
    with pytest.raises(ValueError, match="crop"):
        observation_encoder(**options)


def test_whole_image_without_a_crop():
    encoder, obs = observation_encoder(crop=None), observations()
    whole = encoder.encode_images(obs)
    same = observation_encoder(crop=12)
    assert torch.equal(same.encode_images(obs, torch.full((5, 2), 0.9)), whole)
    torch.testing.assert_close(whole[:, :24], encoder.encoders["a"](obs["a"].float() / 127.5 - 1))
