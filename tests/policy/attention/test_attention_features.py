"""Linformer, Nystromformer and Performer against formulas over all pairs in float64."""

import math

import pytest
import torch
from attention_reference import qkv as random_qkv

from policy.attention.linformer import LinformerAttention
from policy.attention.nystromformer import NystromformerAttention, pseudo_inverse
from policy.attention.performer import PerformerAttention
from policy.attention.random_features import FeatureMap, orthogonal_gaussian

HEADS, WIDTH = 2, 4
METHODS = {"favorp": 6, "fourier": 6, "relu": 6, "relu_only": 6, "sigmoid_only": 6, "dpfp": 16, "mlp_fourier": 6}


def linformer(patches=13, prefix=1, **options):
    torch.manual_seed(0)
    geometry = {"num_patches": patches, "prefix_tokens": prefix, "layer": options.pop("layer", 1)}
    return LinformerAttention(dim=HEADS * WIDTH, num_heads=HEADS, **{**geometry, "rank": 5, **options}).double().eval()


def nystromformer(patches=13, prefix=1, **options):
    torch.manual_seed(0)
    return NystromformerAttention(dim=HEADS * WIDTH, num_heads=HEADS, **{"num_landmarks": 5, **options}).double().eval()


def performer(patches=13, prefix=1, **options):
    torch.manual_seed(0)
    geometry = {"num_patches": patches, "prefix_tokens": prefix, "layer": options.pop("layer", 1)}
    options = {"num_features": 6, **options}
    return PerformerAttention(dim=HEADS * WIDTH, num_heads=HEADS, **geometry, **options).double().eval()


BUILDERS = {"linformer": linformer, "nystromformer": nystromformer, "performer": performer}
every_mechanism = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def qkv(tokens=14, **options):
    return random_qkv(tokens, **options)


def softmax_weights(q, k):
    return (q @ k.mT / WIDTH**0.5).softmax(dim=-1)


# Every mechanism -----------------------------------------------------------------------------------------------------


@every_mechanism
def test_padding_is_as_if_the_tokens_were_not_there(build):
    attention = build(conv_kernel=3) if build is nystromformer else build()
    q, k, v = qkv(14)
    mask = torch.zeros(2, 14, dtype=torch.bool)
    mask[:, 9:] = True
    for x in (q, k, v):
        x[:, :, 9:] = torch.nan
    out = attention.attend(q, k, v, key_padding_mask=mask)
    expected = attention.attend(q[:, :, :9], k[:, :, :9], v[:, :, :9])
    torch.testing.assert_close(out[:, :, :9], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_padding_of_all_features(method, causal):
    attention = performer(proj_method=method, num_features=METHODS[method])
    # At 60, the log features of keys are some -1000, far below those of a padded key.
    q, k, v = qkv(14, scale=60.0 if method == "favorp" else 0.3)
    mask = torch.zeros(2, 14, dtype=torch.bool)
    mask[:, :2] = mask[:, 5:9] = True
    rest = [x[:, :, ~mask[0]] for x in (q, k, v)]
    expected = attention.attend(*rest, is_causal=causal)
    k[:, :, mask[0]] = v[:, :, mask[0]] = torch.nan
    out = attention.attend(q, k, v, key_padding_mask=mask, is_causal=causal)
    torch.testing.assert_close(out[:, :, ~mask[0]], expected, rtol=0, atol=1e-12)
    assert torch.isfinite(out).all()


def test_fewer_tokens_than_landmarks_because_of_padding():
    q, k, v = qkv(14)
    mask = torch.zeros(2, 14, dtype=torch.bool)
    mask[:, 3:] = True
    out = nystromformer(iterations=3).attend(q, k, v, key_padding_mask=mask)[:, :, :3]
    weights = softmax_weights(q[:, :, :3], k[:, :, :3])  # each token is a landmark, two more are empty
    expected = weights @ pseudo_inverse(weights, 3) @ weights @ v[:, :, :3]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_more_tokens_than_places():
    for attention in (linformer(), performer(cos_weighting=True)):
        with pytest.raises(ValueError, match="tokens"):
            attention.attend(*qkv(15))


def test_tokens_may_be_missing_where_no_option_needs_their_places():
    assert nystromformer().any_tokens and not nystromformer(conv_kernel=3).any_tokens
    assert performer().any_tokens and not performer(cos_weighting=True).any_tokens


# Linformer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["none", "heads", "kv"])
def test_linformer_equals_the_formula(share):
    attention = linformer(share=share)
    q, k, v = qkv(11)
    expected = torch.empty_like(v)
    for head in range(HEADS):
        of_keys = attention.key_projection[head if share == "none" else 0, :, :11]
        of_values = of_keys if share == "kv" else attention.value_projection[head if share == "none" else 0, :, :11]
        for sample in range(2):
            weights = (q[sample, head] @ (of_keys @ k[sample, head]).T / 2).softmax(dim=-1)
            expected[sample, head] = weights @ (of_values @ v[sample, head])
    torch.testing.assert_close(attention.attend(q, k, v), expected, rtol=0, atol=1e-13)


def test_linformer_of_full_rank_is_softmax_attention():
    q, k, v = qkv()
    out = linformer(rank=20, init="mean").attend(q, k, v)
    torch.testing.assert_close(out, softmax_weights(q, k) @ v, rtol=0, atol=1e-13)


def test_linformer_initial_values():
    means = linformer(rank=4, init="mean").key_projection[0]  # 14 tokens in runs of 4, 3, 4, 3
    assert [row.nonzero().flatten().tolist() for row in means] == [
        [*range(4)],
        [4, 5, 6],
        [*range(7, 11)],
        [11, 12, 13],
    ]
    torch.testing.assert_close(means.sum(dim=1), torch.ones(4, dtype=torch.float64))
    attention = linformer(patches=999, rank=50, share="none")
    for projection in (attention.key_projection, attention.value_projection):
        assert projection.shape == (HEADS, 50, 1000)
        assert projection.std().item() == pytest.approx(50**-0.5, rel=0.02)
    assert not torch.equal(attention.key_projection, attention.value_projection)


def test_linformer_dropout_acts_on_the_weights():
    """With values that all project to ones, a token's output is the sum of its weights."""
    attention = linformer(patches=400, prefix=0, rank=400, init="mean", attn_drop=0.25)
    q, k, v = qkv(400)
    ones = torch.ones_like(v)
    torch.testing.assert_close(attention.attend(q, k, ones), ones)
    torch.manual_seed(0)
    dropped = attention.train().attend(q, k, ones)
    assert (dropped - 1).abs().mean() > 0.01
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)


