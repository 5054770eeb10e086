"""Pairs of sentences in two languages: from two files or the embedded ones, cut into parts, as padded batches."""

import lzma
import warnings
from pathlib import Path

import numpy as np
from tqdm import tqdm

from policy.dataset.text.corpus import read_text

# Instructions to a robot at a table, English and German. A grammar of both languages wrote them once.
EMBEDDED = Path(__file__).with_name("instructions.tsv.xz")


def embedded_pairs(count, *, seed):
    """``count`` of the embedded [(English, German)], all different; ``seed`` chooses them where fewer are asked for.

    Raises ValueError for more than there are.
    """
    lines = lzma.decompress(EMBEDDED.read_bytes()).decode().splitlines()
    if not 1 <= count <= len(lines):
        raise ValueError(
            f"pairs: got {count}, allowed: at least 1 and, without source and target, at most {len(lines)}"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(lines))[:count])
    return [tuple(lines[number].split("\t")) for number in chosen]


def read_pairs(source, target):
    """[(source, target)] of the lines of two UTF-8 files; a warning counts the pairs with an empty side, left out.

    Raises OSError, or ValueError for files that do not have the same number of lines or have none.
    """
    lines = [read_text(path).removesuffix("\n").split("\n") for path in (source, target)]
    if len(lines[0]) != len(lines[1]):
        raise ValueError(f"source, target: got {len(lines[0])} and {len(lines[1])} lines, allowed: the same number")
    pairs = [(one.strip(), other.strip()) for one, other in zip(*lines, strict=True)]
    full = [pair for pair in pairs if all(pair)]
    if not full:
        raise ValueError(f"source, target: got {source} and {target} without a pair, allowed: at least one")
    if len(full) < len(pairs):
        warnings.warn(f"{source}: {len(pairs) - len(full):,} of {len(pairs):,} pairs have an empty side", stacklevel=2)
    return full


def open_pairs(source, target, *, count, seed):
    """Pairs of two files, or ``count`` of the embedded ones if both are None; ValueError for one of them alone."""
    if (source is None) != (target is None):
        raise ValueError(f"source, target: got {source} and {target}, allowed: two files, or neither")
    return embedded_pairs(count, seed=seed) if source is None else read_pairs(source, target)


def split_pairs(pairs, *, held_out, seed):
    """{"train", "valid", "test"}: ``held_out`` random pairs for each of the last two, none of whose sides is repeated.

    A pair whose source or target stood in a pair before is dropped first, so that no sentence is in two parts.
    Raises ValueError where nothing is left to train on.
    """
    seen, unique = (set(), set()), []
    for pair in pairs:
        if not any(side in known for side, known in zip(pair, seen, strict=True)):
            unique.append(pair)
        for side, known in zip(pair, seen, strict=True):
            known.add(side)
    if held_out < 1 or len(unique) <= 2 * held_out:
        raise ValueError(f"held_out: got {held_out}, allowed: 1 to below half of the {len(unique)} different pairs")
    order = np.random.default_rng(seed).permutation(len(unique))
    shuffled = [unique[number] for number in order]
    return {
        "train": shuffled[2 * held_out :],
        "valid": shuffled[:held_out],
        "test": shuffled[held_out : 2 * held_out],
    }


def _bar(pairs, description):
    """A progress bar over many ``pairs``."""
    few = len(pairs) < 20_000
    return tqdm(pairs, desc=description, unit="pair", leave=False, disable=few, dynamic_ncols=True)


class PairBatches:
    """Pairs as tokens: batches of {"source": (B, S), "target": (B, T+1)}, padded, ``texts`` being the pairs themselves.

    Source: tokens and the end, always S = source_length wide; target: start, tokens, end, as wide as the longest of the
    batch needs. end, start, padding: the numbers after those of ``tokens``. Pairs with more tokens than source_length
    or target_length hold with their end are dropped, ``dropped`` counts them; ValueError where none is left.
    """

    def __init__(self, pairs, tokens, *, source_length, target_length):
        self.source_length = source_length
        self.end, self.start, self.padding = range(tokens.size, tokens.size + 3)
        encoded = [tuple(tokens.encode(side).astype(np.int64) for side in pair) for pair in _bar(pairs, "encoding")]
        fits = [len(one) < source_length and len(other) < target_length for one, other in encoded]
        self.texts = [pair for pair, fit in zip(pairs, fits, strict=True) if fit]
        self.pairs = [pair for pair, fit in zip(encoded, fits, strict=True) if fit]
        self.dropped = len(pairs) - len(self.pairs)
        if not self.pairs:
            shortest = min(max(len(one), len(other)) for one, other in encoded) + 1 if encoded else 0
            raise ValueError(
                f"source_length, target_length: got {source_length}, {target_length}, allowed: at least {shortest}"
            )

    def __len__(self):
        return len(self.pairs)

    def batch(self, indices):
        """{"source": (B, S) int64, "target": (B, T+1) int64} of these pairs."""
        chosen = [self.pairs[index] for index in indices]
        longest = max(len(target) for _, target in chosen) + 2
        source = np.full((len(chosen), self.source_length), self.padding)
        target = np.full((len(chosen), longest), self.padding)
        for row, (one, other) in enumerate(chosen):
            source[row, : len(one) + 1] = [*one, self.end]
            target[row, : len(other) + 2] = [self.start, *other, self.end]
        return {"source": source, "target": target}
