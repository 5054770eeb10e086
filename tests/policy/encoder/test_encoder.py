"""Vision encoders: the mask is in force whatever timm does, pooling, and the contract of every encoder."""

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn, use_fused_attn
from torch import nn

from policy.attention import fibottention_mask, shuffle_heads, wythoff_offsets
from policy.encoder import build_encoder, list_encoders
from policy.encoder.spatial_softmax import SpatialSoftmax
from policy.encoder.vit import ViTEncoder

SMALL = {"arch": "vit_tiny_patch16_224", "patch_size": 8, "dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2}
FUSED = {"off": (False, False), "on": (True, False), "experimental": (True, True)}


@pytest.fixture
def fused_attention():
    """timm's fused-attention switch as a function; restored afterwards."""
    before = use_fused_attn(), use_fused_attn(experimental=True)
    yield lambda name: set_fused_attn(*FUSED[name])
    set_fused_attn(*before)


def vit(*, image_size=32, attention=None, **options):
    torch.manual_seed(0)
    attention = attention or {"name": "fibottention", "variant": "robot"}
    return ViTEncoder(image_size=image_size, attention=attention, **{**SMALL, **options}).eval()


def their_vit():
    """timm's own model of the sizes ``SMALL``, from the seed of ``vit``."""
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2}
    return timm.create_model("vit_tiny_patch16_224", **options, num_classes=0, global_pool="avg", fc_norm=False).eval()


def reference_vit(encoder, images, *, masked_score):
    """Mean of the patch tokens of a ViT with dense masked attention, from the weights alone, in float64."""
    w = {key: value.double() for key, value in encoder.vit.state_dict().items()}
    depth, heads, size = len(encoder.vit.blocks), encoder.vit.blocks[0].attn.num_heads, encoder.grid[0]
    offsets = wythoff_offsets(size * size, heads, variant="robot")

    def layer_norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    patch = w["patch_embed.proj.weight"].shape[-1]
    used = images.double()[..., : size * patch, : size * patch]
    pixels = F.unfold(used, patch, stride=patch).transpose(1, 2)  # (B, N, 3 * p * p)
    x = pixels @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]
    for layer in range(depth):
        mask = fibottention_mask(shuffle_heads(offsets, layer), size * size)
        name = f"blocks.{layer}"
        q, k, v = linear(layer_norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, dim=-1)
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v))  # (B, H, 1+N, D)
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
        scores = scores * mask if masked_score == "zero" else scores.masked_fill(~mask, -torch.inf)
        mixed = torch.einsum("bhij,bhjd->bihd", scores.softmax(dim=-1), v).flatten(2)
        x = x + linear(mixed, f"{name}.attn.proj")
        hidden = linear(layer_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))  # GELU
        x = x + linear(hidden, f"{name}.mlp.fc2")
    return layer_norm(x, "norm")[:, 1:].mean(dim=1)


