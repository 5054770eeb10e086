"""Image classifiers: heads, mixing, dropped tokens, and an encoder's way between a policy and a classifier."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from heads import head_config, on_resnet
from timm.data.mixup import Mixup, mixup_target

from policy.attention import build_attention
from policy.build import build_model
from policy.checkpoint import load_weights
from policy.encoder.adapt import adapt_weights
from policy.encoder.vit import ViTEncoder
from policy.head.backbone import kept_tokens
from policy.head.mixing import draw_mixing, mix_images, soft_targets

SIZE = 12


def config(*, image_size=SIZE, **options):
    return head_config("image_classifier", size=image_size, **{"num_classes": 3, **options})


def classifier(**options):
    torch.manual_seed(0)
    model = build_model(config(**options))
    last = model.head[-1] if options.get("hidden") else model.head
    torch.nn.init.normal_(last.weight)  # the small initial one hides all
    return model


def batch(count=6, size=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, size, size, generator=generator) * 2 - 1
    return {"image": images, "label": torch.randint(3, (count,), generator=generator)}


def generator():
    return torch.Generator().manual_seed(1)


# The head --------------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_encoder():
    images = batch()["image"]
    for features in ("output", "mean", "cls"):
        model = classifier(features=features).eval()
        tokens = model.vision.tokens(images)
        expected = {"output": model.vision(images), "mean": tokens[:, 1:].mean(1), "cls": tokens[:, 0]}[features]
        torch.testing.assert_close(model.encode(images), expected)
        torch.testing.assert_close(model.logits({"image": images}), model.head(expected))


def test_loss_and_accuracy_by_hand():
    model, data = classifier().eval(), batch()
    losses = model(data, {})
    scores = model.logits(data).detach().double()
    log_shares = scores - scores.exp().sum(1, keepdim=True).log()
    expected = -torch.stack([log_shares[i, label] for i, label in enumerate(data["label"])]).mean()
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    right = sum(int(scores[i].argmax() == label) for i, label in enumerate(data["label"]))
    assert losses["top1"].item() == pytest.approx(right / 6)


def test_cached_features_stand_for_images():
    model, data = classifier(normalize_features=True).eval(), batch()
    features = model.encode(data["image"]).detach()
    direct, cached = model(data, {}), model({"features": features, "label": data["label"]}, {})
    torch.testing.assert_close(direct["loss"], cached["loss"])


def test_normalized_features():
    model, data = classifier(normalize_features=True).train(), batch()
    features = model.encode(data["image"]) * 100 + 7
    scaled = (features - features.mean(0)) / features.std(0, unbiased=False)
    torch.testing.assert_close(model.logits({"features": features}), model.head(scaled), rtol=1e-3, atol=1e-3)


def test_hidden_layer():
    model, features = classifier(hidden=7).eval(), torch.randn(4, 5)
    expected = F.gelu(features @ model.head[0].weight.T + model.head[0].bias) @ model.head[2].weight.T
    torch.testing.assert_close(model.logits({"features": features}), expected)


@pytest.mark.parametrize(
    "change", [{"mixup": 0.8}, {"cutmix": 1.0}, {"label_smoothing": 0.1}, {"mask_ratio": 0.5}, {"features": "mean"}]
)
def test_options_change_training_but_only_features_change_evaluation(change):
    models = [classifier(), classifier(**change)]
    if "features" not in change:
        models[1].load_state_dict(models[0].state_dict())
    losses = [
        [m.train(mode)(batch(), m.randomness(6, generator()))["loss"].item() for mode in (True, False)] for m in models
    ]
    assert losses[0][0] != losses[1][0]
    assert (losses[0][1] == losses[1][1]) == ("features" not in change)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"features": "max"}, "features"),
        ({"num_classes": 1}, "num_classes"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"mixup": -1}, "mixup"),
        ({"hidden": 0}, "hidden"),
    ],
    ids=str,
)
def test_classifiers_that_cannot_be(change, key):
    with pytest.raises(ValueError, match=key):
        build_model(config(**change))


def test_an_encoder_without_tokens_gives_no_choice_of_them():
    with pytest.raises(ValueError, match="features"):
        build_model(on_resnet(config(features="mean")))


def test_layers_of_parameters():
    model, vit = classifier(), "encoder.encoders.image.vit."
    expected = {f"{vit}pos_embed": 0, f"{vit}patch_embed.proj.bias": 0, f"{vit}blocks.1.attn.qkv.weight": 2}
    expected |= {f"{vit}norm.weight": 3, "head.weight": 3}
    assert model.num_layers == 3 and {name: model.layer_of(name) for name in expected} == expected


# Mixing ----------------------------------------------------------------------------------------------------------


def test_mixing_is_that_of_timm(monkeypatch):
    """Given timm's own shares and boxes, ours makes the same images and targets."""
    images, labels = torch.rand(4, 3, 9, 9), torch.tensor([0, 1, 2, 2])
    timm = Mixup(mixup_alpha=0.8, cutmix_alpha=0.0, mode="batch", label_smoothing=0.1, num_classes=3)
    monkeypatch.setattr(timm, "_params_per_batch", lambda: (0.3, False))
    expected, target = timm(images.clone(), labels)
    drawn = {
        "share": torch.full((4,), 0.3),
        "cut": torch.zeros(4, dtype=torch.bool),
        "row": torch.rand(4),
        "column": torch.rand(4),
    }
    mixed, share = mix_images(images, drawn)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(soft_targets(labels, 3, smoothing=0.1, share=share), target)
    torch.testing.assert_close(target, mixup_target(labels, 3, 0.3, 0.1))


