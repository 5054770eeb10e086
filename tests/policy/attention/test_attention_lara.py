"""Randomized attention and its linear form against the equations of arXiv 2204.04667, in loops and by many draws."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from policy.attention.lara import LinearRandomizedAttention, log_densities, log_importance
from policy.attention.lara_proposals import Proposals, draw, pool
from policy.attention.ra import RandomizedAttention, draw_keys, scaled

DOUBLE = torch.float64
MIS_TYPES = ("mis_opt", "mis_biased", "mis_bh")


def numbers(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def softmax_attention(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def ra(*, train=False, **options):
    torch.manual_seed(0)
    return RandomizedAttention(**{"dim": 12, "num_heads": 2, **options}).to(DOUBLE).train(train)


def lara(*, train=False, grid=(4, 4), prefix_tokens=1, num_landmarks=4, **options):
    torch.manual_seed(0)
    sizes = {"dim": 12, "num_heads": 2, "grid": grid, "num_patches": grid[0] * grid[1], "prefix_tokens": prefix_tokens}
    attention = LinearRandomizedAttention(**sizes, num_landmarks=num_landmarks, **options).to(DOUBLE).train(train)
    for parameter in attention.proposals.parameters():  # layers that start at 0 and 1 hide mistakes
        parameter.data += 0.3 * torch.randn_like(parameter)
    return attention


def seeded(attention, x, **switches):
    torch.manual_seed(5)
    return attention(x, **switches)


# Randomized attention ------------------------------------------------------------------------------------------------


def test_draws_have_softmax_attention_as_their_mean():
    """Error below five standard errors, with 1000 and with 32 times as many draws, and so 5.7 times smaller."""
    q, k, v = (1.5 * numbers(3, 1, 1, 5, 4)).unbind(0)
    exact = softmax_attention(q, k, v)
    attention = ra(train=True)
    torch.manual_seed(1)
    for copies in (1000, 32000):
        out = attention.attend(*(x.expand(copies, -1, -1, -1) for x in (q, k, v)))
        error, deviation = out.mean(dim=0) - exact[0], out.std(dim=0)
        assert deviation.min() > 0.1
        assert (error.abs() < 5 * deviation / copies**0.5).all()


def test_keys_are_drawn_with_their_softmax_probability():
    probabilities = torch.tensor([1, 3, 0, 4, 0], dtype=DOUBLE) / 8
    torch.manual_seed(0)
    keys = draw_keys(probabilities.expand(1, 1, 5, 5), torch.eye(5, dtype=DOUBLE)[None, None], 4000)
    shares = torch.stack(keys).mean(dim=(0, 1, 2, 3))
    torch.testing.assert_close(shares, probabilities, rtol=0, atol=0.015)
    assert draw_keys(torch.zeros(1, 1, 5, 5), torch.ones(1, 1, 5, 3), 1)[0].equal(torch.ones(1, 1, 5, 3))


@pytest.mark.parametrize(("number", "drawn"), [(0.0, 1), (1.0, 2)])
def test_keys_of_probability_zero_are_never_drawn(monkeypatch, number, drawn):
    """Nor with the smallest random number, nor with the largest, rounded."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, number))
    probabilities = torch.tensor([0.0, 0.3, 0.7, 0.0]).expand(1, 1, 4, 4)
    (keys,) = draw_keys(probabilities, torch.arange(4.0)[None, None, :, None], 1)
    assert (keys == drawn).all()


def reference_weights(q, k, draws):
    """exp(w k' - |k'|^2 / 2), normalised; loops over queries and keys, q' = q D^(-1/4); q, k, draws (T, D)."""
    weights = torch.zeros(len(q), len(k), dtype=DOUBLE)
    for n, m in itertools.product(range(len(q)), range(len(k))):
        key = k[m] / k.shape[-1] ** 0.25
        weights[n, m] = math.exp(draws[n] @ key - key @ key / 2)
    return weights / weights.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("num_samples", [0, 1, 3])
def test_ra_in_evaluation_equals_loops(num_samples):
    """At the mean of each query's distribution."""
    q, k, v = numbers(3, 5, 6).unbind(0)
    shrunk = 6**-0.25
    centres = torch.zeros(5, 6, dtype=DOUBLE)
    for n in range(5):
        probability = (k @ q[n] / 6**0.5).softmax(dim=0) if num_samples else torch.full((5,), 0.2, dtype=DOUBLE)
        centres[n] = shrunk * (q[n] + sum(p * key for p, key in zip(probability, k, strict=True)))
    expected = reference_weights(q, k, centres) @ v
    out = ra(num_samples=num_samples).attend(q[None, None], k[None, None], v[None, None])
    torch.testing.assert_close(out[0, 0], expected, rtol=0, atol=1e-12)


