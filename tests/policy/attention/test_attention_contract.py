"""What every registered attention promises, whatever it is: a new mechanism is tested here without a line more."""

import inspect
import warnings

import pytest
import timm
import tiny
import torch
from attentions import CONFIGS, DIM, HEADS, OPTIONS, build, configured, every_attention, every_name, padding, seeded

from policy.attention import ATTENTIONS, build_attention, list_attentions
from policy.attention.base import MultiHeadAttention

# Known of these alone: all tokens are alike; places matter; places matter and tokens are summarised in segments.
ALIKE = ("performer", "ra", "softmax")
PLACED = ("bigbird", "causal_eva", "eva", "fibottention", "hybrid", "linformer", "local", "scatterbrain")
SEGMENTED = ("lara", "nystromformer")
UNNORMALISED = ("linformer", "nystromformer")  # whose weights need not sum to one


def weighed(module, weights, x):
    """What ``module`` must return for x (B, T, C) if it weighs its values with ``weights`` (B, H, T, T)."""
    return module.proj((weights @ module.split(x)[2]).transpose(1, 2).flatten(2))


@every_attention
@pytest.mark.parametrize(
    ("grid", "prefix"), [((4, 4), 0), ((4, 4), 1), ((3, 5), 1), ((1, 7), 0), ((7, 7), 5), ((1, 1), 1)]
)
def test_shapes_batches_and_gradients(name, options, grid, prefix):
    """Shape kept for odd grids and any prefix, samples independent, a gradient for the input and every parameter."""
    attention = build(name, options, grid=grid, prefix=prefix)
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
@pytest.mark.filterwarnings("ignore:Fibottention is evaluated densely")
def test_gradients(name, options, training):
    """Of q, k, v and of the parameters of the mechanism itself, against differences in float64, with padding, too."""
    attention = build(name, options, grid=(2, 4)).double().train(training)
    own = [p for key, p in attention.named_parameters() if not key.startswith(("qkv.", "proj."))]
    inputs = [x.requires_grad_() for x in torch.randn(3, 1, HEADS, 9, DIM // HEADS, dtype=torch.float64).unbind(0)]
    for mask in (None, padding([4, 8], tokens=9)):

        def attend(q, k, v, *_, mask=mask):
            return seeded(attention.attend, q, k, v, key_padding_mask=mask)

        assert torch.autograd.gradcheck(attend, (*inputs, *own), fast_mode=True)


@every_attention
@pytest.mark.parametrize("training", [False, True])
def test_randomness_comes_from_the_seed_alone(name, options, training):
    """The same weights for the same seed; in evaluation nothing is random, in training torch's generator decides."""
    attention, twin = (build(name, options, seed=3).train(training) for _ in range(2))
    x = torch.randn(2, 17, DIM)
    out = seeded(attention, x)
    assert torch.equal(seeded(twin, x), out) and torch.equal(seeded(attention, x), out)
    if not training:
        state = torch.get_rng_state()
        assert torch.equal(attention(x), out) and torch.equal(torch.get_rng_state(), state)


@every_name
def test_state_dict_round_trip(name):
    attention, other = build(name, seed=0), build(name, seed=1)
    x = torch.randn(2, 17, DIM)
    assert not torch.allclose(other(x), attention(x), atol=1e-4)
    other.load_state_dict(attention.state_dict())
    assert torch.equal(other(x), attention(x))


@every_name
def test_parameters_are_named_as_those_of_timm(name):
    """So that pretrained ViT weights load; a mechanism may have further parameters of its own."""
    own = {key: value.shape for key, value in build(name).state_dict().items()}
    theirs = timm.layers.Attention(DIM, num_heads=HEADS, qkv_bias=True).state_dict()
    assert {key: own.get(key) for key in theirs} == {key: value.shape for key, value in theirs.items()}
    assert "mask" not in own


@pytest.mark.parametrize("name", [*ALIKE, *PLACED, *SEGMENTED])
def test_order_of_the_tokens(name):
    """Permuted patches give permuted outputs where all tokens are alike, and only there."""
    attention = build(name)
    x, order = 3 * torch.randn(1, 17, DIM), torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(16)])
    same = torch.allclose(attention(x[:, order]), attention(x)[:, order], atol=1e-5)
    assert same == (name in ALIKE)


@every_attention
def test_autocast_and_fp32(name, options):
    """bfloat16 stays close to float32; with ``fp32`` attention itself is in float32, its result in autocast's dtype."""
    attention, precise = build(name, options), build(name, {**options, "fp32": True})
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


@every_name
def test_compiles_in_one_piece(name):
    """Forward with padding and backward."""
    attention, mask = build(name), padding([], [3, 16])
    x = torch.randn(2, 17, DIM, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    (expected, found) = (module(x, key_padding_mask=mask) for module in (attention, compiled))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out.square().sum(), x) for out in (expected, found)]
    torch.testing.assert_close(*gradients)


