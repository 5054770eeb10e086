"""Video classifiers: heads, views, training, and weights shared with images."""

import pytest
import torch
import torch.nn.functional as F
from clips import CLASSES, FRAMES, PATCHES, SIZE, SOFTMAX, SPACE_TIMES, classifier, clips, labelled, video_config
from heads import assert_compiles, assert_resumes_exactly, head_config, on_resnet
from torch import nn

from policy.attention import ATTENTIONS
from policy.attention.softmax import SoftmaxAttention
from policy.build import build_model
from policy.checkpoint import load_encoder, load_model, load_weights
from policy.head.space_time import JointSpaceTime

# What stays of the image encoder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", ["output", "mean", "cls"])
@pytest.mark.parametrize("pool", ["mean", "spatial_softmax"])
def test_divided_starts_as_the_mean_over_frames_of_the_image_encoder(features, pool):
    model = classifier(trained=False, features=features, encoder={"pool": pool})
    video = clips()
    frames = torch.stack([model.encode(video[:, f]) for f in range(FRAMES)], dim=1)
    torch.testing.assert_close(model.encode_batch({"video": video}), frames, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.logits({"video": video}), model.head(frames.mean(dim=1)))
    still = video[:, :1].expand(-1, FRAMES, -1, -1, -1)
    averaging = classifier(trained=False, features=features, encoder={"pool": pool}, average_class_token=True)
    torch.testing.assert_close(averaging.encode_batch({"video": still})[:, 1], frames[:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("features", ["output", "mean", "cls"])
def test_space_is_the_image_encoder_frame_by_frame(features):
    model, video = classifier(space_time="space", features=features), clips()
    frames = model.encode(video.flatten(0, 1)).unflatten(0, (2, FRAMES))
    torch.testing.assert_close(model.logits({"video": video}), model.head(frames.mean(dim=1)))
    tokens = model.vision.tokens(video[:, 1])
    expected = {"output": model.vision(video[:, 1]), "mean": tokens[:, 1:].mean(1), "cls": tokens[:, 0]}[features]
    torch.testing.assert_close(model.encode_batch({"video": video})[:, 1], expected)


def test_order_of_the_frames():
    """Means over frames are blind to it; codes of time, and a head that reads frames in order, are not."""

    def change(**options):
        model, video = classifier(**options), clips()
        return (model.logits({"video": video}) - model.logits({"video": video.flip(1)})).abs().max().item()

    assert change(space_time="space") < 1e-5
    assert change(space_time="space", head="temporal") > 1e-2
    assert change(space_time="divided") > 1e-2 and change(space_time="joint", attention=SOFTMAX) > 1e-2
    blind, video = classifier(space_time="divided"), clips()
    torch.nn.init.zeros_(blind.space_time.time_embed)
    torch.testing.assert_close(
        blind.logits({"video": video}), blind.logits({"video": video.flip(1)}), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("space_time", SPACE_TIMES)
def test_weights_of_an_image_classifier(space_time):
    """They load into the encoder, reach what is shared with it, and come back as those of an image encoder."""
    torch.manual_seed(1)
    image = build_model(head_config("image_classifier", size=SIZE, depth=3, num_classes=CLASSES)).eval()
    model, video = classifier(trained=False, space_time=space_time), clips()
    load_weights(model.encoder.encoders["image"], image.encoder.encoders["image"].state_dict(), "encoder")
    torch.testing.assert_close(model.vision(video[:, 0]), image.vision(video[:, 0]))
    if space_time == "joint":
        fresh = classifier(trained=False, space_time="joint")
        assert not torch.equal(fresh.encode_batch({"video": video}), model.encode_batch({"video": video}))
        single = classifier(trained=False, space_time="joint", frames=1)
        load_weights(single.encoder.encoders["image"], image.encoder.encoders["image"].state_dict(), "encoder")
        torch.testing.assert_close(single.encode_batch({"video": video[:, :1]})[:, 0], image.vision(video[:, 0]))
    else:
        frames = torch.stack([image.vision(video[:, f]) for f in range(FRAMES)], dim=1)
        torch.testing.assert_close(model.encode_batch({"video": video}), frames)


class SizedAttention(SoftmaxAttention):
    """A mechanism with parameters of its own, one of which depends on the number of tokens."""

    def __init__(self, *, num_patches, prefix_tokens, **options):
        super().__init__(**options)
        self.gain, self.places = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(prefix_tokens + num_patches, 1))

    def forward(self, x, **options):
        return self.gain * super().forward(x + self.places, **options)


def test_joint_attention_shares_all_parameters_that_fit(monkeypatch):
    monkeypatch.setitem(ATTENTIONS.parts, "sized", SizedAttention)
    model = classifier(attention=SOFTMAX)
    for block in model.vision.vit.blocks:
        block.attn = SizedAttention(dim=16, num_heads=2, num_patches=PATCHES, prefix_tokens=1)
    model.space_time = JointSpaceTime(model.vision, FRAMES, attention={"name": "sized"})
    model.train()(labelled(), {})["loss"].backward()
    for block, joint in zip(model.vision.vit.blocks, model.space_time.layers, strict=True):
        shared = {name for name, parameter in joint.named_parameters() if parameter is block.attn.get_parameter(name)}
        assert shared == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "gain"}
        assert joint.places.shape == (1 + FRAMES * PATCHES, 1)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


# Heads, views, losses -------------------------------------------------------------------------------------------------


def test_views_are_averaged_as_probabilities():
    model, features = classifier(space_time="space"), 5 * torch.randn(4, 5, FRAMES, 5)
    batch = {"features": features, "label": torch.arange(4)}
    scores = torch.stack([model.logits({"features": features[:, v]}) for v in range(5)], dim=1).double()
    expected = scores.softmax(dim=-1).mean(dim=1)
    torch.testing.assert_close(model.logits(batch).exp(), expected.float(), rtol=1e-4, atol=1e-6)
    assert (expected - scores.mean(dim=1).softmax(dim=-1)).abs().max() > 1e-3
    losses = model(batch, {})
    right = expected[torch.arange(4), batch["label"]]
    assert losses["loss"].item() == pytest.approx(-right.log().mean().item(), rel=1e-4)
    assert losses["top1"].item() == (expected.argmax(dim=1) == batch["label"]).double().mean().item()
    video = clips(lead=(5,))
    views = torch.stack([model.logits({"video": video[:, v]}) for v in range(5)], dim=1).softmax(dim=-1)
    torch.testing.assert_close(model.logits({"video": video}).exp(), views.mean(dim=1))


def test_loss_and_label_smoothing():
    model, batch = classifier(label_smoothing=0.2), labelled()
    log = model.logits(batch).double().log_softmax(dim=-1)
    right = log[torch.arange(4), batch["label"]]
    assert model(batch, {})["loss"].item() == pytest.approx(-right.mean().item(), rel=1e-5)
    smooth = -(0.8 * right + 0.2 * log.mean(dim=1)).mean().item()
    assert model.train()(batch, {})["loss"].item() == pytest.approx(smooth, rel=1e-5)


def test_dropout_acts_before_the_head_in_training_only():
    model, plain, batch = classifier(dropout=0.5), classifier(), labelled()
    torch.testing.assert_close(model.logits(batch), plain.logits(batch))
    seen = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.train().logits(batch)
    features = plain.encode_batch(batch).mean(dim=1)
    dropped = seen[0] == 0
    assert 0 < dropped.float().mean() < 1
    torch.testing.assert_close(seen[0], torch.where(dropped, 0.0, 2 * features))


@pytest.mark.parametrize("space_time", SPACE_TIMES)
def test_a_batch_of_no_clips(space_time):
    """Evaluation leaves unreadable videos out of a batch, which may be all of it."""
    assert classifier(space_time=space_time).logits({"video": clips(0, lead=(2,))}).shape == (0, CLASSES)


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("head", ["linear", "temporal"])
def test_cached_features(head, lead):
    model, batch = classifier(space_time="space", head=head), labelled(lead=lead)
    features = model.encode_batch(batch)
    assert features.shape == (4, *lead, FRAMES, 5)
    cached = {"features": features.detach(), "label": batch["label"]}
    torch.testing.assert_close(model.logits(cached), model.logits(batch))
    model(cached, {})["loss"].backward()
    assert all((p.grad is None) != name.startswith("head.") for name, p in model.named_parameters())


def test_temporal_head_by_hand():
    model, video = classifier(space_time="space", head="temporal"), clips(1)
    w = model.head.state_dict()
    frames = [F.layer_norm(model.vision(video[:, f])[0], (5,), w["0.weight"], w["0.bias"]) for f in range(FRAMES)]
    hidden = F.gelu(w["2.0.weight"] @ torch.cat(frames) + w["2.0.bias"])
    assert hidden.shape == (256,)
    torch.testing.assert_close(model.logits({"video": video})[0], w["2.2.weight"] @ hidden + w["2.2.bias"])


# Training -------------------------------------------------------------------------------------------------------------

COMBINATIONS = [
    {"space_time": s, "features": f, "encoder": {"pool": p}}
    for s in SPACE_TIMES
    for f, p in (("output", "mean"), ("output", "spatial_softmax"), ("mean", "spatial_softmax"), ("cls", "cls"))
] + [{"head": "temporal"}, {"average_class_token": True, "features": "cls"}]


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_gradients_reach_every_trained_parameter(options):
    """Fresh, some are zero but none is missing; later all are there."""
    for trained in (False, True):
        model = classifier(trained=trained, **options).train()
        model(labelled(), model.randomness(4, torch.Generator()))["loss"].backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert not trained or not parameter.requires_grad or parameter.grad.abs().sum() > 0, name
            unread = options.get("features") in ("mean", "cls") and name.startswith("encoder.encoders.image.")
            assert parameter.requires_grad != (unread and ".vit." not in name), name


@pytest.mark.parametrize("space_time", SPACE_TIMES)
def test_gradient_checkpointing_changes_memory_only(space_time):
    gradients = []
    for option in (False, True):
        model = classifier(space_time=space_time, encoder={"gradient_checkpointing": option}).train()
        calls = []
        model.vision.vit.blocks[0].norm1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(labelled(), {})["loss"].backward()
        assert len(calls) == 1 + option
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_drop_path_acts_on_time_too():
    model, video = classifier(encoder={"drop_path": 0.5, "depth": 2}).train(), clips(8)
    kept = []
    model.space_time.layers[1].register_forward_hook(lambda module, inputs, output: kept.append(output))
    block = model.vision.vit.blocks[1]
    block.drop_path1.register_forward_hook(lambda module, inputs, output: kept.append(output))
    torch.manual_seed(0)
    model.space_time(model.vision, video)
    added, after, _ = kept
    dropped = (after == 0).flatten(1).all(dim=1)
    assert 0 < dropped.sum() < 8 and (added != 0).any(dim=(1, 2, 3)).all()


def test_layers_for_layer_wise_rates():
    for space_time in SPACE_TIMES:
        model = classifier(space_time=space_time)
        assert model.num_layers == 4
        layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
        expected = {"encoder.encoders.image.vit.pos_embed": 0, "encoder.encoders.image.vit.blocks.1.attn.qkv.bias": 2}
        expected |= {"encoder.encoders.image.vit.norm.bias": 4, "head.weight": 4}
        if space_time != "space":
            expected["space_time.time_embed"] = 0
        if space_time == "divided":
            expected |= {f"space_time.layers.{i}.fc.weight": i + 1 for i in range(3)}
        assert {name: layers[name] for name in expected} == expected
        assert any("space_time.layers" in name for name in layers) == (space_time == "divided")  # joint shares all


def test_compiled_step_is_the_same(monkeypatch):
    model = classifier(encoder={"depth": 1}, attention=SOFTMAX).train()
    assert_compiles(model, labelled(), {}, monkeypatch)


class Clips:
    """Six fixed clips; what training and evaluation see differs by the views' axis, as in real data."""

    def __len__(self):
        return 6

    def batch(self, indices):
        batch = labelled(6)
        return {"video": batch["video"][indices][:, None], "label": batch["label"][indices]}

    def stream(self, requests):
        for request in requests:
            indices = [index for index, _ in request]
            yield {key: value[indices] for key, value in labelled(6).items()}


@pytest.mark.parametrize("space_time", ["divided", "joint"])
def test_a_run_resumes_exactly_and_its_encoder_is_one_of_images(space_time, tmp_path, runs):
    options = video_config(space_time=space_time, features="mean", dropout=0.1)
    whole = assert_resumes_exactly(options, Clips(), tmp_path, batch_size=3, layer_decay=0.8)
    model = load_model(tmp_path / "whole")
    assert torch.equal(model.logits({"video": clips()}), whole.ema.model.logits({"video": clips()}))
    encoder = load_encoder(tmp_path / "whole")
    torch.testing.assert_close(encoder(clips()[:, 0]), whole.ema.model.vision(clips()[:, 0]))


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"space_time": "time"}, "space_time"),
        ({"head": "mlp"}, "model.head"),
        ({"features": "max"}, "features"),
        ({"frames": 0}, "frames"),
        ({"dropout": 1.0}, "dropout"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"num_classes": 1}, "num_classes"),
        ({"space_time": "joint", "average_class_token": True}, "average_class_token"),
        ({"encoder": {"arch": "vit_medium_patch16_gap_256"}, "average_class_token": True}, "arch"),
    ],
    ids=str,
)
def test_classifiers_that_cannot_be(options, key):
    with pytest.raises(ValueError, match=key):
        classifier(**options)


def test_frames_on_an_encoder_without_tokens():
    with pytest.raises(ValueError, match="space_time"):
        build_model(on_resnet(video_config()))
    model = build_model(on_resnet(video_config(space_time="space"))).eval()
    assert model.logits({"video": torch.zeros(1, FRAMES, 3, 84, 84)}).shape == (1, CLASSES)


@pytest.mark.parametrize("key", ["video", "features"])
def test_input_errors(key):
    model = classifier(space_time="space")
    right = {"video": (FRAMES, 3, SIZE, SIZE), "features": (FRAMES, 5)}[key]
    for shape in ((2, FRAMES + 1, *right[1:]), (2, *right[:-1], right[-1] + 1), right, (1, 1, 2, *right)):
        with pytest.raises(ValueError, match=key):
            model.logits({key: torch.zeros(shape)})
    with pytest.raises(ValueError, match="features"):
        classifier().logits({"features": torch.zeros(2, FRAMES, 5)})
