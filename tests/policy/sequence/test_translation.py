"""Translation: pairs, encoder and decoder, beam search, BLEU, and the command from end to end."""

import itertools

import numpy as np
import pytest
import torch

from policy.attention import ATTENTIONS, list_attentions
from policy.dataset.text.pairs import PairBatches, embedded_pairs, open_pairs, read_pairs, split_pairs
from policy.dataset.text.tokens import ByteTokens
from policy.sequence.search import beam_search
from policy.sequence.translation import TranslationModel

SIZES = {"dim": 16, "depth": 2, "decoder_depth": 2, "num_heads": 2}
SMALL = {  # options of mechanisms that make their windows and landmarks matter at twelve tokens
    "bigbird": {}, "causal_eva": {"window_size": 4, "chunk_size": 2}, "eva": {"attn_2d": False, "num_landmarks": 3},
    "hybrid": {"attn_2d": False, "dilations": [1, 2]}, "lara": {"num_landmarks": 4}, "linformer": {"rank": 4},
    "nystromformer": {"num_landmarks": 4},
}  # fmt: skip


def model(attention="softmax", decoder="softmax", options=None, **changes):
    """A tiny model of 9 tokens in evaluation mode, float64."""
    torch.manual_seed(0)
    changes = {"vocabulary": 9, "source_length": 12, "target_length": 10, **SIZES, **changes}
    attention = {"name": attention, **(SMALL.get(attention, {}) if options is None else options)}
    decoder = {"name": decoder, **SMALL.get(decoder, {})}
    return TranslationModel(attention=attention, decoder_attention=decoder, **changes).eval().double()


def some_sources(lengths, *, net):
    """Random sources (B, S) of these lengths without the end."""
    generator = torch.Generator().manual_seed(2)
    source = torch.full((len(lengths), net.source_length), net.padding)
    for row, length in enumerate(lengths):
        source[row, :length] = torch.randint(9, (length,), generator=generator)
        source[row, length] = net.end
    return source


# Pairs -----------------------------------------------------------------------------------------------------------


def test_the_embedded_pairs():
    """All 10,000 are different sentences; which of them are taken, and nothing else, follows the seed."""
    every = embedded_pairs(10_000, seed=0)
    assert len(every) == len({english for english, _ in every}) == 10_000
    assert every[0] == ("Clear away the grey sponge that is wet.", "Räume den grauen Schwamm weg, der nass ist.")
    assert every == embedded_pairs(10_000, seed=1)
    for english, german in every:
        assert all(text[0].isupper() and text[-1] == "." and "  " not in text for text in (english, german))
    few = embedded_pairs(100, seed=1)
    assert few == embedded_pairs(100, seed=1) != embedded_pairs(100, seed=2)
    assert len(few) == 100 and set(few) <= set(every)
    for count in (0, 10_001):
        with pytest.raises(ValueError, match="pairs"):
            embedded_pairs(count, seed=0)


def test_files_of_pairs(tmp_path):
    source, target = tmp_path / "text.en", tmp_path / "text.de"
    source.write_text("one\n two \n\nfour\n")
    target.write_text("eins\nzwei\ndrei\nvier")
    assert read_pairs(source, target) == [("one", "eins"), ("two", "zwei"), ("four", "vier")]
    assert open_pairs(source, target, count=5, seed=0) == read_pairs(source, target)
    assert len(open_pairs(None, None, count=5, seed=0)) == 5
    with pytest.raises(ValueError, match="source, target"):
        open_pairs(source, None, count=5, seed=0)
    target.write_text("eins\nzwei\n")
    with pytest.raises(ValueError, match="source, target"):
        read_pairs(source, target)
    target.write_bytes(b"a\nb\n\xff\nd")
    with pytest.raises(ValueError, match="text.de.* 4"):
        read_pairs(source, target)
    for file in (source, target):
        file.write_text("")
    with pytest.raises(ValueError, match="source, target"):
        read_pairs(source, target)


def test_no_sentence_is_in_two_parts():
    pairs = [(f"s{number}", f"t{number}") for number in range(40)]
    repeated = [*pairs, ("s3", "other"), ("other", "t4"), ("s5", "t5")]
    parts = split_pairs(repeated, held_out=7, seed=0)
    assert [len(parts[part]) for part in ("train", "valid", "test")] == [26, 7, 7]
    assert sorted(itertools.chain(*parts.values())) == sorted(pairs)
    assert parts == split_pairs(repeated, held_out=7, seed=0) != split_pairs(repeated, held_out=7, seed=1)
    for held_out in (0, 20):
        with pytest.raises(ValueError, match="held_out"):
            split_pairs(repeated, held_out=held_out, seed=0)


