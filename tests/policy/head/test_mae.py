"""The masked autoencoder: patches, the loss by hand, what the encoder sees, and that it learns."""

import math

import pytest
import torch
import torch.nn.functional as F
from heads import assert_compiles, assert_resumes_exactly, head_config, on_resnet

from policy.build import build_model
from policy.checkpoint import load_encoder, load_weights
from policy.head.mae import patchify, unpatchify

SIZE, PATCH = 16, 4
COUNT = 16  # patches
DECODER = {"decoder_dim": 8, "decoder_depth": 2, "decoder_heads": 2}


def config(*, size=SIZE, **model):
    return head_config("mae", size=size, **{**DECODER, **model})


def autoencoder(**options):
    torch.manual_seed(0)
    return build_model(config(**options)).eval()


def images(count=3, *, size=SIZE, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def drawn(model, count=3, seed=0):
    return model.randomness(count, torch.Generator().manual_seed(seed))


def predict(model, images, order):
    """Pixels (B, N, 48) that the decoder makes of ``images`` without the patches that ``order`` hides."""
    made = []
    hook = model.decoder.register_forward_hook(lambda module, inputs, output: made.append(output))
    model({"image": images}, {"order": order})
    hook.remove()
    return made[0]


def seen_patches(randomness, count):
    """Sets of the patches that stay, those of the smallest numbers."""
    return [set(row.argsort()[:count].tolist()) for row in randomness["order"]]


def square(images, row, patch, columns=SIZE // PATCH):
    """The pixels (3, p, p) of a patch."""
    top, left = (PATCH * place for place in divmod(patch, columns))
    return images[row, :, top : top + PATCH, left : left + PATCH]


# Patches --------------------------------------------------------------------------------------------------------------


def test_patches_are_squares_in_reading_order_and_fit_together_again():
    pictures = images(2, size=14)  # 2 px left over
    patches = patchify(pictures, (PATCH, PATCH))
    assert patches.shape == (2, 9, 48)
    for row in range(2):
        for patch in range(9):
            assert torch.equal(patches[row, patch], square(pictures, row, patch, columns=3).flatten())
    assert torch.equal(unpatchify(patches, (3, 3), (PATCH, PATCH)), pictures[..., :12, :12])
    wide = images(2, size=8)[..., :4, :]
    assert torch.equal(unpatchify(patchify(wide, (2, 4)), (2, 2), (2, 4)), wide)


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_loss_by_hand(normalize):
    """Mean over hidden patches only, in float64 from the decoder's predictions."""
    model, pictures = autoencoder(normalize_pixels=normalize), images()
    randomness = drawn(model)
    predicted = predict(model, pictures, randomness["order"])
    errors = []
    for row, seen in enumerate(seen_patches(randomness, 4)):
        for patch in set(range(COUNT)) - seen:
            target = square(pictures, row, patch).flatten().double()
            if normalize:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append((predicted[row, patch].double() - target).square().mean().item())
    assert len(errors) == 3 * 12
    assert model({"image": pictures}, randomness)["loss"].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def reference_prediction(model, tokens, kept):
    """Pixels (N, 48) of one picture from the encoder's tokens (1+n, C): section 3, from the decoder's weights alone."""
    w = {key: value.double() for key, value in model.decoder.state_dict().items()}
    dim, heads = DECODER["decoder_dim"], DECODER["decoder_heads"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, (dim,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    x = linear(tokens.double(), "embed")
    rows = [x[0]]
    for patch in range(COUNT):
        place = divmod(patch, SIZE // PATCH)
        phases = [position / 10000 ** (i / (dim // 4)) for position in place for i in range(dim // 4)]
        code = torch.tensor([math.sin(p) for p in phases] + [math.cos(p) for p in phases], dtype=torch.float64)
        rows.append((x[1 + kept.index(patch)] if patch in kept else w["mask_token"][0, 0]) + code)
    x = torch.stack(rows)
    for block in range(DECODER["decoder_depth"]):
        name = f"blocks.{block}"
        q, k, v = (
            part.chunk(heads, dim=-1) for part in linear(norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, -1)
        )
        mixed = [(q[h] @ k[h].T / (dim // heads) ** 0.5).softmax(dim=-1) @ v[h] for h in range(heads)]
        x = x + linear(torch.cat(mixed, dim=-1), f"{name}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    return linear(norm(x, "norm"), "to_pixels")[1:]


def test_decoder_by_hand():
    model, pictures = autoencoder(), images()
    with torch.no_grad():
        model.decoder.mask_token.normal_()
        for parameter in model.decoder.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    randomness = drawn(model)
    predicted = predict(model, pictures, randomness["order"])
    for row, seen in enumerate(seen_patches(randomness, 4)):
        kept = sorted(seen)
        tokens = model.vision.tokens(pictures[row : row + 1], torch.tensor([kept]))[0]
        expected = reference_prediction(model, tokens, kept)
        torch.testing.assert_close(predicted[row], expected.float(), rtol=1e-4, atol=1e-4)


# What the encoder sees ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "count"), [(0.75, 4), (0.5, 8), (0.4, 10), (0.95, 1)])
def test_encoder_works_on_the_visible_patches_only(ratio, count):
    model = autoencoder(mask_ratio=ratio)
    lengths = []
    for block in model.vision.vit.blocks:
        block.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
        block.attn.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    model({"image": images()}, drawn(model))
    assert set(lengths) == {1 + count}


def test_pixels_of_hidden_patches_do_not_reach_the_encoder():
    model, pictures = autoencoder(), images().requires_grad_()
    randomness = drawn(model)
    encoded = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: encoded.append(inputs[0]))
    model({"image": pictures}, randomness)
    encoded[0].square().sum().backward()
    for row, seen in enumerate(seen_patches(randomness, 4)):
        for patch in range(COUNT):
            assert (square(pictures.grad, row, patch) != 0).any() == (patch in seen)


def test_randomness_is_drawn_for_each_picture_from_the_generator():
    model = autoencoder()
    first, again, other = (drawn(model, seed=seed)["order"] for seed in (0, 0, 1))
    assert first.shape == (3, COUNT) and torch.equal(first, again) and not torch.equal(first, other)
    assert len({frozenset(seen) for seen in seen_patches(drawn(model, 20), 4)}) > 10


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "cls", "spatial_softmax"])
def test_gradients_reach_every_trained_parameter(pool):
    """The read-out, which takes no part, is not trained."""
    model = autoencoder(encoder={"pool": pool}).train()
    model({"image": images()}, drawn(model))["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert parameter.requires_grad == (".readout." not in name and ".keypoints." not in name), name
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name


def test_it_learns_two_pictures():
    model = autoencoder(decoder_dim=32, encoder={"dim": 32}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    pictures = torch.stack([(rows // 2 + columns) % 2, (rows + columns // 3) % 2])[:, None].expand(-1, 3, -1, -1) - 0.5
    losses = []
    for step in range(60):
        loss = model({"image": pictures}, drawn(model, 2, seed=step))["loss"]
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9 and sum(losses[-5:]) / 5 < 0.3


def test_layers_for_layer_wise_rates():
    model = autoencoder()
    vit = "encoder.encoders.image.vit."
    expected = {f"{vit}pos_embed": 0, f"{vit}blocks.1.mlp.fc1.weight": 2, f"{vit}norm.weight": 3}
    expected |= {"decoder.mask_token": 3, "decoder.to_pixels.bias": 3}
    assert model.num_layers == 3 and {name: model.layer_of(name) for name in expected} == expected


def test_compiled_step_is_the_same(monkeypatch):
    model = autoencoder(attention={"name": "softmax"}, encoder={"depth": 1}).train()
    assert_compiles(model, {"image": images()}, drawn(model), monkeypatch)


class Pictures:
    """Eight fixed pictures."""

    def __len__(self):
        return 8

    def batch(self, indices):
        return {"image": images(8)[indices], "label": torch.zeros(len(indices), dtype=torch.int64)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_resumes_exactly_draws_pictures_and_hands_on_its_encoder(tmp_path, runs, precision):
    assert_resumes_exactly(config(), Pictures(), tmp_path, batch_size=4, layer_decay=0.9, precision=precision)
    assert len(list((tmp_path / "whole").rglob("*.png"))) == 1
    encoder = load_encoder(tmp_path / "whole")
    model = build_model(head_config("image_classifier", size=SIZE, num_classes=3)).eval()
    load_weights(model.vision, encoder.state_dict(), "encoder")
    torch.testing.assert_close(model.encode(images()), encoder(images()))


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_reconstructions(normalize):
    """Seen patches as they are, hidden ones predicted with the contrast of the truth; what is shown as masked is."""
    model, pictures = autoencoder(normalize_pixels=normalize), images()
    with torch.no_grad():
        model.decoder.to_pixels.weight.mul_(50)  # predictions beyond white and black
    randomness = drawn(model)
    predicted = predict(model, pictures, randomness["order"])
    pairs = model.reconstruct({"image": pictures}, randomness)
    shown = {key: [part[:, 0] for part in pair] for key, pair in pairs.items()}
    (original, pasted), (masked, everything) = shown["image"], shown["masked"]
    assert torch.equal(original, pictures)
    for row, seen in enumerate(seen_patches(randomness, 4)):
        for patch in range(COUNT):
            true, guess = square(pictures, row, patch), predicted[row, patch].reshape(3, PATCH, PATCH)
            if normalize:
                guess = guess * (true.var() + 1e-6).sqrt() + true.mean()
            guess = guess.clamp(-1, 1)
            torch.testing.assert_close(square(everything, row, patch), guess)
            torch.testing.assert_close(square(pasted, row, patch), true if patch in seen else guess)
            assert torch.equal(square(masked, row, patch), true if patch in seen else torch.zeros_like(true))


def test_dropped_remainder_is_neither_seen_nor_painted():
    model, pictures = autoencoder(size=18, encoder={"drop_remainder": True}), images(size=18)
    randomness = drawn(model)
    bordered = pictures.clone()
    bordered[..., 16:, :], bordered[..., 16:] = 1, -1
    loss, other = (model({"image": x}, randomness)["loss"] for x in (pictures, bordered))
    assert torch.equal(loss, other)
    original, reconstruction = model.reconstruct({"image": pictures}, randomness)["image"]
    assert torch.equal(original[:, 0], pictures[..., :16, :16]) and reconstruction.shape == original.shape


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"encoder": {"stem": "conv"}}, "encoder.stem"),
        ({"mask_ratio": 0.0}, "mask_ratio"),
        ({"mask_ratio": 0.01}, "mask_ratio"),  # of 16 patches none is hidden
        ({"mask_ratio": 0.99}, "mask_ratio"),
        ({"decoder_dim": 6}, "decoder_dim"),
        ({"decoder_heads": 3}, "decoder_heads"),
        ({"decoder_depth": 0}, "decoder_depth"),
    ],
    ids=str,
)
def test_autoencoders_that_cannot_be(options, key):
    with pytest.raises(ValueError, match=key):
        autoencoder(**options)


def test_an_encoder_without_tokens_is_refused():
    with pytest.raises(ValueError, match="encoder.name"):
        build_model(on_resnet(config()))


def test_sizes_of_the_decoder():
    model = autoencoder(decoder_dim=12, decoder_depth=3, decoder_heads=3)
    assert len(model.decoder.blocks) == 3 and model.decoder.to_pixels.weight.shape == (48, 12)
    assert model.decoder.blocks[0].attn.num_heads == 3
