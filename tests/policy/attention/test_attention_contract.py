"""What every registered attention promises, whatever it is: a new mechanism is tested here without a line more."""

import pytest
import timm
import tiny
import torch
from omegaconf import OmegaConf
from paths import ROOT

from policy.attention import ATTENTIONS, build_attention, list_attentions

CONFIGS = ROOT / "config" / "attention"
SMALL = {  # on few tokens the windows and groups of the configurations would hold everything
    "causal_eva": {"window_size": 4},
    "eva": {"num_landmarks": 4, "window_size": 2},
    "lara": {"num_landmarks": 4},
    "linformer": {"rank": 8},
    "nystromformer": {"num_landmarks": 4, "conv_kernel": None},
    "local": {"window_size": 2},
    "hybrid": {"window_size": 2},
    "scatterbrain": {"window_size": 2},
}
QUADRATIC = ("ra", "softmax")  # by definition; softmax through kernels that keep no N x N
ALIKE = ("performer", "ra", "softmax")  # all tokens alike: permuted tokens give permuted outputs
DIM, HEADS = 24, 3

every_attention = pytest.mark.parametrize("name", list_attentions())
every_causal = pytest.mark.parametrize("name", [name for name in list_attentions() if ATTENTIONS[name].causal])


def build(name, *, grid=(4, 4), prefix=1, seed=0, **changes):
    torch.manual_seed(seed)
    options = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    assert options.pop("name") == name  # the others in the folder are variants
    geometry = {"dim": DIM, "num_heads": HEADS, "layer": 1, "depth": 3, "prefix_tokens": prefix}
    options = {**geometry, "num_patches": grid[0] * grid[1], "grid": grid, **options, **SMALL.get(name, {}), **changes}
    return build_attention(name, **options).eval()


def weighed(module, weights, x):
    """What ``module`` must return for x (B, T, C) if it weighs its values with ``weights`` (B, H, T, T)."""
    return module.proj((weights @ module.split(x)[2]).transpose(1, 2).flatten(2))


@every_attention
@pytest.mark.parametrize(
    ("grid", "prefix"), [((4, 4), 0), ((4, 4), 1), ((3, 5), 1), ((1, 7), 0), ((7, 7), 5), ((1, 1), 1)]
)
def test_shapes_batches_and_gradients(name, grid, prefix):
    """Shape kept for odd grids and any prefix, samples independent, a gradient for the input and every parameter."""
    attention = build(name, grid=grid, prefix=prefix)
    x = torch.randn(2, prefix + grid[0] * grid[1], DIM, requires_grad=True)
    out = attention(x)
    assert out.shape == x.shape and torch.isfinite(out).all()
    other = torch.stack([x[0], torch.randn_like(x[1])])
    torch.testing.assert_close(attention(other)[0], out[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(attention(x[:1])[0], out[0], rtol=0, atol=1e-6)
    out.square().sum().backward()
    for label, tensor in [("x", x), *attention.named_parameters()]:
        assert tensor.grad is not None and tensor.grad.isfinite().all(), label
        assert grid != (4, 4) or tensor.grad.abs().max() > 0, label


@every_attention
@pytest.mark.parametrize("training", [False, True])
def test_randomness_comes_from_the_seed_alone(name, training):
    """The same weights for the same seed; in evaluation nothing is random, in training torch's generator decides."""
    attention, twin = build(name, seed=3).train(training), build(name, seed=3).train(training)
    x = torch.randn(2, 17, DIM)
    outputs = []
    for module in (attention, twin, attention):
        torch.manual_seed(5)
        outputs.append(module(x))
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    if not training:
        assert torch.equal(attention(x), outputs[0])


@every_attention
def test_state_dict_round_trip(name):
    attention, other = build(name, seed=0), build(name, seed=1)
    x = torch.randn(2, 17, DIM)
    assert not torch.allclose(other(x), attention(x), atol=1e-4)
    other.load_state_dict(attention.state_dict())
    assert torch.equal(other(x), attention(x))


@every_attention
def test_parameters_are_named_as_those_of_timm(name):
    """So that pretrained ViT weights load; a mechanism may have further parameters of its own."""
    own = {key: value.shape for key, value in build(name).state_dict().items()}
    theirs = timm.layers.Attention(DIM, num_heads=HEADS, qkv_bias=True).state_dict()
    assert {key: own.get(key) for key in theirs} == {key: value.shape for key, value in theirs.items()}
    assert "mask" not in own


@every_attention
def test_order_of_the_tokens(name):
    """Permuted patches give permuted outputs where all tokens are alike, and only there."""
    attention = build(name)
    x, order = 3 * torch.randn(1, 17, DIM), torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(16)])
    same = torch.allclose(attention(x[:, order]), attention(x)[:, order], atol=1e-5)
    assert same == (name in ALIKE)