def test_batches_of_pairs():
    data = PairBatches(
        [("ab", "c"), ("abcd", "c"), ("a", "cde"), ("a", "")], ByteTokens(), source_length=4, target_length=3
    )
    assert len(data) == 2 and data.dropped == 2 and data.texts == [("ab", "c"), ("a", "")]
    batch = data.batch(np.array([0, 1]))
    end, start, padding = 256, 257, 258
    assert batch["source"].tolist() == [[97, 98, end, padding], [97, end, padding, padding]]
    assert batch["target"].tolist() == [[start, 99, end], [start, end, padding]]
    assert PairBatches([("abc", "de")], ByteTokens(), source_length=4, target_length=3).dropped == 0
    with pytest.raises(ValueError, match="source_length, target_length"):
        PairBatches([("abc", "de")], ByteTokens(), source_length=3, target_length=3)


# The model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", list_attentions())
def test_padding_does_not_matter(attention):
    """A sentence among longer ones, alone, and with other numbers in the embedding of the padding; any encoder."""
    net = model(attention)
    source = some_sources([3, 11, 6], net=net)
    target = torch.tensor([[net.start, 1, 2, 3]] * 3)
    with torch.no_grad():
        together = net.logits(source, target)
        alone = torch.cat([net.logits(source[row : row + 1], target[row : row + 1]) for row in range(3)])
        net.source_embedding.tokens.weight[net.padding] = 100
        changed = net.logits(source, target)
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-10)
    torch.testing.assert_close(changed, together, rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", list_attentions())
@pytest.mark.parametrize("decoder", [name for name in list_attentions() if ATTENTIONS[name].causal])
def test_a_source_of_padding_alone(attention, decoder):
    """Scores and gradients are finite, and the other sentences' what they are beside another sentence."""
    net = model(attention, decoder).float()
    source, target = some_sources([3, 11, 6], net=net), torch.tensor([[net.start, 1, 2, 3]] * 3)
    empty = source.clone()
    empty[2] = net.padding
    found = []
    for sources in (source, empty):
        read = [memory.keys for memory in net.encode(sources)]
        scores = net.logits(sources, target)
        gradients = torch.autograd.grad(1e4 * scores.sum(), list(net.parameters()))
        assert all(tensor.isfinite().all() for tensor in (*read, scores, *gradients))
        found.append(scores[:2])
    assert torch.equal(*found)
    assert len(net.translate(empty, beams=2)) == 3


def test_targets_of_padding_alone_cost_nothing():
    net = model()
    losses = net({"source": some_sources([3, 5], net=net), "target": torch.full((2, 4), net.padding)}, {})
    losses["loss"].backward()
    assert losses["loss"] == losses["top1"] == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in net.parameters())


def test_the_source_matters():
    net = model()
    sources = some_sources([5, 5], net=net)
    target = torch.tensor([[net.start, 1]] * 2)
    scores = net.logits(sources, target)
    assert (scores[0] - scores[1]).abs().min() > 1e-9 and scores.shape == (2, 2, 10)


@pytest.mark.parametrize("decoder", ["softmax", "causal_eva", "performer", "ra"])
def test_cached_decoding_equals_full(decoder):
    net = model("eva", decoder)
    source = some_sources([3, 11], net=net)
    target = torch.cat([torch.full((2, 1), net.start), torch.randint(9, (2, 9))], dim=1)
    with torch.no_grad():
        full, state = net.logits(source, target), net.begin(source)
        for place in range(10):
            scores, state = net.step(target[:, place], state)
            torch.testing.assert_close(scores, full[:, place], rtol=0, atol=1e-12)


def test_loss():
    """Cross-entropy of what is no padding, smoothed in training only; the share of right tokens."""
    net = model(label_smoothing=0.2)
    source, target = some_sources([3, 5], net=net), torch.tensor([[10, 1, 2, 9], [10, 3, 9, 11]])
    losses = net({"source": source, "target": target}, {})
    log_probs = net.logits(source, target[:, :-1]).float().log_softmax(dim=-1)
    expected = [log_probs[0, 0], log_probs[0, 1], log_probs[0, 2], log_probs[1, 0], log_probs[1, 1]]
    labels = [1, 2, 9, 3, 9]
    plain = -sum(row[label] for row, label in zip(expected, labels, strict=True)) / 5
    torch.testing.assert_close(losses["loss"], plain)
    right = sum(int(row.argmax() == label) for row, label in zip(expected, labels, strict=True))
    assert losses["top1"].item() == pytest.approx(right / 5)
    net.train()
    even = -sum(row.mean() for row in expected) / 5
    torch.testing.assert_close(net({"source": source, "target": target}, {})["loss"], 0.8 * plain + 0.2 * even)


def test_start_and_padding_never_follow():
    net = model()
    assert net.logits(some_sources([2], net=net), torch.tensor([[net.start]])).shape[-1] == net.end + 1