def test_ra_in_training_averages_so_many_draws():
    """Without noise, one draw is one of T possible rows of weights; two draws are the mean of two of them."""
    q, k, _ = numbers(3, 1, 1, 4, 4).unbind(0)
    shrunk = 4**-0.25
    rows = torch.stack([reference_weights(q[0, 0], k[0, 0], shrunk * (q[0, 0] + k[0, 0, m])) for m in range(4)])
    for count in (1, 2):
        weights = ra(train=True, num_samples=count, noise=0.0)._weights(q, k, torch.ones(4, 4, dtype=torch.bool))[0, 0]
        for n in range(4):
            means = [sum(rows[list(ms), n]) / count for ms in itertools.product(range(4), repeat=count)]
            assert min((weights[n] - mean).abs().max() for mean in means) < 1e-12
    many = ra(train=True, num_samples=500)._weights(q, k, torch.ones(4, 4, dtype=torch.bool))
    torch.testing.assert_close(many, (q @ k.transpose(-2, -1) / 2).softmax(dim=-1), rtol=0, atol=0.1)


@pytest.mark.parametrize("options", [{"num_samples": -1}, {"evaluation": "expectation"}])
def test_expectation_is_softmax_attention(options):
    q, k, v = numbers(3, 2, 2, 7, 6).unbind(0)
    torch.testing.assert_close(ra(**options).attend(q, k, v), softmax_attention(q, k, v), rtol=0, atol=1e-13)
    trained = ra(train=True, **options).attend(q, k, v)
    assert torch.allclose(trained, softmax_attention(q, k, v)) == ("num_samples" in options)


def test_draws_see_neither_the_future_nor_padding():
    attention, x = ra(num_samples=2, train=True), numbers(1, 6, 12)
    changed = torch.cat([x[:, :4], numbers(1, 2, 12, seed=9)], dim=1)
    for switches in ({"is_causal": True}, {"key_padding_mask": torch.tensor([[False] * 4 + [True] * 2])}):
        plain, other = (seeded(attention, y, **switches) for y in (x, changed))
        torch.testing.assert_close(other[:, :4], plain[:, :4], rtol=0, atol=1e-13)
        assert (seeded(attention, x) - plain).abs().max() > 1e-4


# Proposals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "size"), [((4, 6), (2, 3)), ((5, 7), (2, 3)), ((3, 3), (3, 3)), ((1, 11), (1, 4))])
def test_pooling_equals_that_of_torch(grid, size):
    x = numbers(2, 3, grid[0] * grid[1], 5)
    means, counts = pool(x, grid, size)
    expected = F.adaptive_avg_pool2d(x.flatten(0, 1).transpose(1, 2).unflatten(2, grid), size)
    torch.testing.assert_close(means.flatten(0, 1), expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-13)
    if all(n % count == 0 for n, count in zip(grid, size, strict=True)):
        assert (counts == grid[0] * grid[1] / size[0] / size[1]).all()


def test_padded_tokens_are_in_no_pool():
    x = numbers(2, 1, 6, 3)
    real = torch.tensor([[True, True, True, False, True, True], [False, False, True, True, True, True]])
    x[0, :, 3] = math.nan
    means, counts = pool(x, (1, 6), (1, 3), real)
    torch.testing.assert_close(means[0, 0], torch.stack([x[0, 0, :2].mean(0), x[0, 0, 2], x[0, 0, 4:].mean(0)]))
    assert (means[1, 0, 0] == 0).all() and counts.flatten().tolist() == [2, 1, 2, 0, 2, 2]


def make_proposals(proposal="pool", mix="none", pool_module="light", num_landmarks=4, grid=(4, 4)):
    torch.manual_seed(0)
    sizes = {"num_landmarks": num_landmarks, "grid": grid, "num_heads": 2, "head_dim": 6}
    proposals = Proposals(proposal=proposal, mix=mix, pool_module=pool_module, **sizes).to(DOUBLE)
    for parameter in proposals.parameters():
        parameter.data += torch.randn_like(parameter)
    return proposals


