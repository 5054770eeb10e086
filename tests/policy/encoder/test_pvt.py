"""The pyramid encoder: timm's PVTv2 with our attention in it, against brute force."""

import pytest
import timm
import torch
import torch.nn.functional as F
from backbones import IMAGE_SIZES, SOFTMAX, parameter_count, pictures, pyramid, sharpened

from policy.attention import ATTENTIONS
from policy.attention.softmax import SoftmaxAttention


@pytest.mark.parametrize("image_size", [29, 100, *IMAGE_SIZES])
def test_own_reduction_equals_timm(image_size):
    torch.manual_seed(1)
    theirs = timm.create_model("pvt_v2_b0", num_classes=0).eval()
    ours, images = pyramid(image_size=image_size, attention_stages="none"), pictures(image_size, 1)
    ours.pvt.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def reference_pyramid(encoder, images, image_size):
    """Mean of the last stage of a PVTv2-B0 with dense attention everywhere, from the weights alone, in float64."""
    w = {key.replace("attn.attention", "attn"): value.double() for key, value in encoder.pvt.state_dict().items()}

    def norm(x, name, eps=1e-6):
        x = x - x.mean(dim=-1, keepdim=True)
        return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def convolve(x, name, **options):  # (B, h, w, C)
        out = F.conv2d(x.permute(0, 3, 1, 2), w[f"{name}.weight"], w[f"{name}.bias"], **options)
        return out.permute(0, 2, 3, 1)

    def attend(x, name, heads):
        if f"{name}.q.weight" in w:
            q, (k, v) = linear(x, f"{name}.q"), linear(x, f"{name}.kv").chunk(2, dim=-1)
        else:
            q, k, v = linear(x, f"{name}.qkv").chunk(3, dim=-1)
        q, k, v = (part.unflatten(2, (heads, -1)) for part in (q, k, v))  # (B, N, H, D)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
        weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
        return linear(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2), f"{name}.proj")

    x = images.double().permute(0, 2, 3, 1)
    for stage, heads in enumerate((1, 2, 5, 8)):
        if stage == 0:
            x = norm(convolve(x, "patch_embed.proj", stride=4, padding=3), "patch_embed.norm", eps=1e-5)
        else:
            name = f"stages.{stage}.downsample"
            x = norm(convolve(x, f"{name}.proj", stride=2, padding=1), f"{name}.norm", eps=1e-5)
        shape = x.shape[1:3]
        assert shape == (-(-image_size // 2 ** (stage + 2)),) * 2
        x = x.flatten(1, 2)
        for block in range(2):
            name = f"stages.{stage}.blocks.{block}"
            x = x + attend(norm(x, f"{name}.norm1"), f"{name}.attn", heads)
            hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1").unflatten(1, shape)
            hidden = convolve(hidden, f"{name}.mlp.dwconv", padding=1, groups=hidden.shape[-1]).flatten(1, 2)
            x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), f"{name}.mlp.fc2")
        x = norm(x, f"stages.{stage}.norm").unflatten(1, shape)
    return x.mean(dim=(1, 2))


@pytest.mark.parametrize("attention_stages", ["reduced", "all"])
@pytest.mark.parametrize("image_size", [32, 70])
def test_softmax_pyramid_equals_brute_force(image_size, attention_stages):
    encoder = sharpened(pyramid(image_size=image_size, attention=SOFTMAX, attention_stages=attention_stages))
    images = pictures(image_size)
    with torch.no_grad():
        expected = reference_pyramid(encoder, images, image_size)
        torch.testing.assert_close(encoder(images), expected.float(), rtol=0, atol=1e-4)
        torch.testing.assert_close(encoder.double()(images.double()), expected)


