"""Backbones of every size: timm's ViT, DeiT and PVTv2 with each attention mechanism in them."""

import pytest
import timm
import tiny
import torch
from backbones import FIBOTTENTION, IMAGE_SIZES, parameter_count, pictures, pyramid, vit
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import nn

from policy.attention import list_attentions, wythoff_offsets
from policy.build import build_model
from policy.checkpoint import load_encoder, load_encoder_weights, save_checkpoint
from policy.encoder import build_encoder
from policy.encoder.imagenet import take_unit_images
from policy.encoder.pvt import PVTEncoder

# ViT and DeiT ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [16, 8, 4])
@pytest.mark.parametrize(
    ("arch", "image_sizes"),
    [("deit_tiny", IMAGE_SIZES), ("vit_tiny", (32,)), ("vit_small", (84,)), ("deit_base", (32,))],
)
def test_softmax_vit_equals_timm_with_copied_weights(arch, image_sizes, patch_size):
    arch = f"{arch}_patch16_224"
    for image_size in image_sizes:
        torch.manual_seed(1)
        theirs = timm.create_model(
            arch, img_size=image_size, patch_size=patch_size, depth=1, num_classes=0, global_pool="avg", fc_norm=False
        ).eval()
        ours, images = vit(arch, image_size=image_size, patch_size=patch_size), pictures(image_size, 1)
        with torch.no_grad():
            expected = theirs(images)
            assert (ours(images) - expected).abs().max() > 1e-2
            ours.vit.load_state_dict(theirs.state_dict())
            torch.testing.assert_close(ours(images), expected)
        theirs.load_state_dict(ours.vit.state_dict())