@pytest.mark.parametrize("mix", ["none", "mixed", "vmixed"])
@pytest.mark.parametrize(
    ("proposal", "pool_module"),
    [
        ("pool", "light"),
        ("pool", "dense"),
        ("no_param_pool", "light"),
        ("adaptive_1d", "light"),
        ("adaptive_1d", "dense"),
    ],
)
def test_proposals_equal_loops(proposal, pool_module, mix):
    proposals, (q, k, v) = make_proposals(proposal, mix, pool_module), numbers(3, 1, 2, 16, 6).unbind(0)
    blocks = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    if proposal == "adaptive_1d":
        blocks = [list(range(start, start + 4)) for start in (0, 4, 8, 12)]

    def transform(layers, token):  # (H, D)
        if proposal == "no_param_pool":
            return token
        if pool_module == "dense":
            return layers(token.reshape(12)).reshape(2, 6)
        return torch.stack([layers(head) for head in token])

    def landmark(x, layers, block):
        if proposal == "adaptive_1d":
            return sum(transform(layers, x[0, :, j]) for j in block) / 4
        return transform(layers, sum(x[0, :, j] for j in block) / 4)

    q_bar = torch.stack([landmark(q, proposals.of_queries, block) for block in blocks])  # (C, H, D)
    k_bar = torch.stack([landmark(k, proposals.of_keys, block) for block in blocks])
    expected = k_bar.clone()
    for c, h in itertools.product(range(4), range(2)) if mix != "none" else ():
        weights = torch.zeros(4, dtype=DOUBLE)
        for other in range(4):
            weights[other] = (k_bar[c, h] @ k_bar[other, h] / 6**0.5).exp()
            if mix == "vmixed":
                weights[other] *= v[0, h, blocks[other]].mean(dim=0).norm() + 1e-4
        expected[c, h] = sum(w * k_bar[other, h] for other, w in enumerate(weights)) / weights.sum()
    got_q, got_k = proposals(q, k, v)
    torch.testing.assert_close(got_q[0].transpose(0, 1), q_bar, rtol=0, atol=1e-12)
    torch.testing.assert_close(got_k[0].transpose(0, 1), expected, rtol=0, atol=1e-12)


def test_more_landmarks_than_tokens_of_an_axis():
    x = numbers(1, 2, 6, 6)
    assert make_proposals("no_param_pool", num_landmarks=16, grid=(2, 3)).pool(x)[0].equal(x)
    assert make_proposals("no_param_pool", num_landmarks=5, grid=(1, 9)).pool(x[:, :, :4])[0].equal(x[:, :, :4])


def test_draws_around_the_centres():
    centres = numbers(4000, 1, 2, 3)
    torch.manual_seed(0)
    for sampling, rounds in (("single", 1), ("multisample", 2), ("antithetics", 2)):
        noise = (draw(centres, sampling, 0.5) - centres.repeat(1, 1, rounds, 1)).unflatten(2, (rounds, 2))
        assert noise.shape[2] == rounds and noise.std().item() == pytest.approx(0.5, rel=0.03)
        if rounds == 2:
            correlation = (noise[:, :, 0] * noise[:, :, 1]).mean().item() / 0.25
            assert correlation == pytest.approx(-1 if sampling == "antithetics" else 0, abs=0.05)


# Importance weights --------------------------------------------------------------------------------------------------


def gaussian(x, mean):
    """Density of N(mean, I) at x (D,)."""
    return math.exp(-((x - mean) @ (x - mean)) / 2) / (2 * math.pi) ** (len(x) / 2)


def feature(x, w):
    return math.exp(w @ x - x @ x / 2)


def reference_lara(q, k, v, q_bar, k_bar, draws, mis_type, alpha):
    """Section 4 in loops, with whole densities; q, k (N, D), q_bar, k_bar (C, D) scaled, draws (R C, D) -> (N, D)."""
    landmarks, centres = len(q_bar), q_bar + k_bar
    shares = [[math.exp(query @ q_bar[c]) for c in range(landmarks)] for query in q]
    shares = [[row[c] / sum(other[c] for other in shares) for c in range(landmarks)] for row in shares]
    sums = [sum(feature(key, w) for key in k) for w in draws]
    values = [sum(feature(key, w) * value for key, value in zip(k, v, strict=True)) for w in draws]
    out = []
    for n, query in enumerate(q):
        top, bottom = 0, 0
        for s, w in enumerate(draws):
            c = s % landmarks
            density = gaussian(w, centres[c])
            weight = density / sum(gaussian(w, centre) for centre in centres)
            if mis_type == "mis_biased":
                weight *= math.exp(query @ centres[c])
            if mis_type == "mis_opt":
                weight = max(weight + alpha * (shares[n][c] - sum(shares[n]) / landmarks), 1e-8)
            weight *= gaussian(w, torch.zeros_like(w)) / density * feature(query, w)
            bottom += weight * sums[s]
            top += weight * values[s]
        out.append(top / bottom)
    return torch.stack(out)