# Nystromformer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [10, 14, 23])
def test_nystromformer_equals_the_formula(tokens):
    """Landmarks written as means of segments, and the exact pseudo-inverse."""
    q, k, v = qkv(tokens)
    segment = [5 * token // tokens for token in range(tokens)]
    q_mean, k_mean = (
        torch.stack([x[:, :, [t for t in range(tokens) if segment[t] == s]].mean(dim=2) for s in range(5)], dim=2)
        for x in (q, k)
    )
    inverse = torch.linalg.pinv(softmax_weights(q_mean, k_mean))
    expected = softmax_weights(q, k_mean) @ inverse @ softmax_weights(q_mean, k) @ v
    out = nystromformer(iterations=30).attend(q, k, v)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("tokens", [3, 5])
def test_nystromformer_of_few_tokens_is_softmax_attention(tokens):
    q, k, v = qkv(tokens)
    torch.testing.assert_close(nystromformer().attend(q, k, v), softmax_weights(q, k) @ v, rtol=0, atol=1e-13)


def test_nystromformer_error_falls_with_landmarks():
    q, k, v = qkv(60, batch=4)
    exact = softmax_weights(q, k) @ v
    errors = [(nystromformer(num_landmarks=n).attend(q, k, v) - exact).square().mean() for n in (1, 15, 60)]
    assert errors[0] > 1.5 * errors[1] > 0 and errors[2] < 1e-25


def test_pseudo_inverse():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64).softmax(dim=-1)
    matrix[2] *= 100  # another scale must not matter to the others
    torch.testing.assert_close(pseudo_inverse(matrix, 30), torch.linalg.inv(matrix), rtol=1e-9, atol=1e-9)
    one = pseudo_inverse(matrix[:1], 1)
    torch.testing.assert_close(pseudo_inverse(matrix, 1)[:1], one, rtol=0, atol=1e-15)
    start = matrix[0].T / (matrix[0].sum(dim=0).max() * matrix[0].sum(dim=1).max())
    residual = torch.eye(6, dtype=torch.float64) - matrix[0] @ start
    left = torch.eye(6, dtype=torch.float64) - matrix[0] @ one[0]
    # One step of order 3: what is left is R^3 (3 I + R) / 4.
    torch.testing.assert_close(left, residual @ residual @ residual @ (residual + 3 * torch.eye(6).double()) / 4)