@every_attention
def test_padding(name, options):
    """Padded tokens change nothing and get no gradient; attention to padding alone is zero."""
    attention = build(name, options)
    x, mask = torch.randn(3, 17, DIM), padding([0, 3, 8, 9, 16], range(17), [])
    changed = torch.where(mask[..., None], torch.randn_like(x), x)
    x.requires_grad_()
    out = attention(x, key_padding_mask=mask)
    assert out.isfinite().all() and (attention.attend(*attention.split(x), key_padding_mask=mask)[1] == 0).all()
    torch.testing.assert_close(attention(changed, key_padding_mask=mask)[~mask], out[~mask], rtol=0, atol=1e-6)
    torch.testing.assert_close(out[2], attention(x)[2], rtol=1e-5, atol=1e-5)
    assert (out[0] - attention(x)[0])[~mask[0]].abs().max() > 1e-4
    (gradient,) = torch.autograd.grad(out[~mask].square().sum(), x)
    assert gradient.isfinite().all() and (gradient[mask] == 0).all() and (gradient[~mask] != 0).any()


@every_attention
@pytest.mark.parametrize("autocast", [False, True])
def test_a_row_of_padding_alone(name, options, autocast):
    """Outputs and gradients are finite, and those of the other rows what they are beside a row of tokens."""
    attention = build(name, options, grid=(1, 16))
    x, weight = torch.randn(2, 3, 17, DIM).unbind()

    def evaluate(last, **switches):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = attention(inputs, key_padding_mask=padding([3, 15, 16], [], last), **switches)
        # Gradients of 10^4 too: divided by the smallest number they are inf.
        gradients = torch.autograd.grad((1e4 * weight * out).sum(), [inputs, *attention.parameters()])
        return out.detach(), *gradients

    for switches in [{}] + [{"is_causal": True}] * attention.causal:
        found, beside = (evaluate(last, **switches) for last in (range(17), []))
        assert all(tensor.isfinite().all() for tensor in found)
        assert all(torch.equal(got[:2], want[:2]) for got, want in zip(found[:2], beside[:2], strict=True))


@every_attention
@pytest.mark.parametrize("padded", [False, True])
def test_exports_with_any_number_of_rows(name, options, padded):
    attention, rows = build(name, options), {0: torch.export.Dim("rows", min=1)}
    inputs = {"x": torch.randn(2, 17, DIM), "key_padding_mask": padding([3, 16], [])}
    inputs = inputs if padded else {"x": inputs["x"]}
    program = torch.export.export(attention, (), inputs, dynamic_shapes=dict.fromkeys(inputs, rows)).module()
    for count in (1, 3):
        inputs = {key: values[:1].repeat_interleave(count, dim=0) for key, values in inputs.items()}
        torch.testing.assert_close(program(**inputs), attention(**inputs), rtol=1e-4, atol=1e-5)


@every_attention
def test_modules_without_memory(name, options):
    """On the meta device names and shapes are known, as where a checkpoint is checked before it is read."""
    with torch.device("meta"):
        outline = build(name, options)
    shapes = {key: tensor.shape for key, tensor in outline.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in build(name, options).state_dict().items()}
    assert outline.qkv.weight.is_meta


@every_attention
def test_fewer_tokens_are_the_others_padded_or_refused(name, options):
    """But for mechanisms that summarise segments, which padding moves."""
    attention, x = build(name, options, grid=(1, 16)), torch.randn(2, 17, DIM)
    for tokens in (12, 4, 1):
        try:
            out = attention(x[:, :tokens])
        except ValueError as error:
            assert str(error).startswith("tokens: got")
            continue
        assert out.isfinite().all()
        if name in (*ALIKE, *PLACED):
            full = attention(x, key_padding_mask=padding(range(tokens, 17), range(tokens, 17)))
            torch.testing.assert_close(out, full[:, :tokens], rtol=0, atol=1e-5)


@every_attention
def test_map_is_what_the_values_are_weighed_with(name, options):
    attention = build(name, options)
    x = torch.randn(2, 17, DIM)
    if not attention.has_map:
        with pytest.raises(ValueError, match="map"):
            attention.attention_map(x)
        return
    weights = attention.attention_map(x)
    assert weights.shape == (2, HEADS, 17, 17)
    torch.testing.assert_close(weighed(attention, weights, x), attention(x), rtol=1e-4, atol=1e-5)
    mask = padding(range(12, 17), [])
    weights, out = attention.attention_map(x, key_padding_mask=mask), attention(x, key_padding_mask=mask)
    assert (weights[0, :, :12, 12:] == 0).all()
    torch.testing.assert_close(weighed(attention, weights, x)[~mask], out[~mask], rtol=1e-4, atol=1e-5)
    if name in (*ALIKE, *PLACED, *SEGMENTED) and name not in UNNORMALISED:
        sums = weights.sum(dim=-1).transpose(1, 2)[~mask]
        torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("name", [name for name, attention in ATTENTIONS.items() if attention.causal])
