"""Text to numbers and back: bytes, or byte pairs that are learned from text."""

import numpy as np
from tqdm import tqdm

from policy.files import write_whole
from policy.registry import choose

KINDS = ("byte", "bpe")
CHUNK = 2_000_000  # characters that are encoded at a time, for which the library needs about 250 bytes each
LONGEST_LINE, LONGEST_WORD = 1_000_000, 100_000  # characters; byte pairs of longer words take hours


class ByteTokens:
    """The bytes of UTF-8."""

    size = 256

    def encode(self, text):
        """(n,) uint8."""
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, tokens):
        """The text of ``tokens``; bytes that are no UTF-8 become a question mark."""
        return bytes(int(token) for token in tokens).decode(errors="replace")

    def count_bytes(self, tokens):
        """Bytes of text that ``tokens`` stand for."""
        return len(tokens)

    def save(self, run_dir):
        """Nothing to keep."""


class BytePairTokens:
    """Byte-level byte-pair encoding (arXiv 1508.07909, section 3.2), by the library ``tokenizers``."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size()

    @classmethod
    def learn(cls, texts, size):
        """At most ``size`` tokens, the 256 bytes among them, from a list of ``texts``; ValueError for too few."""
        if size <= 256:
            raise ValueError(f"vocabulary: got {size}, allowed: above 256, the number of bytes")
        library = _library()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        lines = (line for text in texts for line in _lines(text))
        tokenizer.train_from_iterator(
            tqdm(lines, desc="byte pairs", unit="line", leave=False, dynamic_ncols=True), trainer
        )
        return cls(tokenizer)

    def encode(self, text):
        """(n,) uint16 or uint32."""
        parts, chunks = [], list(_chunks(_lines(text)))
        dtype = np.uint16 if self.size <= 1 << 16 else np.uint32
        for lines in tqdm(chunks, desc="encoding", leave=False, disable=len(chunks) < 10, dynamic_ncols=True):
            found = self.tokenizer.encode_batch(lines)
            parts.append(np.array([number for line in found for number in line.ids], dtype))
        return np.concatenate(parts or [np.empty(0, dtype)])

    def decode(self, tokens):
        """The text of ``tokens``."""
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)

    def count_bytes(self, tokens):
        """Bytes of text that ``tokens`` stand for: the library writes each byte as one character."""
        lengths = np.zeros(self.size, np.int64)
        for text, number in self.tokenizer.get_vocab().items():
            lengths[number] = len(text)
        return int(lengths[tokens].sum())

    def save(self, run_dir):
        """Write tokens.json, in the library's own format, whole or not at all."""
        write_whole(run_dir / "tokens.json", self.tokenizer.to_str())


def _lines(text):
    """The lines of ``text``; ValueError for lines and words that byte pairs have no time for."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if len(line) > LONGEST_LINE or len(line) > LONGEST_WORD < max(map(len, line.split()), default=0):
            allowed = f"{LONGEST_LINE:,} in words of {LONGEST_WORD:,}, or tokens=byte"
            raise ValueError(f"tokens=bpe: got a line of {len(line):,} characters (line {number}), allowed: {allowed}")
    return lines


def _chunks(lines):
    """Lists of ``lines`` in order, each of about CHUNK characters."""
    chunk, size = [], 0
    for line in lines:
        chunk.append(line)
        size += len(line)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def learn_tokens(kind, texts, *, size):
    """Tokens of a ``kind`` for ``texts``; size: most tokens of "bpe". ValueError for an unknown kind."""
    return ByteTokens() if choose("tokens", kind, KINDS) == "byte" else BytePairTokens.learn(texts, size)


def load_tokens(kind, run_dir):
    """The tokens of ``kind`` that a run saved; FileNotFoundError where its tokens.json is gone."""
    if kind == "byte":
        return ByteTokens()
    path = run_dir / "tokens.json"
    if not path.is_file():
        raise FileNotFoundError(f"tokens: got {run_dir} without tokens.json, allowed: the folder of a run")
    library = _library()
    try:
        return BytePairTokens(library.Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: got a damaged file ({error}), allowed: tokens.json of a run") from None


def _library():
    try:
        import tokenizers
    except ImportError:
        raise ImportError('tokens=bpe needs the package tokenizers: pip install -e ".[language]"') from None
    return tokenizers
