"""The U-Net against the published forward pass written out here (arXiv 2303.04137)."""

import math

import pytest
import torch
import torch.nn.functional as F

from policy.denoiser.unet1d import ConditionalUNet1D, SinusoidalEmbedding


def unet(**options):
    torch.manual_seed(0)
    defaults = {"action_dim": 3, "condition_dim": 7, "widths": [8, 16, 24], "kernel_size": 3, "groups": 4}
    return ConditionalUNet1D(**{**defaults, "step_dim": 16, **options})


def unet_inputs(batch=4, horizon=8):
    generator = torch.Generator().manual_seed(0)
    actions = torch.randn(batch, horizon, 3, generator=generator)
    return actions, torch.arange(batch) * 7, torch.randn(batch, 7, generator=generator)


def reference_unet(model, actions, steps, condition, *, groups):
    """The published forward pass from the weights alone."""
    w = model.state_dict()

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def conv_block(x, name):
        x = F.conv1d(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"], padding=w[f"{name}.0.weight"].shape[-1] // 2)
        grouped = x.unflatten(1, (groups, -1))
        mean = grouped.mean(dim=(2, 3), keepdim=True)
        spread = (grouped.var(dim=(2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = ((grouped - mean) / spread).flatten(1, 2)
        return mish(x * w[f"{name}.1.weight"][:, None] + w[f"{name}.1.bias"][:, None])

    def mish(x):
        return x * torch.tanh(torch.log1p(torch.exp(x)))

    def residual(x, name):
        film = linear(mish(features), f"{name}.film.1")
        channels = film.shape[1] // 2
        out = conv_block(x, f"{name}.first") * film[:, :channels, None] + film[:, channels:, None]
        out = conv_block(out, f"{name}.second")
        if f"{name}.skip.weight" in w:
            x = F.conv1d(x, w[f"{name}.skip.weight"], w[f"{name}.skip.bias"])
        return out + x

    half = model.step_embedding[0].frequencies.numel()
    angles = steps[:, None].double() * 10000.0 ** (-torch.arange(half).double() / (half - 1))
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    embedding = linear(mish(linear(embedding, "step_embedding.1")), "step_embedding.3")
    features = torch.cat([embedding, condition], dim=1)

    x, skips, levels = actions.transpose(1, 2), [], len(model.down)
    for level in range(levels):
        x = residual(residual(x, f"down.{level}.0"), f"down.{level}.1")
        skips.append(x)
        if level < levels - 1:
            x = F.conv1d(x, w[f"down.{level}.2.weight"], w[f"down.{level}.2.bias"], stride=2, padding=1)
    x = residual(residual(x, "middle.0"), "middle.1")
    for level in range(levels - 1):
        x = torch.cat([x, skips[-1 - level]], dim=1)
        x = residual(residual(x, f"up.{level}.0"), f"up.{level}.1")
        x = F.conv_transpose1d(x, w[f"up.{level}.2.weight"], w[f"up.{level}.2.bias"], stride=2, padding=1)
    x = conv_block(x, "out.0")
    return F.conv1d(x, w["out.1.weight"], w["out.1.bias"]).transpose(1, 2)


@pytest.mark.parametrize(("widths", "kernel_size"), [([8, 16, 24], 3), ([8, 12], 5), ([16], 1)])
def test_unet_equals_the_published_forward_pass(widths, kernel_size):
    model = unet(widths=widths, kernel_size=kernel_size).double()
    actions, steps, condition = unet_inputs()
    out = model(actions.double(), steps, condition.double())
    expected = reference_unet(model, actions.double(), steps, condition.double(), groups=4)
    assert out.shape == (4, 8, 3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)  # the module's step frequencies are float32


def test_unet_of_the_paper_has_the_published_size():
    """Widths 512/1024/2048, kernel 5, 8 groups, step embedding 128; two observed steps of 768 + 2 features."""
    with torch.device("meta"):
        model = ConditionalUNet1D(action_dim=2, condition_dim=1540, widths=[512, 1024, 2048])
    assert sum(p.numel() for p in model.parameters()) == 291_882_114
    assert model(*(torch.zeros(s, device="meta") for s in ((1, 16, 2), (1,), (1, 1540)))).shape == (1, 16, 2)


def test_both_parts_of_film_add_up_to_the_linear_map_of_both():
    network = unet(widths=[8, 16]).double()
    steps = torch.tensor([[0, 3], [19, 7], [5, 5]])
    condition = torch.randn(3, 7, dtype=torch.float64)
    together = network.films(steps, condition)
    separate = zip(network.step_films(steps.flatten()), network.observation_films(condition), strict=True)
    assert len(together) == len(network.blocks()) == 2 * 2 + 2 + 2
    for block, film, (ours, theirs) in zip(network.blocks(), together, separate, strict=True):
        for row in range(6):
            features = torch.cat([network.step_embedding(steps.flatten()[row : row + 1])[0], condition[row // 2]])
            expected = F.linear(F.mish(features), block.film[1].weight, block.film[1].bias)
            torch.testing.assert_close(film[row], expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(ours[row] + theirs[row // 2], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dim", [4, 64, 128])
def test_sinusoidal_embedding(dim):
    steps = torch.tensor([0, 1, 17, 99])
    out = SinusoidalEmbedding(dim)(steps)
    assert out.shape == (4, dim)
    for row, step in enumerate(steps.tolist()):
        for i in range(dim // 2):
            angle = step * math.exp(-math.log(10000) * i / (dim // 2 - 1))
            assert out[row, i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert out[row, dim // 2 + i].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_unet_errors():
    for options in ({"kernel_size": 4}, {"widths": [8, 18]}):
        with pytest.raises(ValueError, match="kernel_size, widths"):
            unet(**options)
