"""Decoders as the configurations choose them: types differ in the decoder alone, and have the published sizes."""

import pytest
import torch
from configs import FOLDERS, composed
from hydra.errors import ConfigCompositionException

from policy.build import build_model
from policy.decoder import list_decoders

TYPES = [name for name in list_decoders() if name != "none"]


def flat(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("preset", ["paper", "small", "fast"])
def test_types_of_a_task_differ_in_the_decoder_alone(folder, preset):
    configs = {name: dict(flat(composed(folder, f"type{name}", f"preset={preset}"))) for name in TYPES}
    for name, config in configs.items():
        different = {key for key in config.keys() | configs["a"].keys() if config.get(key) != configs["a"].get(key)}
        assert different == (set() if name == "a" else {"decoder.name", "model.decoder.name"})
        assert config["model.decoder.name"] == name
    assert configs["b"]["model.decoder.channels"] == (32 if preset == "fast" else 128)


def test_the_decoder_is_an_option_of_every_configuration():
    folder = next(folder for folder in FOLDERS if folder.name == "pusht")
    for preset in ("paper", "fast"):
        config = composed(folder, "typea", "decoder=none", f"preset={preset}")
        with torch.device("meta"):
            assert build_model(config).decoder is None
    with pytest.raises(ConfigCompositionException, match="decoder/e"):
        composed(folder, "typea", "decoder=e")


IMAGE_PARAMETERS = (  # 256 + 64 channels to 128, with a 1x1 beside
    (25 * 320 * 128 + 128 + 256) + (25 * 128 * 128 + 128 + 256) + (320 * 128 + 128)
    + 2 * (25 * 128 * 128 + 128 + 256)  # the second residual block
    + (16 * 128 * 128 + 128)  # upsampled
    + (25 * 128 * 128 + 128 + 256) + (128 * 3 + 3)
)  # fmt: skip


def low_dim_parameters(channels, size):
    return channels * 4 * size + 4 * size + 4 * size * 2 * size + 2 * size + 2 * size * size + size


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a", IMAGE_PARAMETERS + low_dim_parameters(1024, 2)),
        ("b", IMAGE_PARAMETERS + 512 * 256 + 256 + low_dim_parameters(512, 2)),
        ("c", IMAGE_PARAMETERS + 1024 * 256 + 256 + low_dim_parameters(1024, 2)),
        ("d", IMAGE_PARAMETERS + 770 * 256 + 256),
    ],
)
def test_published_sizes(name, expected):
    """U-Net 512/1024/2048 over 16 steps, so 2048 x 4; images of 96 px; conditions of 768 + 2."""
    assert IMAGE_PARAMETERS == 2_968_067 and low_dim_parameters(1024, 2) == 8_246
    folder = next(folder for folder in FOLDERS if folder.name == "pusht")
    with torch.device("meta"):
        decoder = build_model(composed(folder, f"type{name}", "preset=paper")).decoder
    assert sum(p.numel() for p in decoder.parameters()) == expected
    assert decoder.decoders["image"].code.shape == (64, 48, 48)