@every_attention
def test_autocast_and_fp32(name):
    """bfloat16 stays close to float32; with ``fp32`` attention itself is in float32, its result in autocast's dtype."""
    attention, precise = build(name), build(name, fp32=True)
    x = torch.randn(2, 17, DIM)
    exact, seen = attention(x), []
    inner = precise.attend
    precise.attend = lambda q, k, v, **options: seen.append(q.dtype) or inner(q, k, v, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, high = attention(x), precise(x)
        q, k, v = (part.float() for part in precise.split(x))
        with torch.autocast("cpu", enabled=False):
            out = inner(q, k, v)
        assert torch.equal(high, precise.proj(out.transpose(1, 2).flatten(2).bfloat16()))
    assert low.dtype == high.dtype == torch.bfloat16 and seen == [torch.float32]
    torch.testing.assert_close(low.float(), exact, rtol=0.05, atol=0.03)
    torch.testing.assert_close(high.float(), exact, rtol=0.05, atol=0.03)


@every_attention
def test_compiles_in_one_piece(name):
    attention = build(name)
    x = torch.randn(2, 17, DIM, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(attention(x).square().sum(), x)
    torch.testing.assert_close(compiled(x), attention(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), x), expected)


@every_attention
def test_padding(name):
    """Padded tokens change nothing and get no gradient; a sample of padding alone is finite."""
    attention = build(name)
    x = torch.randn(3, 17, DIM)
    padding = torch.zeros(3, 17, dtype=torch.bool)
    padding[0, [0, 3, 8, 9, 16]] = padding[1] = True
    x.requires_grad_()
    out = attention(x, key_padding_mask=padding)
    assert out.isfinite().all()
    torch.testing.assert_close(out[2], attention(x)[2], rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(out[~padding].square().sum(), x)
    assert gradient.isfinite().all() and (gradient[padding] == 0).all() and (gradient[~padding] != 0).any()


@every_attention
def test_map_is_what_the_values_are_weighed_with(name):
    attention = build(name)
    x = torch.randn(2, 17, DIM)
    weights = attention.attention_map(x)
    assert weights.shape == (2, HEADS, 17, 17)
    torch.testing.assert_close(weighed(attention, weights, x), attention(x), rtol=1e-4, atol=1e-5)
    padding = torch.zeros(2, 17, dtype=torch.bool)
    padding[0, 12:] = True
    weights = attention.attention_map(x, key_padding_mask=padding)
    out = attention(x, key_padding_mask=padding)
    assert (weights[0, :, :12, 12:] == 0).all()
    if name not in ("linformer", "nystromformer"):  # whose weights do not sum to 1
        sums = weights.sum(dim=-1).transpose(1, 2)[~padding]
        torch.testing.assert_close(sums, torch.ones_like(sums))
    torch.testing.assert_close(weighed(attention, weights, x)[~padding], out[~padding], rtol=1e-4, atol=1e-5)


@every_causal
def test_causal_form_does_not_know_what_comes(name):
    attention = build(name, grid=(1, 16), prefix=0)
    x, other = torch.randn(1, 16, DIM), torch.randn(1, 16, DIM)
    mixed = torch.cat([x[:, :9], other[:, 9:]], dim=1)
    full = attention(x, is_causal=True)
    torch.testing.assert_close(attention(mixed, is_causal=True)[:, :9], full[:, :9])
    assert not torch.allclose(attention(mixed, is_causal=True)[:, 9:], full[:, 9:], atol=1e-3)
    torch.testing.assert_close(attention(x[:, :9], is_causal=True), full[:, :9], rtol=1e-4, atol=1e-5)  # a shorter one


@every_attention
def test_what_a_mechanism_cannot_do_is_refused(name):
    attention, x = build(name), torch.randn(1, 17, DIM)
    if not attention.causal:
        with pytest.raises(ValueError, match="is_causal: got True, allowed with .*Attention: False"):
            attention(x, is_causal=True)
    if name != "softmax":
        with pytest.raises(ValueError, match="attn_mask: got one, allowed with .*Attention: none"):
            attention(x, attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"key_padding_mask: got \(1, 16\), allowed: \(1, 17\)"):
        attention(x, key_padding_mask=torch.zeros(1, 16, dtype=torch.bool))
    kept = torch.tensor([[0, 3, 7, 11]])
    some = torch.cat([x[:, :1], x[:, 1 + kept[0]]], dim=1)
    if not attention.any_tokens and name != "fibottention":
        with pytest.raises(ValueError, match="kept: got some of the tokens, allowed with .*Attention: all"):
            attention(some, kept=kept)
    elif name != "fibottention":  # whose kept tokens are joined as among all: tests of its own
        torch.testing.assert_close(attention(some, kept=kept), attention(some))


@every_attention
def test_attention_dropout_acts_in_training_only_or_is_refused(name):
    """A mechanism that never forms weights says so."""
    x = torch.randn(1, 17, DIM)
    if name in ("hybrid", "nystromformer", "performer", "scatterbrain"):
        with pytest.raises(ValueError, match="attn_drop: got 0.5, allowed with .*: 0"):
            build(name, attn_drop=0.5)
        return
    attention, plain = build(name, attn_drop=0.5), build(name)
    torch.testing.assert_close(attention(x), plain(x))
    for module in (attention.train(), plain.train()):
        torch.manual_seed(0)  # of proposals, too
        module.out = module(x)
    assert (attention.out - plain.out).abs().max() > 1e-3


@every_attention
def test_nothing_of_all_pairs_is_made(name):
    """Forward and backward at N = 784 with the options of the configuration, one head of width 4."""
    small = {"causal_eva": {"window_size": 16}, "hybrid": {"dilations": (2,)}}.get(name, {})  # for one head
    options = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml")) | small
    geometry = {"num_patches": 784, "grid": (28, 28), "layer": 0, "depth": 1, "prefix_tokens": 1}
    attention = build_attention(options.pop("name"), dim=4, num_heads=1, **geometry, **options)
    with tiny.LargestTensor() as largest:
        attention(torch.randn(1, 785, 4, requires_grad=True)).sum().backward()
    assert largest.numel >= 785 * 4
    if name == "ra":
        assert largest.numel >= 784**2, "the largest tensor is not seen"
    else:
        assert largest.numel < 784**2 / 2


@every_attention
def test_what_a_mechanism_knows_of_itself_is_no_option(name):
    with pytest.raises(ValueError, match=f"'{name}' options: got whole, allowed: "):
        build(name, whole=True)


@every_attention
def test_head_count_must_divide_the_width(name):
    with pytest.raises(ValueError, match="num_heads: got 5, allowed: a divisor of dim 24"):
        build(name, num_heads=5)


def test_every_mechanism_has_a_configuration():
    assert set(list_attentions()) <= {path.stem for path in CONFIGS.glob("*.yaml")}