def test_nystromformer_convolution():
    attention, q, k, v = nystromformer(conv_kernel=3), *qkv()
    added = attention.attend(q, k, v) - nystromformer().attend(q, k, v)
    expected = torch.zeros_like(v)
    for token in range(14):
        for place in range(3):
            if 0 <= token + place - 1 < 14:
                weight = attention.conv.weight[:, 0, place, 0]
                expected[:, :, token] += weight[:, None] * v[:, :, token + place - 1]
    torch.testing.assert_close(added, expected, rtol=0, atol=1e-13)


# Performer -----------------------------------------------------------------------------------------------------------


def plain_features(attention, x):
    """Features (B, H, T, M) of one mechanism, without any care for their size."""
    features, method = attention.features, attention.features.proj_method
    if method in ("relu_only", "sigmoid_only"):
        return (x.clamp(min=0) if method == "relu_only" else 1 / (1 + (-x).exp())) + 0.1
    if method == "dpfp":
        both = torch.cat([x.clamp(min=0), (-x).clamp(min=0)], dim=-1)
        width = both.shape[-1]
        rolls = features.num_features // width
        return torch.stack(
            [both[..., i] * both[..., (i - shift) % width] for shift in range(1, rolls + 1) for i in range(width)], -1
        )
    scaled = x if method == "mlp_fourier" else x / WIDTH**0.25
    projected = torch.einsum("bhtd,hmd->bhtm", scaled, features.projection)
    norm = scaled.square().sum(dim=-1, keepdim=True) / 2
    if method == "favorp":
        return (projected - norm).exp()
    if method == "fourier":
        return norm.exp() * torch.cat([projected.sin(), projected.cos()], dim=-1) / 6**0.5
    if method == "relu":
        return projected.clamp(min=0) / 6**0.5 + 1e-3
    waves = torch.cat([projected.cos(), projected.sin()], dim=-1) / WIDTH**0.5
    return (waves @ features.layer.weight.T + features.layer.bias).clamp(min=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cos_weighting", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_performer_equals_the_kernel_of_all_pairs(method, cos_weighting, causal):
    tokens = 203  # four chunks of the causal form, the last one part full
    attention = performer(
        patches=209, prefix=1, proj_method=method, num_features=METHODS[method], cos_weighting=cos_weighting
    )
    # Trigonometric estimates of a kernel of far points come out negative, and their sums near zero.
    q, k, v = qkv(tokens, scale=0.3 if method == "fourier" else 1.0)
    kernel = plain_features(attention, q) @ plain_features(attention, k).mT
    if cos_weighting:
        place = torch.arange(tokens, dtype=torch.float64)
        kernel = kernel * torch.cos(math.pi / 2 * (place[:, None] - place) / 210)
    if causal:
        kernel = kernel.tril()
    total = kernel.sum(dim=-1, keepdim=True)
    assert method != "fourier" or (total > 0.02).all()
    out = attention.attend(q, k, v, is_causal=causal)
    torch.testing.assert_close(out, kernel @ v / total.clamp(min=1e-6), rtol=0, atol=1e-9)


def test_favorp_error_falls_as_the_root_of_the_features():
    q, k, v = qkv(30, scale=0.7)
    exact, errors = (q @ k.mT / WIDTH**0.5).exp(), []
    for number in (64, 64 * 64):
        attention = performer(num_features=number)
        estimate = plain_features(attention, q) @ plain_features(attention, k).mT / number
        errors.append((estimate / exact - 1).square().mean().sqrt().item())
    assert errors[1] < 0.1 and 4 < errors[0] / errors[1] < 16
    error = attention.attend(q, k, v) - softmax_weights(q, k) @ v
    assert error.abs().mean() < 0.03


@pytest.mark.parametrize("causal", [False, True])
def test_favorp_of_large_inputs(causal):
    """Log features differ by thousands here; the reference sums them in the logarithm."""
    attention = performer(patches=200)
    q, k, v = qkv(150, scale=40.0)
    log_q, log_k = (
        torch.einsum("bhtd,hmd->bhtm", x / WIDTH**0.25, attention.features.projection)
        - (x / WIDTH**0.25).square().sum(dim=-1, keepdim=True) / 2
        for x in (q, k)
    )
    log = torch.logsumexp(log_q[:, :, :, None] + log_k[:, :, None], dim=-1)
    if causal:
        log = log.masked_fill(torch.ones(150, 150, dtype=torch.bool).triu(1), -torch.inf)
    expected = log.softmax(dim=-1) @ v
    torch.testing.assert_close(attention.attend(q, k, v, is_causal=causal), expected, rtol=0, atol=1e-8)
    single = attention.float().attend(q.float(), k.float(), v.float(), is_causal=causal)
    # float32 rounds log features of 1e4 to 1e-3.
    assert (single - expected).abs().mean() < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_causal_results_do_not_know_what_comes(method):
    attention = performer(patches=200, proj_method=method, num_features=METHODS[method], cos_weighting=True).float()
    q, k, v = (x.float() for x in qkv(140))
    out = attention.attend(q, k, v, is_causal=True)
    later = [torch.cat([x[:, :, :97], 50 * x[:, :, 97:]], dim=2) for x in (q, k, v)]
    assert torch.equal(attention.attend(*later, is_causal=True)[:, :, :97], out[:, :, :97])
    part = attention.attend(q[:, :, :97], k[:, :, :97], v[:, :, :97], is_causal=True)
    torch.testing.assert_close(part, out[:, :, :97], rtol=0, atol=1e-4)


def test_causal_gradients_and_padding():
    attention = performer(patches=70, num_features=4)
    q, k, v = (x.requires_grad_() for x in qkv(70, batch=1))
    assert torch.autograd.gradcheck(lambda *x: attention.attend(*x, is_causal=True), (q, k, v), fast_mode=True)
    mask = torch.zeros(1, 70, dtype=torch.bool)
    mask[:, :3] = mask[:, 20:40] = True
    out = attention.attend(q, k, v, key_padding_mask=mask, is_causal=True)
    rest = [x[:, :, ~mask[0]] for x in (q, k, v)]
    torch.testing.assert_close(out[:, :, ~mask[0]], attention.attend(*rest, is_causal=True), rtol=0, atol=1e-12)
    assert (out[:, :, :3] == 0).all()


def test_orthogonal_vectors_are_gaussian():
    generator = torch.Generator().manual_seed(0)
    drawn = orthogonal_gaussian(2000, 6, 4, generator=generator, dtype=torch.float64)
    gram = drawn[:, :4] @ drawn[:, :4].mT
    assert (gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))).abs().max() < 1e-12
    assert (drawn[:, 4:] @ drawn[:, :4].mT).abs().max() > 0.5  # another block
    for row in range(6):  # each row is normal: mean 0, covariance I, fourth moment of |w|^2 = chi^2 of 4
        torch.testing.assert_close(drawn[:, row].mean(dim=0), torch.zeros(4).double(), rtol=0, atol=0.1)
        torch.testing.assert_close(drawn[:, row].T.cov(), torch.eye(4).double(), rtol=0, atol=0.12)
        assert drawn[:, row].square().sum(dim=-1).var().item() == pytest.approx(8, rel=0.2)


