"""Local, BigBird and hybrid attention against brute force in float64, and the windows that they are cut into."""

import math

import pytest
import torch
from attention_reference import qkv as random_qkv
from attention_reference import softmax_attention, window_pairs, with_prefix

from policy.attention.bigbird import BigBirdAttention, draw_outside
from policy.attention.hybrid import HybridAttention, linear_attention
from policy.attention.local import LocalAttention
from policy.attention.softmax import SoftmaxAttention
from policy.attention.windows import RelativePositionBias, Windows, make_windows, masked_softmax

HEADS, WIDTH = 3, 4
CLASSES = {"local": LocalAttention, "bigbird": BigBirdAttention, "hybrid": HybridAttention}
NEEDS = {"local": ("grid",), "bigbird": ("layer",), "hybrid": ("grid",)}


def build(name, grid, prefix=1, layer=0, **options):
    torch.manual_seed(0)
    geometry = {key: value for key, value in {"grid": grid, "layer": layer}.items() if key in NEEDS[name]}
    common = {"dim": HEADS * WIDTH, "num_heads": HEADS, "num_patches": math.prod(grid), "prefix_tokens": prefix}
    return CLASSES[name](**common, **geometry, **options).double().eval()


def qkv(tokens):
    return random_qkv(tokens, heads=HEADS)


GEOMETRIES = [  # grid, window, attn_2d: dividing, not dividing, larger than the grid, one token, a sequence
    ((4, 4), 2, True),
    ((4, 4), 4, False),
    ((5, 7), 3, True),
    ((5, 7), 4, False),
    ((3, 5), 9, True),
    ((3, 3), 1, True),
    ((1, 13), 4, True),
    ((6, 2), 5, True),
]

# Windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("grid", "window", "attn_2d"), GEOMETRIES)
def test_windows_hold_the_keys_of_their_queries(grid, window, attn_2d, overlap, dilation):
    """Read off with tokens that are their own number, 1.. so that 0 is no token."""
    windows = make_windows(grid, window, overlap=overlap, attn_2d=attn_2d, dilation=dilation)
    n = math.prod(grid)
    number = torch.arange(1, n + 1)[None, None, :, None]
    queries, keys, real = windows.queries(number)[0, 0], windows.keys(number)[0, 0], windows.real()
    assert torch.equal(windows.merge(windows.queries(number)), number)
    assert (real is None) == windows.complete
    found = torch.zeros(n + 1, n + 1, dtype=torch.bool)
    for w in range(len(queries)):
        if real is not None:
            assert torch.equal(real[0, 0, w, 0], keys[w, :, 0] > 0)
        kept = keys[w][keys[w] > 0]
        assert len(kept.unique()) == len(kept)
        found[queries[w], kept] = True
    reach = max(1, window // 2) if overlap else 0
    assert torch.equal(found[1:, 1:], window_pairs(grid, window, reach, attn_2d, dilation))


def test_windows_repeat_the_prefix_and_know_the_padding():
    windows = make_windows((1, 5), 2, overlap=True)
    x = torch.arange(7.0)[None, None, :, None]
    assert windows.keys(x, prefix=2)[0, 0, :, :, 0].tolist() == [
        [0, 1, 0, 2, 3, 4],
        [0, 1, 3, 4, 5, 6],
        [0, 1, 5, 6, 0, 0],
    ]
    padding = torch.tensor([[False, True, True, False, False, False, False], [False] * 7])
    real = windows.real(padding, prefix=2)
    assert real.shape == (2, 1, 3, 1, 6)
    assert real[0, 0, :, 0].int().tolist() == [[1, 0, 0, 0, 1, 1], [1, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0]]
    assert torch.equal(real[1], windows.real(prefix=2)[0])


def test_whole_windows_copy_no_key_twice():
    """A window as large as the grid, or larger, has no padding and no neighbours."""
    assert make_windows((5, 7), 9, overlap=True, attn_2d=True) == Windows((5, 7), (5, 7))
    assert make_windows((5, 7), 9, overlap=True, attn_2d=True, dilation=2) == Windows((5, 7), (3, 4), (0, 0), (2, 2))
    assert make_windows((5, 7), 6, overlap=True, attn_2d=True) == Windows((5, 7), (5, 6), (0, 3))
    assert make_windows((5, 7), 2, attn_2d=True, dilation=2).counts == (2, 2)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("grid", "window", "attn_2d"), [((6, 6), 2, True), ((5, 7), 3, True), ((1, 9), 4, False)])
