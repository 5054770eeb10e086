"""Language models: text and tokens, blocks, decoding token by token, perplexity, and the command from end to end."""

import builtins
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eval.benchmark.language import measure
from policy.attention import ATTENTIONS, build_attention
from policy.dataset.text.corpus import TokenWindows, embedded_text, read_text, text_parts
from policy.dataset.text.tokens import learn_tokens, load_tokens
from policy.sequence.blocks import Blocks
from policy.sequence.language import LanguageModel, draw, surprise, window_starts
from policy.sequence.stepping import rows_of, step, way_of

SIZES = {"dim": 16, "depth": 2, "num_heads": 2}
CAUSAL = [
    {"name": "softmax"},
    {"name": "causal_eva", "window_size": 4, "chunk_size": 2, "overlap": True, "use_t5_rpe": True},
    {"name": "performer"},
    {"name": "performer", "proj_method": "fourier"},
    {"name": "performer", "proj_method": "dpfp", "num_features": 32},
    {"name": "performer", "cos_weighting": True},
    {"name": "ra"},
]
CAUSAL += [{"name": new} for new in set(ATTENTIONS) - {one["name"] for one in CAUSAL} if ATTENTIONS[new].causal]
every_causal = pytest.mark.parametrize(
    "attention", CAUSAL, ids=lambda attention: "_".join(map(str, attention.values()))
)


def model(attention=None, **options):
    """A tiny model in evaluation mode, float64."""
    torch.manual_seed(0)
    options = {"vocabulary": 11, "context": 12, **SIZES, **options}
    return LanguageModel(attention=attention or CAUSAL[0], **options).eval().double()


def some_tokens(*shape, vocabulary=11):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(1))


# Text and tokens -------------------------------------------------------------------------------------------------


def test_the_parts_of_a_text_make_it_whole():
    parts = text_parts(None)
    assert "".join(parts.values()) == embedded_text() and len(embedded_text()) > 3e5
    shares = [len(parts[name]) / len(embedded_text()) for name in ("train", "valid", "test")]
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=1e-4)


def test_a_folder_names_its_parts_or_is_cut(tmp_path):
    for name, text in (("wiki.train.tokens", "aaa"), ("wiki.valid.tokens", "bb"), ("wiki.test.tokens", "c")):
        (tmp_path / name).write_text(text)
    (tmp_path / "train.notes").write_text("not text")
    assert text_parts(tmp_path) == {"train": "aaa", "valid": "bb", "test": "c"}
    (tmp_path / "wiki.test.tokens").unlink()
    with pytest.raises(ValueError, match="without a file named test, allowed: train, valid and test, or none"):
        text_parts(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "b.txt").write_text("b" * 50)
    (other / "a.raw").write_text("a" * 49)
    assert text_parts(other)["train"] == "a" * 49 + "\n" + "b" * 40


