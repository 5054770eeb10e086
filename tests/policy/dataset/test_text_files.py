"""Text files that are none, at every place that reads text: one line that names the file; nothing is skipped unsaid."""

import itertools

import pytest
from door import door

from policy.dataset.text import tokens
from policy.dataset.text.corpus import read_text, text_parts
from policy.dataset.text.pairs import read_pairs
from policy.dataset.text.tokens import learn_tokens

GOOD = "One line.\nAnother line.\n" * 30
BAD = {
    "UTF-16": GOOD.encode("utf-16"),
    "UTF-16 without a mark": GOOD.encode("utf-16-le"),
    "UTF-32": GOOD.encode("utf-32"),
    "Latin-1": f"{GOOD}é".encode("latin-1"),
    "zeros": bytes(1000),
    "ends in zeros": GOOD.encode() + bytes(100),
    "a picture": b"\x89PNG\r\n\x1a\n\x00\x00",
    "empty": b"",
    "blank": b"\n  \n",
    "only a mark": b"\xef\xbb\xbf",
}


def whole_file(folder, bad):
    text_parts(bad)


def one_of_several(folder, bad):
    (folder / "a.txt").write_text(GOOD)
    text_parts(folder)


def one_of_three_parts(folder, bad):
    for part in ("train", "valid"):
        (folder / f"{part}.txt").write_text(GOOD)
    bad.rename(folder / "bad.test.txt")
    text_parts(folder)


def source_of_pairs(folder, bad):
    (folder / "good").write_text(GOOD)
    read_pairs(bad, folder / "good")


def target_of_pairs(folder, bad):
    (folder / "good").write_text(GOOD)
    read_pairs(folder / "good", bad)


READERS = (whole_file, one_of_several, one_of_three_parts, source_of_pairs, target_of_pairs)


@pytest.mark.parametrize(("read", "kind"), itertools.product(READERS, BAD))
def test_files_that_are_no_text_are_named(tmp_path, read, kind):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(BAD[kind])
    with pytest.raises(ValueError, match=r"bad(\.test)?\.txt: got|source, target: got") as error:
        read(tmp_path, bad)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("task", "options"), [("language", ["text={bad}"]), ("translation", ["source={bad}", "target={bad}"])]
)
def test_training_says_it_in_one_line(tmp_path, capsys, task, options):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(BAD["UTF-16"])
    with pytest.raises(SystemExit):
        door(task, *(option.format(bad=bad) for option in options), f"output={tmp_path}/run")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "bad.txt: got byte" in line


def test_files_that_cannot_be_held_are_refused(tmp_path):
    with open(tmp_path / "huge.txt", "wb") as file:
        file.truncate(2**40)  # takes no room
    (tmp_path / "folder").mkdir()
    for path, error in (("huge.txt", ValueError), ("folder", ValueError), ("missing.txt", FileNotFoundError)):
        with pytest.raises(error, match=path):
            read_text(tmp_path / path)


@pytest.mark.parametrize("text", ["ab " * 400_000, "x" * 200_000], ids=["long line", "long word"])
def test_one_very_long_line(text):
    """Byte pairs would take hours or gigabytes for it; bytes take any."""
    with pytest.raises(ValueError, match="line of .*allowed: .*tokens=byte"):
        learn_tokens("bpe", [text], size=300)
    with pytest.raises(ValueError, match="line of .*allowed: .*tokens=byte"):
        learn_tokens("bpe", [GOOD], size=300).encode(GOOD + text)
    assert len(learn_tokens("byte", [text], size=300).encode(text)) == len(text)


def test_long_texts_are_encoded_in_chunks(monkeypatch):
    whole = learn_tokens("bpe", [GOOD], size=300)
    expected = whole.encode(GOOD).tolist()
    monkeypatch.setattr(tokens, "CHUNK", 30)
    assert whole.encode(GOOD).tolist() == expected


def test_what_is_left_out_is_said(tmp_path):
    for name in ("b.txt", "A.TXT", "notes.pdf", ".hidden"):
        (tmp_path / name).write_text(GOOD)
    (tmp_path / "more").mkdir()
    with pytest.warns(UserWarning, match="2 files or folders not used: more, notes.pdf"):
        assert "".join(text_parts(tmp_path).values()) == f"{GOOD}\n{GOOD}"
    (tmp_path / "one").write_text("a\n\nc\n")
    (tmp_path / "other").write_text("x\ny\nz\n")
    with pytest.warns(UserWarning, match="1 of 3 pairs"):
        assert read_pairs(tmp_path / "one", tmp_path / "other") == [("a", "x"), ("c", "z")]