def test_cut_boxes_by_brute_force():
    images = torch.rand(5, 2, 8, 6)
    drawn = draw_mixing(5, generator(), mixup=0.0, cutmix=1.0)
    mixed, share = mix_images(images, drawn)
    for i in range(5):
        side = (1 - drawn["share"][i].item()) ** 0.5
        row, column = int(drawn["row"][i] * 8), int(drawn["column"][i] * 6)
        taken = 0
        for y in range(8):
            for x in range(6):
                inside = abs(y + 0.5 - row) < int(side * 8 / 2) and abs(x + 0.5 - column) < int(side * 6 / 2)
                taken += inside
                assert torch.equal(mixed[i, :, y, x], images[4 - i if inside else i, :, y, x])
        assert share[i].item() == pytest.approx(1 - taken / 48)
    assert 0 < share.min() < 1


def test_draws_follow_the_generator_and_the_parameters():
    first, again = (draw_mixing(2000, generator(), mixup=0.8, cutmix=1.0) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert 0.45 < first["cut"].float().mean() < 0.55
    cut = first["cut"]
    assert first["share"][cut].var().item() == pytest.approx(1 / 12, rel=0.1)  # Beta(1, 1)
    assert first["share"][~cut].var().item() == pytest.approx(0.25 / 2.6, rel=0.1)  # Beta(0.8, 0.8)


# Dropped tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["softmax", "fibottention"])
@pytest.mark.parametrize("masked_score", ["zero", "exclude"])
def test_kept_tokens_see_each_other_as_among_all(attention, masked_score):
    """What is dropped is as if it were no token at all: the pattern among the rest is that of the full grid."""
    options = {"masked_score": masked_score} if attention == "fibottention" else {}
    torch.manual_seed(0)
    sizes = {"dim": 8, "num_heads": 2, "num_patches": 16, "grid": (4, 4), "layer": 1, "depth": 2, "prefix_tokens": 1}
    module = build_attention(attention, **sizes, **options).double()
    kept = torch.tensor([[0, 2, 3, 7, 8, 15], [1, 4, 5, 6, 9, 10]])
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    q, k, v = module.qkv(x).reshape(2, 7, 3, 2, 4).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / 2
    for row in range(2):
        for head in range(2):
            for i in range(7):
                for j in range(7):
                    if i == 0 or j == 0 or attention == "softmax":
                        continue
                    if not module.mask[head, 1 + kept[row, i - 1], 1 + kept[row, j - 1]]:
                        scores[row, head, i, j] = 0 if masked_score == "zero" else -torch.inf
    expected = module.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 8))
    torch.testing.assert_close(module(x, kept=kept), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_tokens_kept_is_none_dropped(checkpointing):
    torch.manual_seed(0)
    options = {key: value for key, value in tiny.VIT.items() if key not in ("name", "init", "freeze")}
    encoder = ViTEncoder(
        image_size=SIZE, attention={"name": "fibottention"}, gradient_checkpointing=checkpointing, **options
    )
    images = batch()["image"]
    everything = torch.arange(9).expand(6, 9)
    torch.testing.assert_close(encoder(images, everything), encoder(images))


def test_mask_ratio_drops_tokens():
    """The blocks see N (1 - ratio) tokens, and pixels of dropped patches change nothing."""
    model, seen = classifier(mask_ratio=0.4), []
    model.vision.vit.blocks[0].norm1.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    data, randomness = batch(), model.randomness(6, generator())
    data["image"].requires_grad_(True)
    model.train()(data, randomness)["loss"].backward()
    assert seen == [1 + 5]
    patches = data["image"].grad.abs().sum(1).unflatten(1, (3, 4)).unflatten(3, (3, 4)).sum((2, 4)).flatten(1)  # (B, 9)
    kept = kept_tokens(randomness["order"], 0.4)
    touched = [set(row.nonzero().flatten().tolist()) for row in patches]
    assert touched == [set(row.tolist()) for row in kept]
    assert len({tuple(row.tolist()) for row in kept}) > 1


def test_spatial_softmax_needs_the_whole_grid():
    model = classifier(mask_ratio=0.4, encoder={"pool": "spatial_softmax"}).train()
    with pytest.raises(ValueError, match="kept"):
        model(batch(), model.randomness(6, generator()))


# One encoder for policies and classifiers ------------------------------------------------------------------------


def test_position_codes_follow_the_grid():
    small, large = classifier().vision, classifier(image_size=24).vision
    tensors, notes = adapt_weights(large, small.state_dict())
    assert len(notes) == 1 and "3x3" in notes[0] and "6x6" in notes[0]
    load_weights(large, tensors, "here")
    grid = small.vit.pos_embed[:, 1:].reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (6, 6), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 36, -1)
    torch.testing.assert_close(large.vit.pos_embed[:, 1:], expected)
    assert torch.equal(large.vit.pos_embed[:, :1], small.vit.pos_embed[:, :1])
    assert len(large.vit.blocks[0].attn.mask[0]) == 37


def test_patch_filters_follow_the_patch_size():
    small, large = classifier().vision, classifier(image_size=24, encoder={"patch_size": 8}).vision
    tensors, notes = adapt_weights(large, small.state_dict())
    assert len(notes) == 1 and "8 px" in notes[0]
    load_weights(large, tensors, "here")
    images = batch()["image"]
    enlarged = F.interpolate(images, scale_factor=2, mode="bicubic")
    original, resampled = small.vit.patch_embed(images), large.vit.patch_embed(enlarged)
    assert F.cosine_similarity(original.flatten(1), resampled.flatten(1)).min() > 0.97


@pytest.mark.parametrize(("change", "key"), [({"dim": 24}, "readout.weight"), ({"depth": 3}, "vit.blocks.2")])
def test_other_widths_and_depths_are_refused(change, key):
    source, target = classifier().vision, classifier(encoder=change).vision
    tensors, notes = adapt_weights(target, source.state_dict())
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=key):
        load_weights(target, tensors, "here")
    assert notes == [] and all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