@pytest.mark.parametrize("sampling", ["none", "single", "multisample", "antithetics"])
@pytest.mark.parametrize(("mis_type", "alpha"), [("mis_opt", 1.0), ("mis_opt", 3.0), ("mis_biased", 1), ("mis_bh", 1)])
def test_lara_equals_loops_over_given_samples(mis_type, alpha, sampling):
    q, k, v = (0.7 * numbers(3, 2, 2, 7, 4)).unbind(0)
    q_bar, k_bar = (0.5 * numbers(2, 2, 2, 3, 4, seed=1)).unbind(0)
    torch.manual_seed(0)
    centres = q_bar + k_bar
    draws = centres if sampling == "none" else draw(centres, sampling, 1.0)
    log_weights, on_keys = log_importance(q, k, q_bar, k_bar, draws, mis_type=mis_type, alpha=alpha)
    out = log_weights.softmax(dim=-1) @ (on_keys @ v)
    for b, h in itertools.product(range(2), range(2)):
        of_head = (x[b, h] for x in (q, k, v, q_bar, k_bar, draws))
        expected = reference_lara(*of_head, mis_type, alpha)
        torch.testing.assert_close(out[b, h], expected, rtol=0, atol=1e-12)


def test_balance_heuristics_sum_to_one():
    """At one place, over the proposals that could have drawn it."""
    centres, places = numbers(1, 1, 5, 4), numbers(1, 1, 9, 4, seed=1)
    total = 0
    for c in range(5):
        rolled = centres.roll(-c, dims=2)  # so that proposal c comes first, as the one that drew the place
        own, together = log_densities(places[:, :, :, None].expand(-1, -1, -1, 5, -1).flatten(2, 3), rolled)
        total = total + (own - together).exp()[0, 0, 0, ::5]
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-13)


def test_densities_are_those_of_gaussians():
    centres = numbers(1, 1, 3, 4)
    draws = draw(centres, "multisample", 1.0)
    own, together = log_densities(draws, centres)
    zero = torch.zeros(4, dtype=DOUBLE)
    for s, w in enumerate(draws[0, 0]):
        all_of_them = [gaussian(w, centre) / gaussian(w, zero) for centre in centres[0, 0]]
        assert own[0, 0, 0, s].exp().item() == pytest.approx(all_of_them[s % 3])
        assert together[0, 0, 0, s].exp().item() == pytest.approx(sum(all_of_them))


@pytest.mark.parametrize("sampling", ["single", "antithetics"])
@pytest.mark.parametrize("mis_type", ["mis_bh", "mis_opt"])
def test_many_draws_of_lara_approach_softmax_attention(mis_type, sampling):
    """Both sums of the estimator are unbiased where the weights of proposals sum to one (alpha small: not clamped)."""
    q, k, v = (0.8 * numbers(3, 1, 1, 5, 4, seed=3)).unbind(0)
    exact, (q, k) = softmax_attention(q, k, v), (scaled(q), scaled(k))
    q_bar, k_bar = q[:, :, :3] / 2, k[:, :, 1:4] / 2
    torch.manual_seed(0)
    errors = []
    for copies in (400, 40000):
        of_copies = [x.expand(copies, -1, -1, -1) for x in (q, k, q_bar, k_bar)]
        draws = draw(of_copies[2] + of_copies[3], sampling, 1.0)
        log_weights, on_keys = log_importance(*of_copies, draws, mis_type=mis_type, alpha=0.02)
        weights = log_weights.exp()
        estimate = (weights @ (on_keys @ v)).mean(dim=0) / weights.sum(dim=-1, keepdim=True).mean(dim=0)
        errors.append((estimate - exact[0]).square().mean().sqrt().item())
    assert errors[1] < 0.01 and errors[1] < errors[0] / 3