def test_relative_position_bias_is_one_number_an_offset(grid, window, attn_2d, overlap):
    """Same offset, same number; another offset or head, another number; prefix keys have none."""
    windows = make_windows(grid, window, overlap=overlap, attn_2d=attn_2d)
    torch.manual_seed(0)
    bias = RelativePositionBias(2, windows)
    scores = bias(prefix=2).detach()
    assert (scores[..., :2] == 0).all() and torch.equal(scores[..., 2:], bias().detach())
    columns = grid[1]
    number = torch.arange(math.prod(grid))[None, None, :, None]
    queries, keys, real = windows.queries(number)[0, 0, :, :, 0], windows.keys(number)[0, 0, :, :, 0], windows.real()
    seen = {}
    for w in range(len(queries)):
        for a, i in enumerate(queries[w].tolist()):
            for b, j in enumerate(keys[w].tolist()):
                inside = real is None or real[0, 0, w, 0, b]
                if inside and (windows.queries(torch.ones_like(number))[0, 0, w, a, 0] == 1):
                    offset = (i // columns - j // columns, i % columns - j % columns)
                    seen.setdefault(offset, set()).add(scores[0, 0, a, 2 + b].item())
    assert all(len(values) == 1 for values in seen.values())
    assert len(set().union(*seen.values())) == len(seen)
    spans = [2 * (size + reach) - 1 for size, reach in zip(windows.window, windows.extension, strict=True)]
    assert bias.table.shape == (2, math.prod(spans)) and bias.table.std().item() == pytest.approx(0.02, rel=0.35)


def test_masked_softmax():
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], requires_grad=True)
    weights = masked_softmax(scores, torch.tensor([[True, False, True], [False] * 3]))
    expected = torch.tensor([1.0, math.exp(2)]) / (1 + math.exp(2))
    torch.testing.assert_close(weights, torch.stack([torch.tensor([expected[0], 0, expected[1]]), torch.zeros(3)]))
    weights.square().sum().backward()
    assert torch.isfinite(scores.grad).all() and (scores.grad[1] == 0).all()
    half = torch.tensor([[10.0, 10.03, 9.7]]).bfloat16()
    assert torch.equal(masked_softmax(half), half.float().softmax(-1).bfloat16())


# Local -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("grid", "window", "attn_2d"), GEOMETRIES)
def test_local_equals_brute_force(grid, window, attn_2d, overlap, prefix, padded):
    attention = build("local", grid, prefix, window_size=window, attn_2d=attn_2d, overlap=overlap)
    q, k, v = qkv(prefix + math.prod(grid))
    reach = max(1, window // 2) if overlap else 0
    mask = with_prefix(window_pairs(grid, window, reach, attn_2d)[None], prefix)
    padding = padding_of(q) if padded else None
    expected = softmax_attention(q, k, v, mask if padding is None else mask & ~padding[:, None, None])
    torch.testing.assert_close(attention.attend(q, k, v, key_padding_mask=padding), expected, rtol=0, atol=1e-12)


def padding_of(q):
    """Sample 0: the last tokens and one in between; sample 1: none."""
    padding = torch.zeros(2, q.shape[2], dtype=torch.bool)
    padding[0, -3:] = padding[0, q.shape[2] // 2] = True
    return padding


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("grid", "attn_2d"), [((5, 4), True), ((1, 11), False)])
def test_local_bias_equals_brute_force(grid, attn_2d, padded):
    attention = build("local", grid, 1, window_size=3, attn_2d=attn_2d, overlap=True, relative_position_bias=True)
    torch.nn.init.normal_(attention.bias.table)
    q, k, v = qkv(1 + math.prod(grid))
    rows, columns = (5, 4) if attn_2d else (1, 11)
    bias = torch.zeros(HEADS, *[1 + rows * columns] * 2, dtype=torch.float64)
    reach = 3  # of a key in a window of 3 that is one longer on each side
    for i in range(rows * columns):
        for j in range(rows * columns):
            down, right = i // columns - j // columns, i % columns - j % columns
            if max(abs(down), abs(right)) <= reach:
                place = (down + reach) * (2 * reach + 1) + right + reach if attn_2d else right + reach
                bias[:, 1 + i, 1 + j] = attention.bias.table.detach()[:, place]
    mask = with_prefix(window_pairs(grid, 3, 1, attn_2d)[None], 1)
    padding = padding_of(q) if padded else None
    expected = softmax_attention(q, k, v, mask if padding is None else mask & ~padding[:, None, None], bias)
    torch.testing.assert_close(attention.attend(q, k, v, key_padding_mask=padding), expected, rtol=0, atol=1e-12)


# BigBird ---------------------------------------------------------------------------------------------------------


def bigbird_pairs(attention, n, radius):
    """Pairs (H, n, n) of the local patches, key by key."""
    pairs = torch.zeros(HEADS, n, n, dtype=torch.bool)
    for head in range(HEADS):
        for i in range(n):
            for j in range(n):
                pairs[head, i, j] = abs(i - j) <= radius or j in attention.random_keys[head, i].tolist()
    return pairs


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("n", "prefix", "options"),
    [
        (30, 1, {}),
        (30, 0, {"window_radius": 0, "random_keys": 3}),
        (31, 2, {"window_radius": 5, "random_keys": 0}),
        (33, 1, {"window_radius": 1, "random_keys": 2, "global_tokens": 3}),
        (9, 0, {"window_radius": 3, "random_keys": 5, "global_tokens": 1}),
        (3, 1, {"global_tokens": 3}),
    ],
)
def test_bigbird_equals_brute_force(n, prefix, options, padded):
    attention = build("bigbird", (1, n), prefix, **options)
    q, k, v = qkv(prefix + n)
    everywhere = prefix + options.get("global_tokens", 0)
    pairs = bigbird_pairs(attention, prefix + n - everywhere, options.get("window_radius", 4))
    mask = with_prefix(pairs, everywhere)
    padding = padding_of(q) if padded else None
    expected = softmax_attention(q, k, v, mask if padding is None else mask & ~padding[:, None, None])
    torch.testing.assert_close(attention.attend(q, k, v, key_padding_mask=padding), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "radius", "count"), [(40, 4, 3), (12, 2, 8), (5, 0, 4), (5, 9, 2), (1, 0, 1)])