def test_attention_stages():
    """Whose attention is where (a linear pyramid reduces everywhere); each choice computes something else."""
    linear = pyramid(arch="pvt_v2_b2_li", attention=SOFTMAX)
    assert all(hasattr(block.attn, "attention") for stage in linear.pvt.stages for block in stage.blocks)
    images = pictures(64)
    outputs = []
    for attention_stages, ours in (("none", []), ("reduced", [0, 1, 2]), ("all", [0, 1, 2, 3])):
        encoder = sharpened(pyramid(image_size=64, attention_stages=attention_stages))
        assert [i for i, s in enumerate(encoder.pvt.stages) if hasattr(s.blocks[1].attn, "attention")] == ours
        outputs.append(encoder(images))
    assert min((a - b).abs().max() for a, b in zip(outputs, outputs[1:] + outputs[:1], strict=True)) > 1e-3
    other = sharpened(pyramid(image_size=64, attention=SOFTMAX))
    assert (other(images) - outputs[1]).abs().max() > 1e-3
    own = sharpened(pyramid(image_size=64, attention=SOFTMAX, attention_stages="none"))
    assert torch.equal(own(images), outputs[0])


def test_geometry_that_mechanisms_are_told(monkeypatch):
    told = []

    class Told(SoftmaxAttention):
        def __init__(self, *, dim, num_heads, num_patches, grid, layer, depth, prefix_tokens):
            super().__init__(dim=dim, num_heads=num_heads)
            told.append((dim, num_heads, num_patches, grid, layer, depth, prefix_tokens))

    monkeypatch.setitem(ATTENTIONS.parts, "told", Told)
    pyramid(image_size=100, attention={"name": "told"})
    sides, dims, heads = (25, 25, 13, 13, 7, 7), (32, 32, 64, 64, 160, 160), (1, 1, 2, 2, 5, 5)
    places = enumerate(zip(dims, heads, sides, strict=True))
    assert told == [(dim, count, side**2, (side, side), layer, 8, 0) for layer, (dim, count, side) in places]


PARAMETERS = {  # of timm's and of ours, whose first three stages lack what merges keys
    "pvt_v2_b0": (3_409_760, 2_941_280),
    "pvt_v2_b1": (13_496_000, 11_625_152),
    "pvt_v2_b2": (24_849_856, 20_549_376),
    "pvt_v2_b3": (44_725_696, 35_498_496),
}


@pytest.mark.parametrize("arch", PARAMETERS)
def test_parameters_of_pyramids(on_meta, arch):
    published, reduced = PARAMETERS[arch]
    theirs = timm.create_model(arch, num_classes=0)
    assert parameter_count(theirs) == published
    merging = sum(
        parameter_count(block.attn.sr) + parameter_count(block.attn.norm)
        for stage in theirs.stages[:3]
        for block in stage.blocks
    )
    assert parameter_count(pyramid(arch=arch)) == published - merging == reduced