@pytest.mark.parametrize("method", ["favorp", "fourier", "relu"])
def test_sample_schemes(method):
    q, k, v = qkv(scale=0.3)
    for scheme in ("resample", "fixed", "learnable"):
        attention = performer(proj_method=method, sample_scheme=scheme)
        evaluated = attention.attend(q, k, v)
        attention.train()
        torch.manual_seed(1)
        first, second = attention.attend(q, k, v), attention.attend(q, k, v)
        torch.manual_seed(1)
        assert torch.equal(attention.attend(q, k, v), first)
        assert torch.equal(first, second) == torch.equal(first, evaluated) == (scheme != "resample")
        assert torch.equal(attention.eval().attend(q, k, v), evaluated)
        assert "features.projection" in attention.state_dict()
        assert ("features.projection" in dict(attention.named_parameters())) == (scheme == "learnable")
        attention.features.resample(torch.Generator().manual_seed(5))
        drawn = attention.attend(q, k, v)
        attention.features.resample(torch.Generator().manual_seed(5))
        assert torch.equal(attention.attend(q, k, v), drawn) and not torch.equal(drawn, evaluated)
    attention.attend(q, k, v).square().sum().backward()
    assert attention.features.projection.grad.abs().max() > 0


def test_only_random_features_are_drawn_again():
    options = {"num_features": 8, "sample_scheme": "fixed", "seed": 0, "layer": 0}
    with pytest.raises(ValueError, match="resample"):
        FeatureMap(HEADS, WIDTH, proj_method="dpfp", **options).resample(torch.Generator())