def test_random_keys_are_distinct_and_outside_the_window(n, radius, count):
    table = draw_outside(2, n, radius, count, torch.Generator().manual_seed(0))
    assert table.shape == (2, n, count)
    for head in table:
        for i, row in enumerate(head.tolist()):
            outside = {j for j in range(n) if abs(i - j) > radius}
            drawn = [j for j in row if j >= 0]
            assert set(drawn) <= outside and len(set(drawn)) == len(drawn) == min(count, len(outside))


def test_random_keys_are_uniform():
    """Token 3 of 8, radius 1: all 10 pairs of the 5 others equally often in 20,000 draws."""
    table = draw_outside(20000, 8, 1, 2, torch.Generator().manual_seed(0))[:, 3].sort(dim=-1).values
    counts = (table[:, 0] * 8 + table[:, 1]).bincount()
    counts = counts[counts > 0]
    assert len(counts) == 10
    assert (counts - 2000).square().sum() / 2000 < 27.9  # chi-square of 9 degrees of freedom, one in a thousand


def test_bigbird_pattern_depends_on_seed_layer_and_head():
    first = build("bigbird", (8, 8), random_keys=2).random_keys
    assert torch.equal(build("bigbird", (8, 8), random_keys=2).random_keys, first)
    assert not torch.equal(build("bigbird", (8, 8), random_keys=2, seed=1).random_keys, first)
    assert not torch.equal(build("bigbird", (8, 8), layer=1, random_keys=2).random_keys, first)
    assert not torch.equal(first[0], first[1])
    assert "random_keys" in build("bigbird", (8, 8)).state_dict()
    state = torch.get_rng_state()
    draw_outside(2, 9, 1, 2, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state), "the global generator was touched"


# Hybrid ----------------------------------------------------------------------------------------------------------


def elu_plus_one(x):
    return x + 1 if x > 0 else math.exp(x)


def linear_reference(q, k, v, real):
    """Kernel weights of one head, number by number; q, k, v (T, D), real (T,)."""
    out = torch.zeros_like(v)
    for i in range(len(q)):
        pairs = [zip(q[i].tolist(), key.tolist(), strict=True) for key in k]
        weights = [sum(elu_plus_one(a) * elu_plus_one(b) for a, b in pair) for pair in pairs]
        weights = torch.tensor(weights, dtype=torch.float64) * real
        out[i] = weights / weights.sum() @ v
    return out


