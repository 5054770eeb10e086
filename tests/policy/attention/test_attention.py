"""Fibottention against brute force written from its description (arXiv 2406.19391), and the registry."""

import math
import random

import numpy as np
import pytest
import timm
import torch
from fibottention_reference import GEOMETRY, attended, each_rule, exact

from policy.attention import build_attention, fibottention, fibottention_mask, shuffle_heads, wythoff_offsets
from policy.attention.fibottention import diagonal_table

TOKENS, HEADS = (49, 100, 196, 784), (3, 6, 12)
VARIANTS = [(variant, modified) for variant in ("paper", "robot") for modified in (False, True)]
each_variant = pytest.mark.parametrize(("variant", "modified"), VARIANTS)
pytestmark = pytest.mark.filterwarnings("ignore:Fibottention is evaluated densely")  # float64 is
each_prefix = pytest.mark.parametrize("prefix", [0, 1, 5])


def golden_floor(i):
    """floor(i * golden ratio) in exact integers."""
    return (i + math.isqrt(5 * i * i)) // 2


def reference_offsets(num_tokens, num_heads, variant, modified):
    heads = []
    for i in range(1, num_heads + 1):
        a = golden_floor(golden_floor(i))
        b = a + golden_floor(i)  # phi^2 = phi + 1
        if variant == "robot":
            window = num_tokens
        else:
            window = 5 + (int((num_tokens // 3 - 5) / (num_heads - 1) * (i - 1)) if num_heads > 1 else 0)
        terms = [2 * a - b, b - a] if modified and variant == "paper" else [a, b]
        while len(terms) < 60:
            terms.append(terms[-1] + terms[-2])
        kept = {terms[0]} | {term for term in terms if term <= window}
        if modified and variant == "robot" and i > 1:
            kept |= {2 * a - b, b - a}
        heads.append(tuple(sorted(kept)))
    return tuple(heads)


def qkv(heads, tokens, width, *, batch=1, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, heads, tokens, width, generator=generator, dtype=dtype).unbind(0)


# Offsets ---------------------------------------------------------------------------------------------------------


@each_variant
@pytest.mark.parametrize("heads", [1, *HEADS, 16])
@pytest.mark.parametrize("tokens", [1, 4, 16, 81, 1568, *TOKENS])
def test_offsets_equal_the_description(tokens, heads, variant, modified):
    offsets = wythoff_offsets(tokens, heads, variant=variant, modified=modified)
    assert offsets == reference_offsets(tokens, heads, variant, modified)
    assert all(type(o) is int for head in offsets for o in head)


def test_offsets_worked_by_hand():
    """Rows (1, 2), (4, 7), (6, 10), (9, 15) of the Wythoff array; windows 5, 25, 45, 65 of N = 196 and 4 heads."""
    plain = ((1, 2, 3, 5), (4, 7, 11, 18), (6, 10, 16, 26, 42), (9, 15, 24, 39, 63))
    assert wythoff_offsets(196, 4, modified=False) == plain
    assert wythoff_offsets(196, 4) == (
        (0, 1, 2, 3, 5),
        (1, 3, 4, 7, 11, 18),
        (2, 4, 6, 10, 16, 26, 42),
        (3, 6, 9, 15, 24, 39, 63),
    )
    assert wythoff_offsets(16, 2, variant="robot") == ((1, 2, 3, 5, 8, 13), (1, 3, 4, 7, 11))
    assert wythoff_offsets(9, 3, modified=False) == ((1, 2, 3, 5), (4,), (6,))  # the first term stays, 6 > window 3


def test_plain_heads_share_no_offset_and_cover_all_distances():
    """Every positive integer stands in the Wythoff array exactly once."""
    offsets = wythoff_offsets(100, 60, modified=False, variant="robot")
    together = [o for head in offsets for o in head if o <= 100]
    assert sorted(together) == list(range(1, 101))


@pytest.mark.parametrize(
    ("tokens", "variant", "plain", "modified"),
    [(196, "paper", 1.99, 3.83), (100, "robot", 6.2, 9.6), (81, "robot", 6.8, 10.8)],
)
def test_densities_of_the_published_encoders(tokens, variant, plain, modified):
    """Percent of the patch pairs, measured independently (notes/features.md, section 1.1)."""
    for expected, flag in ((plain, False), (modified, True)):
        offsets = wythoff_offsets(tokens, 12, variant=variant, modified=flag)
        density = 100 * fibottention_mask(offsets, tokens, prefix_tokens=0).float().mean().item()
        assert density == pytest.approx(expected, abs=0.05 if variant == "robot" else 0.005)


def test_offsets_errors():
    with pytest.raises(ValueError, match="variant"):
        wythoff_offsets(100, 12, variant="image")
    for sizes in ((0, 12), (100, 0)):
        with pytest.raises(ValueError, match="num_tokens, num_heads"):
            wythoff_offsets(*sizes)


@pytest.mark.parametrize("layer", range(12))
def test_shuffle_is_the_published_one(layer):
    offsets = wythoff_offsets(100, 12)
    expected = list(offsets)
    random.Random(layer).shuffle(expected)
    random.seed(123)
    state = random.getstate()
    assert shuffle_heads(offsets, layer) == tuple(expected)
    assert random.getstate() == state, "the global generator was touched"
    random.seed(layer)  # what the authors do
    again = list(offsets)
    random.shuffle(again)
    assert shuffle_heads(list(offsets), layer) == tuple(again)


# Mask ------------------------------------------------------------------------------------------------------------


@each_prefix
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_mask_equals_brute_force(tokens, heads, prefix):
    variants = VARIANTS if tokens < 784 else [VARIANTS[(heads + prefix) % 4]]
    for variant, modified in variants:
        offsets = wythoff_offsets(tokens, heads, variant=variant, modified=modified)
        mask = fibottention_mask(offsets, tokens, prefix_tokens=prefix)
        assert mask.dtype == torch.bool and torch.equal(mask, attended(offsets, prefix + tokens, prefix))


def test_mask_of_offsets_beyond_the_grid():
    """The published code raises there; an offset of N or more simply joins no pair."""
    mask = fibottention_mask(((0, 9, 50), (9,), (10,)), 10, prefix_tokens=0)
    assert torch.equal(mask, attended(((0, 9, 50), (9,), (10,)), 10, 0))
    assert mask[1].sum() == 2 and mask[2].sum() == 0


def test_diagonal_table_worked_by_hand():
    """Four patches: the offset 7 joins none, -1 and 1 come from one offset, 0 stands once, duplicates go."""
    table = diagonal_table(((0, 1, 1, 7), (3,), ()), 4)
    assert table.tolist() == [[3, -1, 0, 1], [2, -3, 3, 0], [0, 0, 0, 0]] and table.dtype == torch.int32


# Attention outputs: in float64, which is evaluated densely; the kernels have tests of their own ---------------------


@each_rule
@each_prefix
@each_variant
@pytest.mark.parametrize("tokens", [49, 100, 196])
def test_attention_equals_brute_force(tokens, variant, modified, prefix, rule):
    heads = {49: 12, 100: 6, 196: 3}[tokens]
    offsets = wythoff_offsets(tokens, heads, variant=variant, modified=modified)
    q, k, v = qkv(heads, prefix + tokens, 4)
    out = fibottention(q, k, v, offsets, prefix_tokens=prefix, masked_score=rule)
    expected, *_ = exact(q, k, v, v, offsets, prefix=prefix, rule=rule)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@each_prefix
def test_published_rule_has_an_exact_sparse_form(prefix):
    """softmax row = [sum over S of (e^s - 1) v + sum of all v] / [sum over S of (e^s - 1) + P + N]."""
    tokens, heads = 100, 3
    offsets = wythoff_offsets(tokens, heads, variant="robot")
    q, k, v = qkv(heads, prefix + tokens, 8, batch=2)
    out = fibottention(q, k, v, offsets, prefix_tokens=prefix, masked_score="zero")
    size = prefix + tokens
    for head in range(heads):
        everything = v[:, head].sum(dim=1)
        for i in range(size):
            if i < prefix:
                attended = list(range(size))
            else:
                near = {i - prefix + sign * o for o in offsets[head] for sign in (-1, 1)}
                attended = [*range(prefix), *(prefix + j for j in sorted(near) if 0 <= j < tokens)]
            scores = (k[:, head, attended] @ q[:, head, i, :, None])[..., 0] / 8**0.5
            extra = torch.expm1(scores)
            numerator = (extra[..., None] * v[:, head, attended]).sum(dim=1) + everything
            expected = numerator / (extra.sum(dim=1) + size)[:, None]
            torch.testing.assert_close(out[:, head, i], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("tokens", "offsets"), [(49, ((30,), (1,))), (6, ((6, 9), (2,))), (6, ((), (0,)))])
def test_rows_without_an_attended_pair(tokens, offsets):
    """Possible without prefix tokens: mean of v under the published rule, nothing under the usual one."""
    q, k, v = qkv(2, tokens, 4)
    empty = ~attended(offsets, tokens, 0).any(dim=2)
    assert empty[0].any() and not empty.all()
    excluded = fibottention(q, k, v, offsets, prefix_tokens=0, masked_score="exclude")
    assert (excluded[0][empty] == 0).all() and (excluded[0][~empty] != 0).all()
    zero = fibottention(q, k, v, offsets, prefix_tokens=0, masked_score="zero")
    torch.testing.assert_close(zero[0][empty], v.mean(dim=2, keepdim=True).expand_as(v)[0][empty])


def weights_of(offsets, **options):
    """The attention weights (H, M, M): values that are one-hot read them off."""
    size = options.pop("size")
    q, k, _ = qkv(len(offsets), size, size)
    v = torch.eye(size, dtype=q.dtype).expand_as(q)
    return fibottention(q, k, v, offsets, **options)[0]


@each_rule
def test_weights_of_unattended_pairs(rule):
    offsets = ((1,), (0, 2))
    weights = weights_of(offsets, size=9, masked_score=rule)
    unattended = ~attended(offsets, 9, 1)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 9, dtype=weights.dtype))
    if rule == "exclude":
        assert (weights[unattended] == 0).all()
    else:  # all unattended pairs of a row share one weight, exp(0) / sum
        assert (weights > 0).all()
        for row, off in zip(weights.flatten(0, 1), unattended.flatten(0, 1), strict=True):
            if off.any():
                assert row[off].max() == row[off].min()


@each_rule
def test_scale(rule):
    offsets = wythoff_offsets(16, 2, variant="robot")
    q, k, v = qkv(2, 17, 4)
    default = fibottention(q, k, v, offsets, masked_score=rule)
    torch.testing.assert_close(fibottention(q, k, v, offsets, masked_score=rule, scale=0.5), default)
    doubled = fibottention(q, k, v, offsets, masked_score=rule, scale=1.0)
    torch.testing.assert_close(doubled, fibottention(2 * q, k, v, offsets, masked_score=rule))
    assert (doubled - default).abs().max() > 0.01


@each_rule
def test_dropout_acts_on_the_weights(rule):
    offsets = wythoff_offsets(16, 4, variant="robot")
    plain = weights_of(offsets, size=17, masked_score=rule)
    torch.manual_seed(0)
    dropped = weights_of(offsets, size=17, masked_score=rule, dropout_p=0.25)
    gone = dropped == 0
    torch.testing.assert_close(dropped[~gone], plain[~gone] / 0.75)
    lost = gone[plain > 0].double().mean().item()
    assert 0.15 < lost < 0.35  # about 400 to 1156 weights: more than four standard deviations
    torch.manual_seed(1)
    assert not torch.equal(weights_of(offsets, size=17, masked_score=rule, dropout_p=0.25), dropped)


# Modules --------------------------------------------------------------------------------------------------------------


def build(name, **changes):
    torch.manual_seed(0)
    return build_attention(name, **{**GEOMETRY, **changes}).eval()


def test_registry_errors():
    with pytest.raises(ValueError, match="attention: got 'fibotention' .did you mean 'fibottention'.*allowed: .*soft"):
        build_attention("fibotention", **GEOMETRY)
    with pytest.raises(ValueError, match="varient"):
        build_attention("fibottention", **GEOMETRY, varient="paper")
    with pytest.raises(ValueError, match="grid"):
        build_attention("softmax", **{**GEOMETRY, "grid": (4, 5)})


def test_softmax_equals_timm():
    attention, theirs = build("softmax"), timm.layers.Attention(24, num_heads=3, qkv_bias=True)
    theirs.load_state_dict(attention.state_dict())
    x = torch.randn(2, 17, 24)
    torch.testing.assert_close(attention(x), theirs(x))


@each_rule
@each_prefix
def test_module_equals_brute_force(prefix, rule):
    attention = build("fibottention", prefix_tokens=prefix, masked_score=rule, variant="robot", layer=2).double()
    x = torch.randn(1, prefix + 16, 24, dtype=torch.float64)
    projected = x @ attention.qkv.weight.T + attention.qkv.bias
    q, k, v = projected.reshape(1, prefix + 16, 3, 3, 8).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    offsets = list(reference_offsets(16, 3, "robot", True))
    random.Random(2).shuffle(offsets)
    mixed, *_ = exact(q, k, v, v, offsets, prefix=prefix, rule=rule)
    expected = mixed.transpose(1, 2).reshape(1, prefix + 16, 24) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x), expected, rtol=0, atol=1e-13)
    pairs = attended(offsets, 16, 0).double()
    assert attention.density() == pytest.approx(pairs.mean().item())


