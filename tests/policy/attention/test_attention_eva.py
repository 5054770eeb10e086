"""EVA and its causal form against loops over the equations of arXiv 2302.04542, and T5's relative positions."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention_reference import qkv, softmax_attention

from policy.attention.causal_eva import CausalEVAAttention
from policy.attention.eva import EVAAttention
from policy.attention.t5_bias import T5RelativePositionBias, relative_position_bucket

HEADS, WIDTH = 2, 4


def eva(grid=(4, 4), prefix=0, **options):
    torch.manual_seed(0)
    geometry = {"grid": grid, "num_patches": grid[0] * grid[1], "prefix_tokens": prefix}
    module = EVAAttention(dim=HEADS * WIDTH, num_heads=HEADS, **geometry, **options)
    return module.double().eval()


def causal_eva(tokens=22, **options):
    torch.manual_seed(0)
    module = CausalEVAAttention(
        dim=HEADS * WIDTH, num_heads=HEADS, num_patches=tokens, prefix_tokens=0, **{"window_size": 4, **options}
    )
    return module.double().eval()


def identity_(summary):
    """Projections that change nothing, so that a group of one token is that token."""
    for linear in (summary.key, summary.query):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)


# The equations, query by query --------------------------------------------------------------------------------------


def project(layers, x):
    """Linear and, where there is one, layer norm by their formulas."""
    if layers is None:
        return None
    linear, norm = layers if isinstance(layers, torch.nn.Sequential) else (layers, None)
    y = linear.weight.detach().numpy() @ x + linear.bias.detach().numpy()
    if norm is None:
        return y
    y = (y - y.mean()) / np.sqrt(y.var() + norm.eps)
    return y * norm.weight.detach().numpy() + norm.bias.detach().numpy()


def reference(q, k, v, module, exact, groups, *, share, noise=None, bias=None):
    """One sample and head in float64, q, k, v (T, D); exact: keys of each query; groups: the tokens that each holds."""
    q, k, v = (x.numpy() for x in (q, k, v))
    scale, tokens = 1 / math.sqrt(q.shape[1]), []
    for number, members in enumerate(groups):
        if not members:
            tokens.append(None)
            continue
        key, query = project(module.summary.key, k[members].mean(0)), project(module.summary.query, q[members].mean(0))
        sample = np.zeros_like(key) if query is None else share * (query + key)
        sample = sample if noise is None else sample + noise[number].numpy()
        density = np.exp([scale * (sample @ k[m] - k[m] @ k[m] / 2) for m in members])
        tokens.append((key, density @ v[members] / density.sum()))
    out = np.zeros_like(v)
    for i, mine in enumerate(exact):
        pairs = [(math.exp(scale * q[i] @ k[j] + (0 if bias is None else bias[i, j])), v[j]) for j in mine]
        for members, token in zip(groups, tokens, strict=True):
            if token and module.visible(i, members, mine):
                pairs.append((math.exp(scale * q[i] @ token[0]), token[1]))
        if pairs:
            out[i] = sum(weight * value for weight, value in pairs) / sum(weight for weight, _ in pairs)
    return out


def sets_of_eva(grid, window, reach, block, prefix, gone):
    """Exact keys of queries, tokens of groups, which group a query sees; window, reach, block: (rows, columns)."""
    there = [t for t in range(prefix + grid[0] * grid[1]) if t not in gone]
    place = {prefix + r * grid[1] + c: (r, c) for r in range(grid[0]) for c in range(grid[1])}
    exact = [there] * prefix
    for at in place.values():
        starts = [a // w * w for a, w in zip(at, window, strict=True)]
        near = [
            key
            for key, other in place.items()
            if all(s - e <= o < s + w + e for s, e, o, w in zip(starts, reach, other, window, strict=True))
        ]
        exact.append([t for t in there if t < prefix or t in near])
    blocks = sorted({(r // block[0], c // block[1]) for r, c in place.values()})
    groups = [
        [t for t in there if t >= prefix and (place[t][0] // block[0], place[t][1] // block[1]) == b] for b in blocks
    ]
    return exact, groups, lambda _, members, mine: not set(members) <= set(mine)


EVA_CASES = {
    "sequence": ((1, 13), 0, {"window_size": 3, "num_landmarks": 5}, (1, 3), (0, 0), (1, 3)),
    "grid as sequence, overlap": ((3, 5), 1, {"overlap": True, "num_landmarks": 3}, (1, 4), (0, 2), (1, 5)),
    "image": ((4, 4), 2, {"window_size": 2, "attn_2d": True, "num_landmarks": 4}, (2, 2), (0, 0), (2, 2)),
    "image, nothing divides": (
        (5, 7),
        1,
        {"window_size": 3, "attn_2d": True, "overlap": True, "num_landmarks": 9},
        (3, 3),
        (1, 1),
        (2, 3),
    ),
}


@pytest.mark.parametrize("gone", [(), (0, 1, 4, 5)], ids=["all", "padding"])
@pytest.mark.parametrize("proj", ["default", "no_ln", "none"])
@pytest.mark.parametrize("case", EVA_CASES)
def test_eva_equals_the_equations(case, proj, gone):
    grid, prefix, options, window, reach, block = EVA_CASES[case]
    module = eva(grid, prefix, adaptive_proj=proj, **options)
    tokens = prefix + grid[0] * grid[1]
    q, k, v = qkv(tokens)
    mask = torch.zeros(2, tokens, dtype=torch.bool)
    mask[1, list(gone)] = True
    out = module.attend(q, k, v, key_padding_mask=mask if gone else None)
    for sample in range(2):
        cut = grid if "attn_2d" in options else (1, grid[0] * grid[1])
        exact, groups, module.visible = sets_of_eva(cut, window, reach, block, prefix, gone if sample else ())
        for head in range(HEADS):
            expected = reference(*(x[sample, head] for x in (q, k, v)), module, exact, groups, share=0.5)
            np.testing.assert_allclose(out[sample, head].detach().numpy(), expected, rtol=0, atol=1e-12)


def sets_of_causal(tokens, window, reach, chunk, gone):
    there = [t for t in range(tokens) if t not in gone]
    starts = [t // window * window - reach for t in range(tokens)]
    exact = [[j for j in there if start <= j <= t] for t, start in enumerate(starts)]
    groups = [[j for j in there if j // chunk == c] for c in range(-(-tokens // chunk))]
    return exact, groups, lambda t, members, _: members[0] // chunk * chunk + chunk <= starts[t]


@pytest.mark.parametrize("gone", [(), (0, 1, 4, 5, 6, 7, 9)], ids=["all", "padding"])
@pytest.mark.parametrize(("overlap", "chunk", "proj"), [(False, 4, "qk"), (True, 2, "no_ln"), (True, 1, "qk")])
def test_causal_eva_equals_the_equations(overlap, chunk, proj, gone):
    module = causal_eva(overlap=overlap, chunk_size=chunk, adaptive_proj=proj)
    q, k, v = qkv(22)
    mask = torch.zeros(2, 22, dtype=torch.bool)
    mask[1, list(gone)] = True
    out = module.attend(q, k, v, key_padding_mask=mask if gone else None)
    for sample in range(2):
        exact, groups, module.visible = sets_of_causal(22, 4, 4 * overlap, chunk, gone if sample else ())
        for head in range(HEADS):
            expected = reference(*(x[sample, head] for x in (q, k, v)), module, exact, groups, share=1.0)
            np.testing.assert_allclose(out[sample, head].detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_samples_are_drawn_in_training_only(causal):
    """The noise is torch's own, one normal vector for each group; in evaluation none is drawn."""
    module = causal_eva(chunk_size=2) if causal else eva((1, 22), num_landmarks=11)
    q, k, v = qkv(22, batch=1)
    torch.manual_seed(5)
    noise = torch.randn(1, HEADS, 11, WIDTH, dtype=torch.float64)
    torch.manual_seed(5)
    out = module.train().attend(q, k, v)
    if causal:
        exact, groups, module.visible = sets_of_causal(22, 4, 0, 2, ())
    else:
        exact, groups, module.visible = sets_of_eva((1, 22), (1, 4), (0, 0), (1, 2), 0, ())
    for head in range(HEADS):
        expected = reference(
            *(x[0, head] for x in (q, k, v)), module, exact, groups, share=1 if causal else 0.5, noise=noise[0, head]
        )
        np.testing.assert_allclose(out[0, head].detach().numpy(), expected, rtol=0, atol=1e-12)
    assert (module.attend(q, k, v) - out).abs().max() > 1e-4
    module.eval()
    state = torch.get_rng_state()
    torch.testing.assert_close(module.attend(q, k, v), module.attend(q, k, v), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


# Limits in which EVA is softmax attention -----------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("options", [{"window_size": 15}, {"window_size": 5, "attn_2d": True, "overlap": True}])
def test_a_window_as_large_as_the_grid_is_softmax(options, prefix):
    q, k, v = qkv(prefix + 15)
    mask = torch.zeros(2, prefix + 15, dtype=torch.bool)
    mask[0, [0, 3, 16 if prefix else 14]] = True
    module = eva((3, 5), prefix, num_landmarks=4, **options)
    out = module.attend(q, k, v, key_padding_mask=mask)
    torch.testing.assert_close(out, softmax_attention(q, k, v, ~mask[:, None, None]), rtol=0, atol=1e-12)
    whole = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    torch.testing.assert_close(module.attend(q, k, v), softmax_attention(q, k, v, whole), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_groups_of_one_token_projected_to_itself_are_softmax(causal):
    """Each key then counts once, in the window or as its own group."""
    q, k, v = qkv(20)
    allowed = torch.ones(20, 20, dtype=torch.bool)
    if causal:
        modules = [causal_eva(20, chunk_size=1, adaptive_proj="no_ln", overlap=overlap) for overlap in (False, True)]
        allowed = allowed.tril()
    else:
        flat = eva((4, 5), num_landmarks=20, adaptive_proj="no_ln", overlap=True)
        modules = [flat, eva((4, 5), num_landmarks=25, adaptive_proj="no_ln", window_size=3, attn_2d=True)]
    for module in modules:
        identity_(module.summary)
        torch.testing.assert_close(module.attend(q, k, v), softmax_attention(q, k, v, allowed), rtol=0, atol=1e-12)


def test_causal_window_of_the_whole_sequence_is_causal_softmax():
    q, k, v = qkv(22)
    out = causal_eva(window_size=24, chunk_size=3).attend(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True), rtol=0, atol=1e-12)


# Causality and decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_the_future_changes_nothing(overlap):
    module = causal_eva(overlap=overlap, chunk_size=2, use_t5_rpe=True)
    x = torch.randn(1, 22, HEADS * WIDTH, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x)[0].sum(dim=-1), x)[:, 0].abs().amax(dim=-1)
    assert (jacobian.triu(1) == 0).all()
    assert (jacobian[-1] > 0).all(), "the whole past must count"


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap": True, "use_t5_rpe": True, "chunk_size": 2},
        {"num_chunks": 8, "window_size": 6, "use_t5_rpe": True},
        {"window_size": 1, "overlap": True},
    ],
)
def test_steps_equal_the_full_evaluation(options, dtype, atol):
    module = causal_eva(**options).to(dtype)
    x = torch.randn(3, 22, HEADS * WIDTH, dtype=dtype)
    state, outs = None, []
    for token in x.unbind(1):
        out, state = module.step(token, state)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, dim=1), module(x), rtol=0, atol=atol)
    assert state.keys.shape[2] < module.window_size + module.reach
    assert state.keys.shape[2] + state.chunk_keys.shape[2] * module.chunk_size == 22