# The linear module ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("mis_type", MIS_TYPES)
def test_lara_module_equals_loops(mis_type, prefix):
    """In evaluation: patches by the equations, against the prefix by pooled keys; the prefix densely."""
    attention = lara(prefix_tokens=prefix, mis_type=mis_type, grid=(4, 6), num_landmarks=4)
    q, k, v = numbers(3, 1, 2, prefix + 24, 6).unbind(0)
    out = attention.attend(q, k, v).detach()
    torch.testing.assert_close(out[:, :, :prefix], softmax_attention(q[:, :, :prefix], k, v), rtol=0, atol=1e-12)
    patches = [x[:, :, prefix:] for x in (q, k, v)]
    q_bar, k_bar = (x.detach() for x in attention.proposals(*patches))
    shrunk = 6**-0.25
    blocks = [
        [6 * i + j for i in rows for j in columns] for rows in ((0, 1), (2, 3)) for columns in ((0, 1, 2), (3, 4, 5))
    ]
    for h in range(2):
        inner = [shrunk * x[0, h] for x in (patches[0], patches[1])] + [patches[2][0, h]]
        bars = [shrunk * x[0, h] for x in (q_bar, k_bar)]
        expected = reference_lara(*inner, *bars, bars[0] + bars[1], mis_type, 1.0)
        for n in range(24 if prefix else 0):
            query = patches[0][0, h, n] / 6**0.5
            near = [math.exp(query @ k[0, h, p]) for p in range(prefix)]
            far = sum(6 * math.exp(query @ patches[1][0, h, block].mean(dim=0)) for block in blocks)
            mixed = far * expected[n] + sum(weight * v[0, h, p] for p, weight in enumerate(near))
            expected[n] = mixed / (far + sum(near))
        torch.testing.assert_close(out[0, h, prefix:], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("mis_type", MIS_TYPES)
@pytest.mark.parametrize("grid", [(4, 4), (1, 16), (3, 5)])
def test_lara_is_exact_where_all_patches_have_one_key(grid, mis_type, train):
    attention, tokens = lara(grid=grid, mis_type=mis_type, train=train), grid[0] * grid[1]
    q, k, v = numbers(3, 1, 2, 1 + tokens, 6).unbind(0)
    k = torch.cat([k[:, :, :2], k[:, :, 1:2].expand(-1, -1, tokens - 1, -1)], dim=2)
    torch.testing.assert_close(attention.attend(q, k, v), softmax_attention(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_landmarks", [1, 4, 9, 100])
@pytest.mark.parametrize("grid", [(5, 7), (1, 11)])
def test_landmarks_need_not_divide_the_tokens(grid, num_landmarks):
    for proposal in ("pool", "adaptive_1d"):
        attention = lara(grid=grid, num_landmarks=num_landmarks, proposal=proposal)
        out = attention(numbers(2, 1 + grid[0] * grid[1], 12))
        assert out.isfinite().all()
        weights = attention.attention_map(numbers(2, 1 + grid[0] * grid[1], 12))
        assert (weights > 0).all() and (weights.sum(dim=-1) - 1).abs().max() < 1e-12


def test_lara_takes_sequences_of_any_length():
    attention = lara(grid=(1, 16), prefix_tokens=0, num_landmarks=5, train=True)
    for tokens in (1, 3, 7, 16):
        assert seeded(attention, numbers(2, tokens, 12)).isfinite().all()
    for grid, tokens in (((1, 16), 17), ((4, 4), 15)):
        with pytest.raises(ValueError, match="tokens"):
            lara(grid=grid, prefix_tokens=0)(numbers(1, tokens, 12))


@pytest.mark.parametrize("options", [{}, {"mix": "vmixed"}, {"grid": (1, 16)}, {"proposal": "adaptive_1d"}])
@pytest.mark.parametrize("mis_type", MIS_TYPES)
def test_padded_tokens_are_not_seen(mis_type, options):
    """In training, with a padded prefix token: neither as keys nor as queries, whatever they hold."""
    attention, x = lara(mis_type=mis_type, train=True, prefix_tokens=2, **options), numbers(2, 18, 12)
    padding = torch.zeros(2, 18, dtype=torch.bool)
    padding[0, [1, 4, 5, 6, 7, 17]] = padding[1] = True
    changed = torch.where(padding[..., None], numbers(2, 18, 12, seed=9), x)
    out, other = (seeded(attention, y, key_padding_mask=padding) for y in (x, changed))
    torch.testing.assert_close(other[~padding], out[~padding], rtol=0, atol=1e-12)
    assert out.isfinite().all() and (out[0, 2] - seeded(attention, x)[0, 2]).abs().max() > 1e-5


def test_evaluation_is_training_without_noise():
    x = numbers(2, 17, 12)
    torch.testing.assert_close(lara(train=True, noise=0.0)(x), lara()(x), rtol=0, atol=1e-13)
    for attention in (ra(train=True), lara(train=True)):
        assert (attention(x) - attention(x)).abs().max() > 1e-3