@each_prefix
def test_information_flows_along_the_mask_only(prefix):
    """Jacobian of the module under "exclude": token i depends on j where some head attends, and on itself."""
    attention = build("fibottention", prefix_tokens=prefix, masked_score="exclude", modified=False).double()
    size = prefix + 16
    x = torch.randn(1, size, 24, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: attention(x)[0].sum(dim=-1), x)[:, 0]  # (M, M, C)
    reach = jacobian.abs().amax(dim=-1) > 0
    mask = attended(attention.offsets, size, prefix)
    assert not mask.any(dim=0).all(), "nothing to see: the heads together attend everywhere"
    # A token's own query matters as soon as it weighs two keys against each other.
    itself = torch.diag((mask.sum(dim=2) > 1).any(dim=0))
    assert torch.equal(reach, mask.any(dim=0) | itself)


def test_layer_chooses_the_shuffle():
    offsets = wythoff_offsets(16, 3)
    for layer in range(6):
        assert build("fibottention", layer=layer).offsets == shuffle_heads(offsets, layer)
        assert build("fibottention", layer=layer, shuffle=False).offsets == offsets


@pytest.mark.parametrize("masked_score", ["zero", "exclude"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_padding_equals_brute_force(prefix, masked_score):
    """Padded keys weigh nothing by either rule, and a row whose pairs are all padded attends to nothing."""
    attention = build("fibottention", prefix_tokens=prefix, masked_score=masked_score, modified=False).double()
    x = torch.randn(3, prefix + 16, 24, dtype=torch.float64)
    padding = torch.zeros(3, prefix + 16, dtype=torch.bool)
    padding[0, [0, 4, 9, 15]] = padding[1] = True
    q, k, v = (part.detach().numpy() for part in attention.split(x))
    out = attention.attend(*attention.split(x), key_padding_mask=padding).detach().numpy()
    mask = attention.mask.numpy()
    for sample, head, row in np.ndindex(3, 3, prefix + 16):
        attended, real = mask[head, row], ~padding[sample].numpy()
        scores = np.where(attended, k[sample, head] @ q[sample, head, row] * 8**-0.5, 0.0)
        weights = np.exp(scores) * real * (attended if masked_score == "exclude" else 1)
        expected = weights @ v[sample, head] / max(weights.sum(), 1e-300)
        np.testing.assert_allclose(out[sample, head, row], expected, rtol=0, atol=1e-12)


def test_module_errors():
    with pytest.raises(ValueError, match="tokens"):
        build("fibottention")(torch.randn(1, 18, 24))