@pytest.mark.parametrize("change", [{"depth": 1}, {"decoder_depth": 1}, {"dropout": 0.5}, {"source_length": 14},
                                    {"target_length": 11}])  # fmt: skip
def test_sizes_change_the_model(change):
    nets = [model().train(), model(**change).train()]
    if "dropout" not in change:
        assert len({sum(p.numel() for p in net.parameters()) for net in nets}) == 2
    source = some_sources([4], net=nets[1])
    torch.manual_seed(3)
    scores = [nets[1].logits(source, torch.tensor([[10, 1]])) for _ in range(2)]
    assert torch.equal(*scores) == ("dropout" not in change)


def test_wrong_options():
    with pytest.raises(
        ValueError, match="attention: got 'lara', allowed for a decoder: causal_eva, performer, ra, softmax"
    ):
        model(decoder="lara")
    with pytest.raises(ValueError, match="label_smoothing: got 1.0, allowed: 0 to below 1"):
        model(label_smoothing=1.0)


# Search ----------------------------------------------------------------------------------------------------------


def scored(net, source, tokens):
    """Sum of log probabilities of one target with its end, by full evaluation."""
    target = torch.tensor([[net.start, *tokens]])
    with torch.no_grad():
        log_probs = net.logits(source[None], target)[0].float().log_softmax(dim=-1)
    return sum(log_probs[place, token].item() for place, token in enumerate([*tokens, net.end]))


def search(net, source, **options):
    options = {"start": net.start, "end": net.end, "most": 4, **options}
    return beam_search(net.step, net.begin(source), len(source), **options)


@pytest.fixture(scope="module")
def sharp():
    """A model of three tokens whose scores differ, and three sources."""
    net = model(vocabulary=3)
    with torch.no_grad():
        net.target_embedding.tokens.weight *= 4
    source = torch.full((3, 12), net.padding)
    source[:, :4] = torch.tensor([[0, 1, 2, 3], [2, 2, 3, 5], [1, 3, 5, 5]])
    return net, source


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_wide_search_finds_the_best_of_all(sharp, length_penalty):
    """Every sequence of up to three of three tokens, by brute force; all 40 of them, in order."""
    net, source = sharp
    found = search(net, source, beams=100, length_penalty=length_penalty)
    for row in range(3):
        every = [tokens for length in range(4) for tokens in itertools.product(range(3), repeat=length)]
        scores = {tokens: scored(net, source[row], tokens) / (len(tokens) + 1) ** length_penalty for tokens in every}
        best = sorted(every, key=lambda tokens: -scores[tokens])
        assert len(found[row]) == 40 and [tuple(tokens) for _, tokens in found[row][:3]] == best[:3]
        for score, tokens in found[row]:
            assert score == pytest.approx(scores[tuple(tokens)], abs=1e-5)


def test_one_beam_is_greedy_search(sharp):
    for net, source in (sharp, (model("lara"), some_sources([2, 11, 5], net=model()))):
        found = search(net, source, beams=1, most=9)
        for row in range(3):
            tokens = []
            while len(tokens) < 8:
                with torch.no_grad():
                    scores = net.logits(source[row : row + 1], torch.tensor([[net.start, *tokens]]))
                if scores[0, -1].argmax() == net.end:
                    break
                tokens.append(scores[0, -1].argmax().item())
            ((score, best),) = found[row]
            assert best == tokens and score == pytest.approx(
                scored(net, source[row], tokens) / (len(tokens) + 1), abs=1e-5
            )


@pytest.mark.parametrize("beams", [2, 4])
def test_narrow_search(sharp, beams):
    """Sorted, never better than the best of all, never worse than... what it says it is; alone as in a batch."""
    net, source = sharp
    found, wide = search(net, source, beams=beams), search(net, source, beams=100)
    for row in range(3):
        scores = [score for score, _ in found[row]]
        assert scores == sorted(scores, reverse=True) and 1 <= len(scores) <= beams
        assert scores[0] <= wide[row][0][0] + 1e-6
        ((alone),) = search(net, source[row : row + 1], beams=beams)
        assert [tokens for _, tokens in alone] == [tokens for _, tokens in found[row]]
    for beams in (0, -1):
        with pytest.raises(ValueError, match="beams: got"):
            search(net, source, beams=beams)


def test_the_length_penalty_prefers_longer_ones():
    """Log probabilities that do not depend on what came before: the end is always worth -1, the token -0.4."""

    def step(tokens, state):
        return torch.tensor([-0.4, -1.0]).log_softmax(dim=0).expand(len(tokens), 2), state

    def length(penalty):
        options = {"start": 0, "end": 1, "most": 6, "beams": 8, "length_penalty": penalty}
        return len(beam_search(step, (), 1, **options)[0][0][1])

    assert length(0.0) == 0 and length(1.0) == 5