def test_pretrained_pyramid_reads_a_file(local_weights):
    """q and kv become qkv in this order; sr and norm go, all else stays, the first filters take images in [-1, 1]."""
    theirs = local_weights("pvt_v2_b0")
    file = theirs.state_dict()
    encoder = pyramid(pretrained=True)
    own = {key.replace("attn.attention", "attn"): value for key, value in encoder.pvt.state_dict().items()}
    gone = {key for key in file if key not in own}
    replaced = [f"stages.{stage}.blocks.{block}.attn" for stage in range(3) for block in range(2)]
    lost = [f"{part}.{kind}" for part in ("q", "kv", "sr", "norm") for kind in ("weight", "bias")]
    assert gone == {f"{name}.{part}" for name in replaced for part in lost} | {"head.weight", "head.bias"}
    for name in replaced:
        for kind in ("weight", "bias"):
            q, kv = file[f"{name}.q.{kind}"], file[f"{name}.kv.{kind}"]
            assert torch.equal(own[f"{name}.qkv.{kind}"], torch.cat([q, kv]))
    for key in set(own) & set(file) - {"patch_embed.proj.weight", "patch_embed.proj.bias"}:
        assert torch.equal(own[key], file[key]), key
    whole, images = pyramid(pretrained=True, attention_stages="none", image_size=96), pictures(96, 1)
    mean, std = (torch.tensor(theirs.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(((images + 1) / 2 - mean) / std), pre_logits=True)
        unscaled = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        assert (whole(images) - expected).norm() < 0.2 * (unscaled - expected).norm()  # the border apart


def test_pyramid_options():
    images = pictures(64)
    plain = pyramid(image_size=64)
    maps = plain.pvt.forward_features(images)
    assert maps.shape == (2, 256, 2, 2) and plain.out_dim == 256
    torch.testing.assert_close(plain(images), maps.flatten(2).sum(dim=2) / 4)
    softened = pyramid(image_size=64, pool="spatial_softmax", num_keypoints=5)
    assert softened.out_dim == 10
    torch.testing.assert_close(softened(images), softened.keypoints(softened.pvt.forward_features(images)))
    read = pyramid(image_size=64, out_dim=7)
    assert read.out_dim == 7
    torch.testing.assert_close(read(images), maps.mean(dim=(2, 3)) @ read.readout.weight.T + read.readout.bias)
    assert pyramid(image_size=64, arch="pvt_v2_b1").out_dim == 512


def test_drop_path_of_the_pyramid_acts_in_training_only():
    images, plain, dropping = pictures(32), pyramid(), pyramid(drop_path=0.5)
    assert torch.equal(dropping(images), plain(images))
    rates = [block.drop_path1.drop_prob for stage in dropping.pvt.stages for block in stage.blocks[1:]]
    assert rates == pytest.approx([0.5 / 7, 1.5 / 7, 2.5 / 7, 0.5])
    dropping.train()
    torch.manual_seed(0)
    assert (dropping(images) - plain(images)).abs().max() > 1e-3


@pytest.mark.slow
def test_gradient_checkpointing_of_the_pyramid():
    """The same gradients, while every block runs again in the backward pass."""
    gradients = []
    for option in (False, True):
        encoder, runs = pyramid(gradient_checkpointing=option).train(), []
        for stage in encoder.pvt.stages:
            for block in stage.blocks:
                block.norm1.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        encoder(pictures(32)).square().sum().backward()
        assert len(runs) == (16 if option else 8)
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"arch": "pvt_v2_b9"}, "arch"),
        ({"arch": "deit_tiny_patch16_224"}, "arch"),
        ({"attention_stages": "last"}, "attention_stages"),
        ({"pool": "cls"}, "pool"),
        ({"pool": "spatial_softmax"}, "spatial softmax"),  # one cell
        ({"attention_stages": "none", "image_size": 28}, "image size"),
        ({"attention": {"name": "dense"}}, "attention"),
        ({"attention": {"name": "hybrid"}}, "dilations"),  # for one head
    ],
    ids=str,
)
def test_pyramid_errors(options, key):
    with pytest.raises(ValueError, match=key):
        pyramid(**options)


def test_sizes_of_images_that_the_pyramid_takes():
    with pytest.raises(ValueError, match="images"):
        pyramid(attention=SOFTMAX)(pictures(33))
    assert torch.isfinite(pyramid(image_size=5, attention=SOFTMAX)(pictures(5))).all()  # nothing is merged


def test_layers_of_the_pyramid():
    encoder = pyramid(pool="mean", out_dim=3, arch="pvt_v2_b2")
    assert encoder.num_layers == 17
    expected = {
        "pvt.patch_embed.proj.weight": 0,
        "pvt.patch_embed.norm.bias": 0,
        "pvt.stages.0.blocks.0.attn.attention.qkv.weight": 1,
        "pvt.stages.0.blocks.2.mlp.fc1.bias": 3,
        "pvt.stages.0.norm.weight": 4,
        "pvt.stages.1.downsample.proj.weight": 4,
        "pvt.stages.1.blocks.0.norm1.weight": 4,
        "pvt.stages.3.blocks.2.attn.kv.weight": 16,
        "pvt.stages.3.norm.bias": 17,
        "readout.weight": 17,
    }
    layers = {name: encoder.layer_of(name) for name, _ in encoder.named_parameters()}
    assert {name: layers[name] for name in expected} == expected and set(layers.values()) == set(range(18))