def test_causal_form_does_not_know_what_comes(name):
    attention = build(name, grid=(1, 16), prefix=0)
    x, other = torch.randn(1, 16, DIM), torch.randn(1, 16, DIM)
    mixed = torch.cat([x[:, :9], other[:, 9:]], dim=1)
    full = attention(x, is_causal=True)
    assert attention.always_causal == torch.equal(attention(x), full)
    torch.testing.assert_close(attention(mixed, is_causal=True)[:, :9], full[:, :9])
    assert not torch.allclose(attention(mixed, is_causal=True)[:, 9:], full[:, 9:], atol=1e-3)
    torch.testing.assert_close(attention(x[:, :9], is_causal=True), full[:, :9], rtol=1e-4, atol=1e-5)  # a shorter one


@every_name
def test_what_a_mechanism_cannot_do_is_refused(name):
    attention, x = build(name), torch.randn(1, 17, DIM)
    if not attention.causal:
        with pytest.raises(ValueError, match="is_causal"):
            attention(x, is_causal=True)
    if type(attention).forward is MultiHeadAttention.forward:
        with pytest.raises(ValueError, match="attn_mask"):
            attention(x, attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="key_padding_mask"):
        attention(x, key_padding_mask=torch.zeros(1, 16, dtype=torch.bool))
    if type(attention).attend_kept is MultiHeadAttention.attend_kept:  # a mechanism that knows places has tests of it
        kept = torch.tensor([[0, 3, 7, 11]])
        some = torch.cat([x[:, :1], x[:, 1 + kept[0]]], dim=1)
        if attention.any_tokens:
            torch.testing.assert_close(attention(some, kept=kept), attention(some))
        else:
            with pytest.raises(ValueError, match="kept"):
                attention(some, kept=kept)


@every_name
def test_attention_dropout_acts_in_training_only_or_is_refused(name):
    x = torch.randn(1, 17, DIM)
    options = OPTIONS.get(name, [{}])[0]
    if not ATTENTIONS[name].drops:
        with pytest.raises(ValueError, match="attn_drop"):
            build(name, {**options, "attn_drop": 0.5})
        return
    attention, plain = build(name, {**options, "attn_drop": 0.5}), build(name, options)
    torch.testing.assert_close(attention(x), plain(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Fibottention drops weights in its dense form
        assert (seeded(attention.train(), x) - seeded(plain.train(), x)).abs().max() > 1e-3
    if attention.has_map:
        torch.testing.assert_close(seeded(attention.attention_map, x), seeded(plain.attention_map, x))


@every_attention
def test_nothing_of_all_pairs_is_made(name, options):
    """Forward and backward at N = 784, one head of width 4, also causal and with padding."""
    options = {**configured(name), **options, "dim": 4, "num_heads": 1}
    options |= {"causal_eva": {"window_size": 16, "chunk_size": 16}, "hybrid": {"dilations": (2,)}}.get(name, {})
    geometry = {"num_patches": 784, "grid": (28, 28), "layer": 0, "depth": 1, "prefix_tokens": 1}
    attention = build_attention(name, **geometry, **options)
    calls = [{}, {"key_padding_mask": padding(range(700, 785), tokens=785)}] + [{"is_causal": True}] * attention.causal
    if name in ("fibottention", "softmax"):
        calls = calls[:1]  # padding of the former is dense; causal masks are a matter of torch's kernels
    for switches in calls:
        with tiny.LargestTensor() as largest:
            attention(torch.randn(1, 785, 4, requires_grad=True), **switches).sum().backward()
        assert largest.numel >= 785 * 4
        assert (largest.numel >= 784**2) == attention.quadratic and (attention.quadratic or largest.numel < 784**2 / 2)


@every_name
def test_constructors_refuse_what_they_do_not_know(name):
    """What a mechanism knows of itself is no option."""
    for options, key in (({"whole": True}, "whole"), ({"num_heads": 5}, "num_heads")):
        with pytest.raises(ValueError, match=key):
            build(name, options)


def test_every_mechanism_is_chosen_by_a_configuration():
    """Without options it is the mechanism's defaults, and every key in it is an option."""
    assert set(list_attentions()) <= {path.stem for path in CONFIGS.glob("*.yaml")}
    for name in list_attentions():
        assert inspect.isclass(ATTENTIONS[name]) and issubclass(ATTENTIONS[name], MultiHeadAttention)
