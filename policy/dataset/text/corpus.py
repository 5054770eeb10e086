"""Text for language models: a file, a folder such as WikiText-103, or what ships with Python, cut into windows."""

import re
import warnings
from pathlib import Path

import numpy as np

PARTS = {"train": {"train"}, "valid": {"valid", "validation", "val", "dev"}, "test": {"test"}}
ENDINGS = (".txt", ".raw", ".tokens")
MOST_BYTES = 10**9  # of a file, which is read as a whole
SHOWN = 5  # file names in a message that could list thousands
VALID_FROM, TEST_FROM = 0.9, 0.95  # shares of a text where its other parts begin


def read_text(path):
    """The UTF-8 text of a file.

    Raises FileNotFoundError, OSError, or ValueError for more than MOST_BYTES and, with the place of the first one, for
    bytes that are no text (zeros are UTF-16 or a file that was never written).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist, allowed: a file of UTF-8 text")
    if not path.is_file():
        raise ValueError(f"{path}: got no file, allowed: a file of UTF-8 text")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: got {path.stat().st_size:,} bytes, allowed: at most {MOST_BYTES:,}")
    content = path.read_bytes()
    try:
        wrong, text = content.find(0), content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = error.start
    if wrong >= 0:
        raise ValueError(f"{path}: got byte 0x{content[wrong]:02x} at place {wrong}, allowed: UTF-8 text")
    return text


def embedded_text():
    """Python's own help texts, English (PSF licence): 466 kB with Python 3.11, more with later ones."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def text_parts(source):
    """{"train", "valid", "test"} of texts that share nothing.

    source: None for ``embedded_text``, a file, or a folder of .txt, .raw or .tokens files. Where names of files say so
    (wiki.train.tokens) these are the parts; else they are the first 90 %, the next 5 % and the last 5 % of the text. A
    warning names what else lies in the folder. Raises FileNotFoundError, or ValueError for a folder with some parts
    only and for an empty text.
    """
    if source is None:
        return _cut(embedded_text())
    source = Path(source)
    if not source.is_dir():
        return _cut(_some_text(source))
    shown = sorted(file for file in source.iterdir() if not file.name.startswith("."))
    files = [file for file in shown if file.suffix.lower() in ENDINGS and file.is_file()]
    if not files:
        raise FileNotFoundError(f"text: got {source}, allowed: a file, or a folder of {', '.join(ENDINGS)} files")
    if unused := [file.name for file in shown if file not in files]:
        names = ", ".join(unused[:SHOWN]) + (", ..." if len(unused) > SHOWN else "")
        warnings.warn(f"{source}: {len(unused):,} files or folders not used: {names}", stacklevel=2)
    named = {part: [file for file in files if _words(file) & words] for part, words in PARTS.items()}
    if not any(named.values()):
        return _cut("\n".join(map(_some_text, files)))
    missing = [part for part, found in named.items() if not found]
    if missing:
        raise ValueError(
            f"text: got {source} without a file named {' and '.join(missing)}, allowed: train, valid and test, or none"
        )
    for file in files:
        parts = [part for part, found in named.items() if file in found]
        if len(parts) != 1:
            raise ValueError(f"text: got {file.name} for {' and '.join(parts) or 'no part'}, allowed: one part a file")
    return {part: "\n".join(map(_some_text, found)) for part, found in named.items()}


def _words(file):
    return set(re.split(r"[._-]", file.name.lower()))


def _some_text(file):
    text = read_text(file)
    if not text.strip():
        raise ValueError(f"{file}: got no text, allowed: some")
    return text


def _cut(text):
    cuts = [0, int(len(text) * VALID_FROM), int(len(text) * TEST_FROM), len(text)]
    return {part: text[start:end] for part, start, end in zip(PARTS, cuts, cuts[1:], strict=False)}


class TokenWindows:
    """Windows of ``length`` + 1 of the tokens (n,), one from every ``stride``-th on; {"tokens": (B, length+1)}."""

    def __init__(self, tokens, *, length, stride):
        if length < 1 or stride < 1:
            raise ValueError(f"context, stride: got {length} and {stride}, allowed: 1 and more")
        if len(tokens) <= length:
            raise ValueError(f"text: got a part of {len(tokens)} tokens, allowed: more than the context of {length}")
        self.tokens, self.length, self.stride = tokens, length, stride

    def __len__(self):
        return (len(self.tokens) - self.length - 1) // self.stride + 1

    def batch(self, indices):
        """{"tokens": (B, length+1) int64} of these windows."""
        places = np.asarray(indices)[:, None] * self.stride + np.arange(self.length + 1)
        return {"tokens": self.tokens[places].astype(np.int64)}