# The mask is in force --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked_score", ["zero", "exclude"])
@pytest.mark.parametrize("fused", FUSED)
def test_mask_is_in_force_whatever_timm_does(fused_attention, fused, masked_score):
    """The published encoders lose their mask when timm picks fused attention; set before and after building."""
    fused_attention(fused)
    encoder = vit(attention={"name": "fibottention", "variant": "robot", "masked_score": masked_score})
    with torch.no_grad():  # sharper scores than those of a fresh ViT, so that the mask matters
        for block in encoder.vit.blocks:
            block.attn.qkv.weight.mul_(10)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    expected = reference_vit(encoder, images, masked_score=masked_score).float()
    for again in FUSED:
        fused_attention(again)
        with torch.no_grad():
            torch.testing.assert_close(encoder(images), expected, rtol=0, atol=2e-5)
    dense = vit(attention={"name": "softmax"})
    dense.load_state_dict(encoder.state_dict())
    assert (dense(images) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("attention", [{"name": "fibottention"}, {"name": "softmax"}])
def test_weights_are_carried_over_under_the_names_of_timm(attention):
    """The same seed gives the same initial weights as timm's own model, attention included."""
    own, theirs = vit(attention=attention).vit.state_dict(), their_vit().state_dict()
    assert list(own) == list(theirs)
    assert all(torch.equal(own[name], tensor) for name, tensor in theirs.items())


# The published encoder -------------------------------------------------------------------------------------------


def test_published_encoder():
    """ViT-B/8 on 84 px: 10 x 10 patches, 768 features, about 85 M parameters, 9.6 % of the pairs, last 4 px unused."""
    attention = {"name": "fibottention", "variant": "robot", "modified": True}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks that copying weights without storage does nothing
        whole = ViTEncoder(image_size=84, attention=attention, drop_remainder=True)
    assert whole.grid == (10, 10) and whole.out_dim == 768 and len(whole.vit.blocks) == 12
    # By hand: patches, positions and class token; per block two norms, qkv, proj, mlp; the final norm.
    block = 2 * 2 * 768 + (768 * 2304 + 2304) + (768 * 768 + 768) + (768 * 3072 + 3072) + (3072 * 768 + 768)
    count = sum(parameter.numel() for parameter in whole.parameters())
    assert count == (3 * 64 * 768 + 768) + 101 * 768 + 768 + 12 * block + 2 * 768 == pytest.approx(85.3e6, rel=0.002)
    encoder = ViTEncoder(image_size=84, attention=attention, drop_remainder=True, depth=2).eval()
    for block in encoder.vit.blocks:
        assert block.attn.mask.shape == (12, 101, 101)
        assert block.attn.density() == pytest.approx(0.096, abs=0.0005)
    image = torch.rand(1, 3, 84, 84) * 2 - 1
    bordered = image.clone()
    bordered[..., 80:, :], bordered[..., :, 80:] = 1, -1
    with torch.no_grad():
        out = encoder(image)
        torch.testing.assert_close(out, reference_vit(encoder, image, masked_score="zero").float(), rtol=0, atol=1e-4)
        assert torch.equal(encoder(bordered), out)


def test_remainder_must_be_dropped_on_purpose():
    with pytest.raises(ValueError, match="image size"):
        vit(image_size=84)
    assert vit(image_size=84, depth=1, drop_remainder=True).grid == (10, 10)


def test_conv_stem_rounds_the_grid_up_and_sees_every_pixel():
    encoder = vit(image_size=84, depth=1, stem="conv", pool="mean")
    assert encoder.grid == (11, 11)
    images = torch.rand(1, 3, 84, 84, requires_grad=True)
    assert encoder.tokens(images).shape[1] == 11 * 11 + encoder.prefix_tokens
    encoder(images).square().sum().backward()
    assert (images.grad.abs().sum(dim=(0, 1)) > 0).all()


# Contract of every encoder ---------------------------------------------------------------------------------------

VARIANTS = {
    "pvt_v2": [{}, {"attention_stages": "none", "out_dim": 7}, {"pool": "spatial_softmax", "num_keypoints": 4}],
    "resnet18": [{}, {"num_keypoints": 4, "out_dim": 7}],
    "vit": [
        {**SMALL, "pool": pool, "stem": stem, "out_dim": out_dim}
        for pool in ("mean", "cls", "spatial_softmax")
        for stem, out_dim in (("patch", None), ("conv", 7))
    ],
}


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in list_encoders() for options in VARIANTS.get(name, [{}])]
)
def test_contract_of_every_encoder(name, options):
    """(B, 3, h, w) -> (B, out_dim); samples independent; a gradient for every parameter, the class token included."""
    torch.manual_seed(0)
    encoder = build_encoder(name, image_size=40, attention={"name": "fibottention"}, **options).eval()
    images = torch.rand(3, 3, 40, 40) * 2 - 1
    out = encoder(images)
    assert out.shape == (3, encoder.out_dim) and torch.isfinite(out).all()
    if options.get("out_dim") is not None:
        assert encoder.out_dim == options["out_dim"]
    for row in range(3):
        torch.testing.assert_close(encoder(images[row : row + 1])[0], out[row], rtol=0, atol=1e-5)
    assert (out[0] - out[1]).abs().max() > 1e-5
    (out * torch.randn_like(out)).sum().backward()
    for label, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, label


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("vlt", {}, "encoder"),
        ("vit", {"depht": 3}, "depht"),
        ("resnet18", {"patch_size": 8}, "patch_size"),
        ("resnet18", {}, "image size"),
        ("vit", {"stem": "linear"}, "stem"),
        ("vit", {"pool": "max"}, "pool"),
        ("vit", {"patch_size": 33}, "patch_size"),
        ("vit", {"patch_size": 2, "stem": "conv"}, "patch_size"),
        ("vit", {"stem": "conv", "pretrained": True}, "pretrained"),
        ("vit", {"dim": 25}, "num_heads"),
        ("vit", {"arch": "resnet50"}, "arch"),
        ("vit", {"arch": "vit_gigantic"}, "arch"),
        ("vit", {"arch": "vit_tiny_r_s16_p8_224"}, "arch"),  # convolutions before the patches
        ("vit", {"arch": "vit_small_patch16_dinov3"}, "arch"),  # rotary positions
        ("vit", {"arch": "vit_small_patch16_18x2_224"}, "arch"),
        ("vit", {"arch": "vit_medium_patch16_gap_256"}, "arch"),  # no bias
        ("vit", {"arch": "vit_medium_patch16_reg1_gap_256", "pool": "cls"}, "pool"),  # no class token
        ("vit", {"pool": "spatial_softmax", "patch_size": 32}, "spatial softmax"),  # one cell
        ("vit", {"attention": {"name": "dense"}}, "attention"),
    ],
)
def test_encoders_that_cannot_be(name, options, key):
    sizes = SMALL if name == "vit" else {}
    options = {"attention": {"name": "softmax"}, **sizes, **options}
    with pytest.raises(ValueError, match=key):
        build_encoder(name, image_size=32, **options)