def sparse_mask(grid, prefix, window, dilations, attn_2d):
    groups = torch.arange(HEADS).tensor_split(len(dilations))
    pairs = [
        window_pairs(grid, window, 0, attn_2d, d) for d, heads in zip(dilations, groups, strict=True) for _ in heads
    ]
    return with_prefix(torch.stack(pairs), prefix)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("grid", "prefix", "window", "dilations", "attn_2d"),
    [
        ((6, 6), 1, 3, (1, 2), True),
        ((5, 7), 0, 2, (1, 2, 3), True),
        ((1, 19), 2, 3, (2, 1), True),
        ((4, 5), 1, 4, (3,), False),
    ],
)
def test_hybrid_branches_equal_brute_force(grid, prefix, window, dilations, attn_2d, padded):
    options = {"window_size": window, "dilations": dilations, "attn_2d": attn_2d}
    q, k, v = qkv(prefix + math.prod(grid))
    padding = padding_of(q) if padded else torch.zeros(2, q.shape[2], dtype=torch.bool)
    mask = sparse_mask(grid, prefix, window, dilations, attn_2d) & ~padding[:, None, None]
    sparse = softmax_attention(q, k, v, mask)
    linear = torch.stack(
        [
            torch.stack([linear_reference(q[b, h], k[b, h], v[b, h], ~padding[b]) for h in range(HEADS)])
            for b in range(2)
        ]
    )
    given = padding if padded else None
    for gate, expected in ((1e4, sparse), (-1e4, linear), (0.0, (sparse + linear) / 2)):
        out = build("hybrid", grid, prefix, gate_init=gate, **options).attend(q, k, v, key_padding_mask=given)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    attention = build("hybrid", grid, prefix, **options)
    attention.gate.data = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    gate = 1 / (1 + torch.exp(-attention.gate.detach()))[:, None, None]
    out = attention.attend(q, k, v, key_padding_mask=given)
    torch.testing.assert_close(out, gate * sparse + (1 - gate) * linear, rtol=0, atol=1e-12)


def test_linear_features_survive_extreme_scores():
    """elu(x) + 1 as written would be 0 below about -17 in float32, and e^x infinite above 88."""
    q = torch.tensor([-30.0, 100.0]).expand(1, 1, 3, 2).clone().requires_grad_()
    k = torch.tensor([[-30.0, -25.0], [-30.0, -20.0], [-20.0, -30.0]])[None, None].requires_grad_()
    v = torch.eye(3)[None, None]
    weights = linear_attention(q, k, v)[0, 0]
    exact = linear_attention(q.double(), k.double(), v.double())[0, 0]
    torch.testing.assert_close(weights.double(), exact, rtol=1e-5, atol=0)
    weights.square().sum().backward()
    assert torch.isfinite(q.grad).all() and torch.isfinite(k.grad).all()
    at_zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)  # slope 1 from both sides
    ones = torch.ones(1, 1, 2, 1, dtype=torch.float64)
    keys = torch.tensor([0.0, 1.0], dtype=torch.float64)[None, None, :, None].requires_grad_()
    linear_attention(at_zero, keys, torch.tensor([[[[0.0], [1.0]]]], dtype=torch.float64) * ones).sum().backward()
    torch.testing.assert_close(keys.grad.flatten(), torch.tensor([-2 / 9, 1 / 9], dtype=torch.float64))


# All of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("local", {"window_size": 15}),
        ("local", {"window_size": 5, "attn_2d": True}),
        ("local", {"window_size": 100, "overlap": True}),
        ("bigbird", {"window_radius": 14, "random_keys": 0}),
        ("bigbird", {"window_radius": 100, "random_keys": 2, "global_tokens": 2}),
        ("bigbird", {"window_radius": 0, "random_keys": 14}),
        ("bigbird", {"global_tokens": 15}),
        ("hybrid", {"window_size": 5, "dilations": (1,), "gate_init": 1e4}),
    ],
)
def test_all_pairs_are_softmax_attention(name, options):
    attention = build(name, (3, 5), **options)
    softmax = SoftmaxAttention(dim=HEADS * WIDTH, num_heads=HEADS).double()
    softmax.load_state_dict({key: attention.state_dict()[key] for key in softmax.state_dict()})
    x = torch.randn(2, 16, HEADS * WIDTH, dtype=torch.float64)
    torch.testing.assert_close(attention(x), softmax(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(attention.attention_map(x), softmax.attention_map(x), rtol=0, atol=1e-12)


def test_wrong_numbers_of_tokens():
    x = torch.randn(1, 18, HEADS * WIDTH, dtype=torch.float64)
    wrong = [(name, {}, 18) for name in CLASSES] + [("local", {"attn_2d": True}, 16), ("hybrid", {}, 16)]
    for name, options, tokens in wrong:
        with pytest.raises(ValueError, match=f"tokens: got {tokens}"):
            build(name, (4, 4), **options)(x[:, :tokens])
    with pytest.raises(ValueError, match="tokens: got 11 patches"):
        make_windows((4, 4), 2, attn_2d=True).resized(11)