@pytest.mark.parametrize("patch_size", [16, 8, 4])
@pytest.mark.parametrize(("size", "width", "heads"), [("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12)])
def test_sizes_of_vit_and_deit(on_meta, size, width, heads, patch_size):
    """Grids, and parameters by hand: patches, positions and class token, blocks, norm."""
    for image_size, depth in zip(IMAGE_SIZES, (1, 1, 1, 12), strict=True):
        options = {"depth": None} if depth == 12 else {}
        encoder = vit(f"deit_{size}_patch16_224", image_size=image_size, patch_size=patch_size, **options)
        side = image_size // patch_size
        assert encoder.grid == (side, side) and encoder.out_dim == width
        assert len(encoder.vit.blocks) == depth and encoder.vit.blocks[0].attn.num_heads == heads
        embedding = (3 * patch_size**2 + 1) * width + (side**2 + 1) * width + width
        assert parameter_count(encoder) == embedding + depth * (12 * width**2 + 13 * width) + 2 * width


def test_pretrained_vit_reads_a_file_and_follows_patch_size_and_grid(local_weights):
    theirs = local_weights("deit_tiny_patch16_224", depth=1).state_dict()
    own = vit(image_size=96, patch_size=8, pretrained=True).vit.state_dict()
    positions = resample_abs_pos_embed(theirs["pos_embed"], new_size=[12, 12], old_size=[14, 14])
    torch.testing.assert_close(own["pos_embed"], positions)
    unscaled = nn.Conv2d(3, 192, 8)
    with torch.no_grad():
        unscaled.weight.copy_(resample_patch_embed(theirs["patch_embed.proj.weight"], [8, 8]))
        unscaled.bias.copy_(theirs["patch_embed.proj.bias"])
    take_unit_images(unscaled, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    torch.testing.assert_close(own["patch_embed.proj.weight"], unscaled.weight)
    torch.testing.assert_close(own["patch_embed.proj.bias"], unscaled.bias)
    for key in [key for key in own if not key.startswith(("pos_embed", "patch_embed"))]:
        assert torch.equal(own[key], theirs[key]), key
    assert not torch.equal(vit(image_size=96, patch_size=8).vit.state_dict()["cls_token"], theirs["cls_token"])


def test_images_in_the_unit_range_stand_for_those_of_imagenet():
    torch.manual_seed(0)
    ours, theirs = (nn.Conv2d(3, 5, 4, stride=4).double() for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    take_unit_images(ours, mean=mean, std=std)
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    scaled = torch.stack([(pixels[:, i] - mean[i]) / std[i] for i in range(3)], dim=1)
    torch.testing.assert_close(ours(pixels * 2 - 1), theirs(scaled))


# The pyramid as a policy's and a classifier's encoder --------------------------------------------------------------

PYRAMID = {"name": "pvt_v2", "arch": "pvt_v2_b0", "out_dim": 5}


def model_config(size, *, name="image_classifier", encoder=PYRAMID, attention=FIBOTTENTION, **model):
    model = {"num_classes": 3, **model} if name != "mae" else model
    return {
        "task": {"shape_meta": {"obs": {"image": {"type": "rgb", "shape": [3, size, size]}}}},
        "crop": None,
        "encoder": {**encoder, "init": "none", "freeze": False},
        "attention": attention,
        "model": {"name": name, **model},
    }


def test_an_encoder_starts_another_of_any_image_size(tmp_path):
    """No table of positions: the weights stay as they are, and the diagonals are those of the new grids."""
    torch.manual_seed(3)
    model, config = build_model(model_config(64)), model_config(64)
    tensors = model.encoder.encoders["image"].state_dict()
    weights = {f"ema.{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(tmp_path / "run", weights, config=config, state={"step": 0})
    loaded = load_encoder(tmp_path / "run")
    assert isinstance(loaded, PVTEncoder)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in tensors.items())
    larger = build_encoder("pvt_v2", image_size=96, attention=FIBOTTENTION, out_dim=5)
    load_encoder_weights(larger, tensors, "here")
    assert all(torch.equal(larger.state_dict()[key], value) for key, value in tensors.items())
    offsets = wythoff_offsets(24 * 24, 1, variant="robot")
    assert larger.pvt.stages[0].blocks[0].attn.attention.offsets == offsets


def test_weights_for_a_number_of_patches_are_refused_at_another():
    small, large = (pyramid(image_size=size, attention={"name": "linformer"}) for size in (64, 96))
    with pytest.raises(ValueError, match="shapes"):
        load_encoder_weights(large, small.state_dict(), "here")


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ({"name": "mae"}, "encoder.name"),
        ({"features": "cls"}, "features"),
        ({"features": "mean"}, "features"),
        ({"mask_ratio": 0.5}, "mask_ratio"),
        ({"name": "video_classifier", "frames": 2}, "space_time"),
        ({"name": "video_classifier", "frames": 2, "space_time": "joint"}, "space_time"),
    ],
    ids=str,
)
def test_what_needs_tokens_refuses_the_pyramid(model, key):
    with pytest.raises(ValueError, match=key):
        build_model(model_config(32, **model))


def test_classifiers_read_the_pyramid():
    model = build_model(model_config(32))
    assert model.logits({"image": pictures(32)}).shape == (2, 3)
    model = build_model(model_config(32, name="video_classifier", frames=2, space_time="space"))
    assert model.logits({"video": torch.rand(3, 2, 3, 32, 32)}).shape == (3, 3)


@pytest.mark.parametrize(
    ("encoder", "width"),
    [
        ({"name": "pvt_v2"}, 256),
        ({"name": "pvt_v2", "arch": "pvt_v2_b3"}, 512),
        ({"name": "vit", "arch": "deit_tiny_patch16_224", "patch_size": 16}, 192),
        ({"name": "vit", "arch": "deit_small_patch16_224"}, 384),
        ({"name": "vit", "arch": "vit_base_patch16_224", "patch_size": 4}, 768),
    ],
    ids=str,
)
def test_backbones_are_a_choice_of_every_policy(on_meta, encoder, width):
    config = tiny.policy_config(images=True, crop=None)
    config["encoder"] = {"init": "none", "freeze": False, "out_dim": None, **encoder}
    config["task"]["shape_meta"]["obs"]["image"] = {"type": "rgb", "shape": [3, 96, 96]}
    assert build_model(config).encoder.encoders["image"].out_dim == width


# Every mechanism in every backbone -----------------------------------------------------------------------------------

WITH_ONE_HEAD = {"hybrid": {"dilations": [1]}}  # as stage 1 of PVTv2 has; dilations are shared out among heads


def check_gradients(module, output):
    """``output`` is finite, and so is its gradient by every parameter of ``module`` that learns."""
    assert torch.isfinite(output).all()
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    projections = [p for name, p in module.named_parameters() if ".blocks." in name and name.endswith("qkv.weight")]
    assert projections and all(p.grad.abs().max() > 0 for p in projections)


@pytest.mark.parametrize("patch_size", [16, 8])
@pytest.mark.parametrize("name", list_attentions())
def test_every_mechanism_in_a_vit(name, patch_size):
    encoder = vit(image_size=96, patch_size=patch_size, attention={"name": name}, depth=2).train()
    check_gradients(encoder, encoder(pictures(96)))


@pytest.mark.parametrize("name", list_attentions())
def test_every_mechanism_in_a_pyramid(name):
    attention = {"name": name, **WITH_ONE_HEAD.get(name, {})}
    encoder = pyramid(image_size=64, attention=attention, attention_stages="all").train()
    check_gradients(encoder, encoder(pictures(64)))


@pytest.mark.parametrize("space_time", ["divided", "joint"])
@pytest.mark.parametrize("name", list_attentions())
def test_every_mechanism_in_a_video_model(name, space_time):
    encoder = {"name": "vit", "arch": "deit_tiny_patch16_224", "patch_size": 8, "depth": 2}
    options = {"frames": 3, "space_time": space_time, "encoder": encoder, "attention": {"name": name}}
    torch.manual_seed(0)
    model = build_model(model_config(32, name="video_classifier", **options)).train()
    nn.init.normal_(model.head.weight)  # the small initial one hides all
    check_gradients(model, model.logits({"video": torch.rand(2, 3, 3, 32, 32) * 2 - 1}))