def test_sizes_of_the_vit():
    encoder = vit(dim=48, depth=2, num_heads=4, mlp_ratio=3, patch_size=16, num_keypoints=5, pool="spatial_softmax")
    assert len(encoder.vit.blocks) == 2 and encoder.grid == (2, 2) and encoder.out_dim == 10
    assert encoder.vit.blocks[0].attn.num_heads == 4 and encoder.vit.blocks[0].mlp.fc1.weight.shape == (144, 48)
    assert vit(depth=1).out_dim == 24


def test_pools_read_the_tokens():
    images = torch.rand(2, 3, 32, 32)
    for pool in ("mean", "cls", "spatial_softmax"):
        encoder = vit(pool=pool)
        tokens = encoder.tokens(images)
        assert tokens.shape == (2, 17, 24)
        if pool == "mean":
            expected = sum(tokens[:, 1 + j] for j in range(16)) / 16
        elif pool == "cls":
            expected = tokens[:, 0]
        else:
            rows = [tokens[:, 1 + 4 * y : 5 + 4 * y] for y in range(4)]
            expected = encoder.keypoints(torch.stack(rows, dim=1).permute(0, 3, 1, 2))
        torch.testing.assert_close(encoder(images), expected)


def test_register_tokens_are_prefix_tokens():
    """An arch with four register tokens and a class token: five full rows and columns, none of them pooled."""
    encoder = vit(arch="vit_small_patch14_reg4_dinov2", depth=2)
    assert encoder.prefix_tokens == 5 and encoder.vit.blocks[0].attn.mask.shape == (3, 21, 21)
    assert encoder.vit.blocks[0].attn.mask[:, :5].all() and not encoder.vit.blocks[0].attn.mask[:, 5:, 5:].all()
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(encoder(images), encoder.tokens(images)[:, 5:].mean(dim=1))


def test_drop_path_acts_in_training_only():
    images = torch.rand(4, 3, 32, 32)
    plain, dropping = vit(), vit(drop_path=0.5)
    torch.testing.assert_close(dropping(images), plain(images))
    dropping.train()
    torch.manual_seed(0)
    assert (dropping(images) - plain(images)).abs().max() > 1e-3


def test_conv_stem_is_four_small_convolutions():
    encoder = vit(stem="conv", patch_size=16, image_size=64)
    assert encoder.grid == (4, 4)
    convolutions = [layer for layer in encoder.vit.patch_embed.modules() if isinstance(layer, nn.Conv2d)]
    assert [c.stride[0] for c in convolutions] == [2, 2, 2, 2, 1]
    tokens = encoder.vit.patch_embed(torch.rand(1, 3, 64, 64))
    assert tokens.shape == (1, 16, 24)


def test_resnet_has_no_running_statistics():
    encoder = build_encoder("resnet18", image_size=76, attention=None)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in encoder.modules())
    assert encoder.out_dim == 64 and encoder(torch.rand(1, 3, 76, 76)).shape == (1, 64)


def test_spatial_softmax_is_an_expected_coordinate():
    """Brute force over the cells, x before y."""
    torch.manual_seed(0)
    pool = SpatialSoftmax(2, 3, (3, 5))
    maps = 3 * torch.randn(2, 2, 3, 5)
    out = pool(maps)
    weight, bias = pool.to_keypoints.weight[:, :, 0, 0], pool.to_keypoints.bias
    for b in range(2):
        for keypoint in range(3):
            total, x, y = 0.0, 0.0, 0.0
            for row in range(3):
                for column in range(5):
                    score = (weight[keypoint] @ maps[b, :, row, column] + bias[keypoint]).exp().item()
                    total, x, y = total + score, x + score * (column / 2 - 1), y + score * (row - 1)
            assert out[b, 2 * keypoint : 2 * keypoint + 2].tolist() == pytest.approx([x / total, y / total], abs=1e-5)