def test_text_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt: got byte 0xfc at place 1, allowed: UTF-8 text"):
        read_text(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="empty.txt: got no text"):
        text_parts(tmp_path / "empty.txt")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match="nothing, allowed: a file, or a folder of .txt, .raw, .tokens files"):
        text_parts(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        text_parts(tmp_path / "missing.txt")


TEXT = "Grüße, 世界!\n  twice twice twice\n\nthe end"


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_tokens_lose_nothing(kind, tmp_path):
    """There and back, also from disk; the bytes that they stand for are those of the text."""
    tokens = learn_tokens(kind, [TEXT * 9], size=300)
    numbers = tokens.encode(TEXT)
    assert numbers.ndim == 1 and numbers.max() < tokens.size <= 300 and numbers.dtype.kind == "u"
    assert tokens.decode(numbers) == TEXT and tokens.count_bytes(numbers) == len(TEXT.encode())
    assert (len(numbers) < len(TEXT.encode())) == (kind == "bpe")
    tokens.save(tmp_path)
    np.testing.assert_array_equal(load_tokens(kind, tmp_path).encode(TEXT), numbers)
    assert {path.name for path in tmp_path.iterdir()} == ({"tokens.json"} if kind == "bpe" else set())
    assert len(tokens.encode("")) == 0


def test_wrong_tokens(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="tokens: got 'word', allowed: byte, bpe"):
        learn_tokens("word", [TEXT], size=300)
    with pytest.raises(ValueError, match="vocabulary: got 256, allowed: above 256"):
        learn_tokens("bpe", [TEXT], size=256)
    with pytest.raises(FileNotFoundError, match="without tokens.json"):
        load_tokens("bpe", tmp_path)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[language\]"'):
        learn_tokens("bpe", [TEXT], size=300)


def test_windows_of_tokens():
    numbers = np.arange(50, dtype=np.uint8)
    windows = TokenWindows(numbers, length=8, stride=5)
    assert len(windows) == 9  # the last begins at 40 and ends with 48, the next would need 53
    batch = windows.batch(np.array([0, 8]))["tokens"]
    assert batch.dtype == np.int64 and batch.tolist() == [list(range(9)), list(range(40, 49))]
    with pytest.raises(ValueError, match="got a part of 8 tokens, allowed: more than the context of 8"):
        TokenWindows(numbers[:8], length=8, stride=1)
    with pytest.raises(ValueError, match="stride: got 8 and 0"):
        TokenWindows(numbers, length=8, stride=0)


# The model -------------------------------------------------------------------------------------------------------


@every_causal
def test_step_by_step_equals_full_evaluation(attention):
    """Every mechanism, beyond its windows and chunks."""
    net, tokens, state, scores = model(attention, context=20), some_tokens(3, 20), None, []
    with torch.no_grad():
        for place in range(20):
            row, state = net.step(tokens[:, place], state)
            scores.append(row)
            assert state.place == place + 1
        torch.testing.assert_close(torch.stack(scores, dim=1), net.logits(tokens), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="tokens: got more than 20, allowed: 20"):
        net.step(tokens[:, 0], state)


@every_causal
def test_nothing_of_the_future_is_seen(attention):
    net, tokens = model(attention), some_tokens(1, 12)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 11
    with torch.no_grad():
        before, after = net.logits(tokens)[0], net.logits(changed)[0]
    torch.testing.assert_close(after[:7], before[:7], rtol=0, atol=1e-12)
    assert (after[7:] - before[7:]).abs().amax(dim=1).min() > 1e-6


def test_ways_of_decoding():
    """What each mechanism keeps grows as it says."""
    geometry = {
        "dim": 8,
        "num_heads": 2,
        "num_patches": 16,
        "grid": (1, 16),
        "layer": 0,
        "depth": 1,
        "prefix_tokens": 0,
    }
    found = {}
    for options in (CAUSAL[0], {"name": "causal_eva"}, CAUSAL[2], CAUSAL[5], CAUSAL[6]):
        attention = build_attention(**options, **geometry).eval()
        states = [None]
        for _ in range(16):
            states.append(step(attention, torch.randn(1, 8), states[-1])[1])
        sizes = [sum(part.numel() for part in parts_of(state)) for state in states[1:]]
        found[way_of(attention)] = (sizes[0], sizes[-1])
    assert found["keys and values"] == (16, 16 * 16)
    assert found["whole prefix"] == (8, 8 * 16)
    assert found["sums"][0] == found["sums"][1]
    assert found["own state"][1] < 16 * 16


def parts_of(state):
    if torch.is_tensor(state):
        return [state]
    return list(state) if isinstance(state, tuple) else list(vars(state).values())


def test_rows_of_a_state():
    attention = build_attention(
        "causal_eva", dim=8, num_heads=2, num_patches=8, grid=(1, 8), layer=0, depth=1, prefix_tokens=0
    )
    _, state = step(attention.eval(), torch.randn(3, 8))
    index = torch.tensor([2, 0, 0, 1])
    picked = rows_of((state, None, 5, (state.keys,)), index)
    assert torch.equal(picked[0].keys, state.keys[index]) and torch.equal(picked[3][0], state.keys[index])
    assert picked[1:3] == (None, 5)


def test_the_model_is_that_of_the_formula():
    """A block by block computation from its weights alone."""
    net, tokens = model(), some_tokens(2, 9)
    x = 4 * net.embedding.tokens.weight[tokens] + net.embedding.places.weight[:9]
    for block in net.blocks.blocks:
        y = F.layer_norm(x, (16,), block.attention_norm.weight, block.attention_norm.bias)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in block.attention.qkv(y).chunk(3, dim=-1))
        scores = (q @ k.mT / math.sqrt(8)).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
        x = x + block.attention.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
        y = F.layer_norm(x, (16,), block.mlp_norm.weight, block.mlp_norm.bias)
        x = x + F.linear(F.gelu(block.mlp.fc1(y)), block.mlp.fc2.weight, block.mlp.fc2.bias)
    x = F.layer_norm(x, (16,), net.blocks.norm.weight, net.blocks.norm.bias)
    expected = x @ net.embedding.tokens.weight.T
    torch.testing.assert_close(net.logits(tokens), expected)
    loss = net({"tokens": tokens}, {})["loss"]
    torch.testing.assert_close(
        loss, F.cross_entropy(net.logits(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())
    )


def test_dropout_acts_in_training_only():
    net, tokens = model(dropout=0.5), some_tokens(1, 12)
    assert torch.equal(net.logits(tokens), net.logits(tokens))
    net.train()
    assert not torch.equal(net.logits(tokens), net.logits(tokens))
    plain = model().train()
    assert torch.equal(plain.logits(tokens), plain.logits(tokens))


@pytest.mark.parametrize("change", [{"depth": 3}, {"dim": 32}, {"num_heads": 4}, {"mlp_ratio": 2.0}, {"context": 13}])
def test_sizes_change_the_model(change):
    tokens = some_tokens(1, 12)
    changed = model(**change)
    assert not torch.equal(changed.logits(tokens), model().logits(tokens))
    if "num_heads" not in change:
        assert sum(p.numel() for p in changed.parameters()) != sum(p.numel() for p in model().parameters())


def test_wrong_options():
    allowed = "allowed for a decoder: causal_eva, performer, ra, softmax"
    with pytest.raises(ValueError, match=f"attention: got 'eva', {allowed}"):
        model({"name": "eva"})
    with pytest.raises(ValueError, match="attention: got 'sotfmax' .did you mean 'softmax'.*allowed: bigbird"):
        model({"name": "sotfmax"})
    for change in ({"dropout": 1.0}, {"depth": 0}, {"context": 0}):
        with pytest.raises(ValueError, match="dropout, length, depth: got"):
            model(**change)


def test_blocks_without_causality_see_everything():
    torch.manual_seed(0)
    blocks, x = Blocks({"name": "softmax"}, length=6, **SIZES), torch.randn(1, 6, 16)
    changed = x.clone()
    changed[:, 5, 0] += 1
    assert (blocks(changed) - blocks(x)).abs().amax(dim=-1).min() > 1e-6


# Perplexity and generation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [0, 3, 11])
@pytest.mark.parametrize("count", [13, 14, 40])
def test_every_token_is_scored_once_with_enough_before_it(context, count):
    """Against a window for each token, found by hand."""
    net, tokens = model(), some_tokens(count).numpy()
    found = surprise(net, tokens, least_context=context, batch_size=2)
    starts = window_starts(count, 12, context)
    assert starts[0] == 0 and starts[-1] == count - 13 and len(set(starts)) == len(starts)
    for place in range(1, count):
        start = next(start for start in starts if start + 12 >= place)  # the first window that reaches it
        assert start == 0 or place - 1 - start >= context
        with torch.no_grad():
            scores = net.logits(torch.as_tensor(tokens[start:place])[None])[0, -1]
        assert found[place - 1].item() == pytest.approx(-scores.log_softmax(dim=-1)[tokens[place]].item(), rel=1e-5)


def test_wrong_contexts():
    for context in (-1, 12):
        with pytest.raises(ValueError, match=f"contexts: got {context}, allowed: 0 to 11"):
            window_starts(100, 12, context)
    with pytest.raises(ValueError, match="got a test part of 12 tokens, allowed: more than the context of 12"):
        window_starts(12, 12, 0)


def test_bits_a_byte_and_perplexity():
    """A model that knows nothing needs log2 V bits a token; bytes are counted, not tokens."""
    tokens = learn_tokens("bpe", [TEXT * 20], size=280)
    net = model(vocabulary=tokens.size).double()
    torch.nn.init.zeros_(net.embedding.tokens.weight)
    test = tokens.encode(TEXT * 3)
    (found,) = measure(net, test, tokens, [4], "cpu")
    size = len(tokens.decode(test[1:]).encode())
    assert found["perplexity"] == pytest.approx(tokens.size, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx((len(test) - 1) * math.log2(tokens.size) / size, rel=1e-5)


def test_greedy_generation_goes_beyond_the_context():
    """Each token is the likeliest one, after all before it or, once they are too many, after the later ones."""
    net, prompt = model(), [1, 2, 3]
    drawn = net.generate(prompt, 30, temperature=0)
    tokens, first = list(prompt), 0
    for token in drawn:
        if len(tokens) - first > 12:
            first = len(tokens) - 6
        with torch.no_grad():
            assert token == net.logits(torch.tensor([tokens[first:]]))[0, -1].argmax()
        tokens.append(token)
    long = some_tokens(30).tolist()
    assert net.generate(long, 4, temperature=0) == net.generate(long[-12:], 4, temperature=0)


def test_sampling():
    net = model()
    drawn = [net.generate([1], 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    scores, generator = torch.tensor([0.0, 1.0, 2.0]), torch.Generator().manual_seed(0)
    for temperature in (0.5, 2.0):
        counts = np.bincount([draw(scores, temperature, generator) for _ in range(4000)], minlength=3) / 4000
        np.testing.assert_allclose(counts, (scores / temperature).softmax(dim=0), atol=0.03)
    for prompt, temperature in (([], 1.0), ([1], -1.0)):
        with pytest.raises(ValueError, match="prompt, temperature: got"):
            net.generate(prompt, 1, temperature=temperature)