def test_a_state_may_be_continued_twice():
    module = causal_eva()
    x = torch.randn(3, 2, HEADS * WIDTH, dtype=torch.float64)
    _, state = module.step(x[0])
    parts = [getattr(state, field.name) for field in dataclasses.fields(state)]
    before = [part.clone() for part in parts]
    module.step(x[1], state)
    assert all(map(torch.equal, before, parts))
    again = module.step(x[2], state)[0]
    torch.testing.assert_close(again, module(torch.stack([x[0], x[2]], dim=1))[:, 1], rtol=0, atol=1e-12)


def test_number_of_chunks_and_groups():
    assert causal_eva().chunk_size == 4 and causal_eva(num_chunks=11).chunk_size == causal_eva(chunk_size=2).chunk_size
    assert eva((10, 9), attn_2d=True).groups.window == (2, 2) and eva((2, 3), attn_2d=True).groups.window == (1, 1)
    assert eva((10, 9), num_landmarks=7).groups.window == (1, 13)


# Relative positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("buckets", "longest"), [(16, 16), (32, 128), (17, 40), (64, 256)])
def test_buckets_equal_the_formula(buckets, longest):
    """exact + floor(log(n / exact) / log(longest / exact) * (buckets - exact)); 1e-9 forgives the logarithms."""

    def one_way(n, buckets):
        exact = buckets // 2
        if n < exact:
            return n
        grown = math.log(n / exact) / math.log(longest / exact) * (buckets - exact)
        return min(exact + math.floor(grown + 1e-9), buckets - 1)

    for n in range(-300, 301):
        both = one_way(abs(n), buckets // 2) + (buckets // 2 if n > 0 else 0)
        rule = {"num_buckets": buckets, "max_distance": longest}
        assert relative_position_bucket(n, causal=False, **rule) == both
        assert relative_position_bucket(n, causal=True, **rule) == one_way(max(-n, 0), buckets)


def test_buckets_of_the_paper():
    """32 buckets up to 128: one distance each up to 7, and the last from 91 on."""
    rule = {"causal": False, "num_buckets": 32, "max_distance": 128}
    assert [relative_position_bucket(n, **rule) for n in (0, -7, -8, -90, -91, -999)] == [0, 7, 8, 14, 15, 15]
    assert [relative_position_bucket(n, **rule) for n in (1, 7, 8, 90, 91, 999)] == [17, 23, 24, 30, 31, 31]


@pytest.mark.parametrize("attn_2d", [False, True])
@pytest.mark.parametrize("name", ["relative_position_bias", "use_t5_rpe"])
def test_biases_depend_on_the_offset_alone(name, attn_2d):
    """A bias of each offset, wherever the window; keys of groups and prefix have none."""
    options = {"window_size": 2, "overlap": True, "num_landmarks": 4, "attn_2d": attn_2d}
    module, grid = eva((4, 4), 1, **options, **{name: True}), (4, 4) if attn_2d else (1, 16)
    torch.nn.init.normal_(module.bias.table)
    q, k, v = qkv(17, batch=1)
    out = module.attend(q, k, v)[0].detach()
    window = (2, 2) if attn_2d else (1, 2)
    exact, groups, module.visible = sets_of_eva(
        grid, window, (1, 1) if attn_2d else (0, 1), (2, 2) if attn_2d else (1, 4), 1, ()
    )
    table = module.bias.table.detach()
    for head in range(HEADS):
        bias = np.zeros((17, 17))
        for i in range(16):
            for j in range(16):
                offset = [j // grid[1] - i // grid[1], j % grid[1] - i % grid[1]][0 if attn_2d else 1 :]
                if max(map(abs, offset)) > 2:
                    continue
                if name == "use_t5_rpe":  # reach 3: 16 buckets, up to 16
                    bucket = [
                        relative_position_bucket(o, causal=False, num_buckets=16, max_distance=16) for o in offset
                    ]
                    bias[1 + i, 1 + j] = sum(table[axis, b, head] for axis, b in enumerate(bucket))
                else:  # span 2: 5 offsets along an axis, query - key
                    row, column = ([0] + offset)[-2:]
                    bias[1 + i, 1 + j] = table[head, ((2 - row) * 5 if attn_2d else 0) + 2 - column]
        expected = reference(*(x[0, head] for x in (q, k, v)), module, exact, groups, share=0.5, bias=bias)
        np.testing.assert_allclose(out[head].numpy(), expected, rtol=0, atol=1e-12)


def test_causal_bias_is_one_of_the_distance():
    module = causal_eva(overlap=True, use_t5_rpe=True, window_size=12, chunk_size=12, tokens=24)
    q, k, v = qkv(24, batch=1)
    rule = {"causal": True, "num_buckets": 16, "max_distance": 24}
    buckets = [[relative_position_bucket(j - i, **rule) for j in range(24)] for i in range(24)]
    assert buckets[23][0] == 15 and buckets[0][23] == 0
    bias = module.bias.table[0][torch.tensor(buckets)].permute(2, 0, 1)
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias.masked_fill(~torch.ones(24, 24).tril().bool(), -1e9)
    )
    torch.testing.assert_close(module.attend(q, k, v), expected, rtol=0, atol=1e-12)


def test_bias_refines_with_the_reach():
    offsets = torch.arange(-100, 1)[None, :, None]
    assert T5RelativePositionBias(3, offsets, causal=True).table.shape == (1, 50, 3)
    assert T5RelativePositionBias(3, 3 * offsets).table.shape == (1, 64, 3)
    assert T5RelativePositionBias(3, offsets)().shape == (3, 1, 1, 101)


def test_steps_attend_in_float32_under_autocast():
    module, state = causal_eva(fp32=True).float(), None
    with torch.autocast("cpu", torch.bfloat16):
        for token in torch.randn(8, 1, HEADS * WIDTH):
            out, state = module.step(token, state)
    assert out.dtype == torch.bfloat16 and state.keys.dtype == state.chunk_values.dtype == torch.float32
