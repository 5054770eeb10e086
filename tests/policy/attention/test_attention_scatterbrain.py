"""ScatterBrain against its weights written pair by pair in float64."""

import pytest
import torch
from attention_reference import qkv as random_qkv
from attention_reference import softmax_attention, window_pairs, with_prefix

from policy.attention.performer import PerformerAttention
from policy.attention.scatterbrain import ScatterbrainAttention

HEADS, WIDTH, GRID = 2, 4, (5, 7)


def build(prefix=1, grid=GRID, **options):
    torch.manual_seed(0)
    geometry = {"num_patches": grid[0] * grid[1], "grid": grid, "prefix_tokens": prefix, "layer": 1}
    options = {"num_features": 6, **options}
    return ScatterbrainAttention(dim=HEADS * WIDTH, num_heads=HEADS, **{**geometry, **options}).double().eval()


def qkv(tokens=36, **options):
    return random_qkv(tokens, **options)


def reference_weights(attention, q, k, *, prefix, window, attn_2d, overlap, real=None):
    """Weights (B, H, T, T) pair by pair; real (B, T) says which keys there are."""
    close = with_prefix(window_pairs(GRID, window, max(1, window // 2) if overlap else 0, attn_2d)[None], prefix)
    weights = torch.where(close, (q @ k.mT / WIDTH**0.5).exp(), kernel_estimate(attention, q, k))
    if real is not None:
        weights = weights * real[:, None, None]
    return weights / weights.sum(dim=-1, keepdim=True)


def kernel_estimate(attention, q, k):
    """exp(q k / sqrt(D)) as FAVOR+ estimates it."""
    projection = attention.features.projection
    q, k = (
        (torch.einsum("bhtd,hmd->bhtm", x, projection) - x.square().sum(-1, keepdim=True) / 2).exp()
        for x in (q / WIDTH**0.25, k / WIDTH**0.25)
    )
    return q @ k.mT / projection.shape[1]


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("attn_2d", "window"), [(False, 4), (False, 5), (True, 2), (True, 3)])
def test_weights_equal_those_pair_by_pair(attn_2d, window, overlap, prefix):
    attention = build(prefix, window_size=window, attn_2d=attn_2d, overlap=overlap)
    q, k, v = qkv(prefix + 35)
    options = {"prefix": prefix, "window": window, "attn_2d": attn_2d, "overlap": overlap}
    expected = reference_weights(attention, q, k, **options) @ v
    torch.testing.assert_close(attention.attend(q, k, v), expected, rtol=0, atol=1e-12)
    real = torch.rand(2, prefix + 35, generator=torch.Generator().manual_seed(1)) > 0.4
    expected = reference_weights(attention, q, k, real=real, **options) @ v
    for x in (k, v):
        x[~real[:, None].expand(-1, HEADS, -1)] = 1e3
    torch.testing.assert_close(attention.attend(q, k, v, key_padding_mask=~real), expected, rtol=0, atol=1e-11)


def test_prefix_alone():
    """All patches are padding: they say nothing, neither exactly nor by features."""
    q, k, v = qkv(37)
    mask = torch.arange(37).expand(2, -1) >= 2
    k[:, :, 2:] = v[:, :, 2:] = torch.nan
    out = build(2, window_size=4).attend(q, k, v, key_padding_mask=mask)[:, :, 2:]
    expected = (q[:, :, 2:] @ k[:, :, :2].mT / WIDTH**0.5).softmax(dim=-1) @ v[:, :, :2]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_padding_sets_no_maximum():
    """Scores and log features near -2000: one of a padded key, zero, would drown them."""
    attention = build(window_size=4)
    q, k, v = qkv(36, scale=0.1)
    q[..., 0], k[..., 0] = q[..., 0] + 60, k[..., 0] - 60
    mask = torch.arange(36).expand(2, -1) >= 20
    expected = attention.attend(q[:, :, :20], k[:, :, :20], v[:, :, :20])
    assert expected.abs().amax(dim=-1).min() > 1e-4
    out = attention.attend(q, k, v, key_padding_mask=mask)[:, :, :20]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("attn_2d", [False, True])
def test_one_window_over_all_is_softmax_attention(attn_2d):
    attention = build(window_size=35, attn_2d=attn_2d)
    q, k, v = qkv()
    expected = softmax_attention(q, k, v)
    torch.testing.assert_close(attention.attend(q, k, v), expected, rtol=0, atol=1e-12)


def test_error_is_below_that_of_random_features_alone():
    q, k, v = qkv(35)
    exact = softmax_attention(q, k, v)
    errors = [(build(0, window_size=w).attend(q, k, v) - exact).square().mean().item() for w in (18, 30)]
    alone = PerformerAttention(
        dim=HEADS * WIDTH, num_heads=HEADS, num_patches=35, prefix_tokens=0, layer=1, num_features=6
    )
    errors.insert(0, (alone.double().eval().attend(q, k, v) - exact).square().mean().item())
    assert errors == sorted(errors, reverse=True)


def test_relative_position_bias_is_added_to_exact_scores():
    attention = build(window_size=35, relative_position_bias=True)
    q, k, v = qkv()
    assert (attention.attend(q, k, v) - build(window_size=35).attend(q, k, v)).abs().max() > 1e-4
    scores = q @ k.mT / WIDTH**0.5
    torch.nn.init.normal_(attention.bias.table, generator=torch.Generator().manual_seed(3))
    scores[:, :, 1:] += attention.bias(1)[:, 0]
    torch.testing.assert_close(attention.attend(q, k, v), scores.softmax(dim=-1) @ v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_float32_and_large_inputs(scale):
    attention = build(window_size=4)
    q, k, v = qkv(scale=scale)
    out = attention.float().attend(q.float(), k.float(), v.float())
    assert torch.isfinite(out).all()
    if scale == 1:
        torch.testing.assert_close(out.double(), attention.double().attend(q, k, v), rtol=0, atol=1e-4)


def test_learnable_projections_and_biases_learn():
    attention = build(grid=(2, 4), window_size=3, relative_position_bias=True, sample_scheme="learnable")
    attention.attend(*qkv(9, batch=1)).square().sum().backward()
    assert attention.features.projection.grad.abs().max() > 0 and attention.bias.table.grad.abs().max() > 0


def test_sample_schemes():
    q, k, v = qkv()
    for scheme in ("resample", "fixed", "learnable"):
        attention = build(sample_scheme=scheme)
        evaluated = attention.attend(q, k, v)
        assert torch.equal(attention.train().attend(q, k, v), evaluated) == (scheme != "resample")
