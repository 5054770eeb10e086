"""Lists of videos and their labels; the frames of a clip."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.dataset.video.dataset import open_videos, read_csv
from policy.dataset.video.decode import clip_positions


@pytest.mark.parametrize(
    "line, name, label",
    [("a.mp4 3", "a.mp4", 3), ("a.mp4\t3", "a.mp4", 3), ("  a.mp4   3  ", "a.mp4", 3), ("a.mp4,3", "a.mp4", 3),
     ("a.mp4 , 3", "a.mp4", 3), ("a.mp4,poses/a.npy,3", "a.mp4", 3), ("two words.mp4 3", "two words.mp4", 3),
     ("two words.mp4,3", "two words.mp4", 3), ("two words 7,poses of a.npy,3", "two words 7", 3),
     ("a,b.mp4 3", "a,b.mp4", 3), ('"a,b.mp4",3', "a,b.mp4", 3), ("a.mp4 0", "a.mp4", 0)],
)  # fmt: skip
def test_lines_of_a_list(tmp_path, line, name, label):
    (tmp_path / name).touch()
    (tmp_path / "list.csv").write_text(f"{line}\n")
    paths, labels = read_csv(tmp_path / "list.csv")
    assert paths == [str(tmp_path / name)] and labels.tolist() == [label] and labels.dtype == np.int64


def test_empty_lines_comments_and_headers_are_left_out(tmp_path):
    (tmp_path / "a.mp4").touch()
    for header in ("path,label", "Path, Label", "path,pose,label", "path label", "Video\tClass", "filename,label_id"):
        (tmp_path / "list.csv").write_text(f"\ufeff\n# ours\n{header}\n\na.mp4,1\n   \n#a.mp4,x\na.mp4,2\n", "utf-8")
        assert read_csv(tmp_path / "list.csv")[1].tolist() == [1, 2]
    (tmp_path / "list.csv").write_text("a.mp4,1\npath,label\n")
    with pytest.raises(ValueError, match="list.csv:2"):
        read_csv(tmp_path / "list.csv")


def test_lines_and_lists_that_say_no_label_are_named(tmp_path):
    (tmp_path / "a.mp4").touch()
    lines = ("a.mp4", "a.mp4,", "a.mp4 cat", "a.mp4,cat", "a.mp4 1.5", "a.mp4 -1", "a.mp4,-1", "7", "a,b,c,d")
    files = {f"a.mp4 1\n\n{line}\n".encode(): f"list.csv:3: got '{line}'" for line in lines}
    for content, place in {
        **files,
        b"": "list.csv",
        b"# only this\n\n": "list.csv",
        b"\xff\xfe\x00": "list.csv",
    }.items():
        (tmp_path / "list.csv").write_bytes(content)
        with pytest.raises(ValueError, match=place):
            read_csv(tmp_path / "list.csv")
    with pytest.raises(FileNotFoundError, match="none.csv"):
        read_csv(tmp_path / "none.csv")


def test_paths_start_at_the_list_or_at_root(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.mp4").touch()
    (tmp_path / "here/list.csv").write_text(f"a.mp4 0\n{tmp_path}/there/a.mp4 1\n")
    here, there = str(tmp_path / "here/a.mp4"), str(tmp_path / "there/a.mp4")
    assert read_csv(tmp_path / "here/list.csv")[0] == [here, there]
    assert read_csv(tmp_path / "here/list.csv", root=tmp_path / "there")[0] == [there, there]


def test_missing_videos_are_counted_and_named(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "list.csv").write_text("".join(f"missing{n} 0\n" for n in range(7)) + "a.mp4 5\n")
    with pytest.warns(UserWarning, match="7 of 8 .*missing0, .*missing4") as warned:
        paths, labels = read_csv(tmp_path / "list.csv")
    assert len(warned) == 1 and "missing5" not in str(warned[0].message)
    assert paths == [str(tmp_path / "a.mp4")] and labels.tolist() == [5]
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(FileNotFoundError, match="8 of 8"):
        read_csv(tmp_path / "list.csv")


def test_a_folder_of_lists(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "train.csv").write_text("a.mp4 0\na.mp4 2\n")
    (tmp_path / "val.csv").write_text("a.mp4 1\n")
    assert open_videos(tmp_path, "train")[1].tolist() == [0, 2]
    assert open_videos(tmp_path, "test")[1].tolist() == [1]  # val.csv, for want of test.csv
    (tmp_path / "test.csv").write_text("a.mp4 0\na.mp4 1\na.mp4 1\n")
    paths, labels, classes = open_videos(tmp_path, "test")
    assert paths == [str(tmp_path / "a.mp4")] * 3 and labels.tolist() == [0, 1, 1] and classes == ["0", "1", "2"]
    assert open_videos(tmp_path, "train", num_classes=5)[2] == ["0", "1", "2", "3", "4"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.mp4").touch()
    assert open_videos(tmp_path, "train", root=tmp_path / "elsewhere")[0] == [str(tmp_path / "elsewhere/a.mp4")] * 2
    with pytest.raises(ValueError, match="train.csv:2.*label"):
        open_videos(tmp_path, "train", num_classes=2)
    with pytest.raises(ValueError, match="split"):
        open_videos(tmp_path, "val")
    (tmp_path / "test.csv").write_text("a.mp4 3\n")
    with pytest.raises(ValueError, match="test.csv:1.*label"):
        open_videos(tmp_path, "test")


def test_names_of_classes(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "train.csv").write_text("a.mp4 0\na.mp4 2\n")
    (tmp_path / "classes.txt").write_text("make tea\nsit down\nwalk\n\n")
    assert open_videos(tmp_path, "train", num_classes=3)[2] == ["make tea", "sit down", "walk"]
    with pytest.raises(ValueError, match="num_classes"):
        open_videos(tmp_path, "train", num_classes=4)
    for text, place in (
        ("walk\n\nrun\n", "classes.txt"),
        ("walk\nwalk\nrun\n", "classes.txt"),
        ("walk\nrun\n", "train.csv:2.*label"),
    ):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(ValueError, match=place):
            open_videos(tmp_path, "train")


NAMED = {
    "commas": ("a.mp4,{}", ("make tea", "sit", "take 2")),
    "poses": ("a.mp4,a.npy,{}", ("make tea", "sit", "$1")),
    "spaces": ("a.mp4 {}", ("cat", "dog", "é")),
    "header": ("path label\na.mp4 {}", ("cat", "dog", "数")),
}


@pytest.mark.parametrize("kind", NAMED)
def test_labels_may_be_names(tmp_path, kind):
    """The sorted names of train.csv are the classes of training and of testing alike."""
    (tmp_path / "a.mp4").touch()
    line, (first, second, third) = NAMED[kind]
    head, line = line.rpartition("\n")[0], line.rpartition("\n")[2]
    (tmp_path / "train.csv").write_text("\n".join([head, *(line.format(name) for name in (third, first, second))]))
    (tmp_path / "test.csv").write_text("\n".join([head, line.format(second)]))
    classes = sorted((first, second, third))
    for split, labels in (("train", (third, first, second)), ("test", (second,))):
        _, found, names = open_videos(tmp_path, split)
        assert names == classes and [names[label] for label in found] == list(labels)
    (tmp_path / "test.csv").write_text(line.format(first) + "\n" + line.format("other"))
    with pytest.raises(ValueError, match="test.csv:2: got label 'other'"):
        open_videos(tmp_path, "test")
    with pytest.raises(ValueError, match="num_classes: got 4"):
        open_videos(tmp_path, "train", num_classes=4)
    (tmp_path / "test.csv").write_text("a.mp4,0")  # which of the names would it be?
    with pytest.raises(ValueError, match="test.csv:1: got label '0'"):
        open_videos(tmp_path, "test")
    (tmp_path / "classes.txt").write_text("\n".join((second, third, first)))
    assert open_videos(tmp_path, "train")[1].tolist() == [1, 2, 0]
    assert open_videos(tmp_path, "test")[1].tolist() == [0]


@pytest.mark.parametrize("lines", [["a.mp4 1", "a.mp4 cat"], ["a.mp4 cat", "a.mp4 1"], ["a.mp4,cat", "a.mp4 dog"]])
def test_lists_keep_to_one_kind_of_label(tmp_path, lines):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "train.csv").write_text("\n".join(lines))
    with pytest.raises((ValueError, FileNotFoundError), match=r"train\.csv"):
        open_videos(tmp_path, "train")


BAD = {
    "large label": b"a.mp4 1\na.mp4 500000000\n",
    "larger label": b"a.mp4 1\na.mp4 " + b"9" * 10_000,
    "long line": b"a.mp4 1\n" + b"a" * 10**7,
    "long names": b"a.mp4 cat\n" + b"a," * 10**6 + b"1",
    "zeros": bytes(1000),
    "some zeros": b"a.mp4 1\n" + bytes(100),
    "UTF-16": "a.mp4 1\n".encode("utf-16"),
    "UTF-16 without a mark": "a.mp4 1\n".encode("utf-16-le"),
    "Latin-1": "é.mp4 1\n".encode("latin-1"),
    "empty": b"",
    "blank": b" \n\n",
}


NO_TEXT = ("zeros", "some zeros", "UTF-16", "UTF-16 without a mark", "Latin-1", "empty", "blank")
FILES = [(name, kind) for name in ("train.csv", "test.csv") for kind in BAD]


@pytest.mark.parametrize(("name", "kind"), [*FILES, *(("classes.txt", kind) for kind in NO_TEXT)])
def test_lists_that_are_none_are_refused_in_one_short_line(tmp_path, name, kind):
    (tmp_path / "a.mp4").touch()
    for other in ("train.csv", "test.csv"):
        (tmp_path / other).write_text("a.mp4 1")
    (tmp_path / name).write_bytes(BAD[kind])
    with pytest.raises(ValueError, match=name) as error:
        open_videos(tmp_path, "test")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("num_classes", [0, -1, 2**40])
def test_impossible_numbers_of_classes(tmp_path, num_classes):
    (tmp_path / "train.csv").write_text("a.mp4 1")
    with pytest.raises(ValueError, match="num_classes"):
        open_videos(tmp_path, "train", num_classes=num_classes)


# Which frames --------------------------------------------------------------------------------------------------------

CASES = {"count": st.integers(1, 400), "frames": st.integers(1, 20)}


@settings(deadline=None)
@given(**CASES, seed=st.integers(0, 100))
def test_uniform_sampling_takes_a_frame_of_each_segment(count, frames, seed):
    (drawn,) = clip_positions(count, frames=frames, sampling="uniform", rng=np.random.default_rng(seed))
    (middle,) = clip_positions(count, frames=frames, sampling="uniform")
    segments = [(Fraction(count * i, frames), Fraction(count * (i + 1), frames)) for i in range(frames)]
    for position, (start, end) in zip(drawn, segments, strict=True):
        assert start - 1 < position < end  # a frame lasts from its number to the next one
    assert middle.tolist() == [int((start + end) / 2) for start, end in segments]


def test_uniform_sampling_reaches_every_frame_and_its_views_interleave():
    rng = np.random.default_rng(0)
    drawn = np.concatenate([clip_positions(12, frames=3, sampling="uniform", rng=rng) for _ in range(200)])
    assert [sorted(set(column)) for column in drawn.T.tolist()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    views = clip_positions(12, frames=3, sampling="uniform", views=2)
    assert views.tolist() == [[1, 5, 9], [3, 7, 11]]


@settings(deadline=None)
@given(**CASES, stride=st.integers(1, 40), views=st.integers(2, 6), seed=st.integers(0, 100))
def test_strided_sampling_keeps_its_stride_and_repeats_the_last_frame(count, frames, stride, views, seed):
    options = {"frames": frames, "sampling": "strided", "stride": stride}
    span = (frames - 1) * stride + 1
    latest = max(count - span, 0)
    (drawn,) = clip_positions(count, **options, rng=np.random.default_rng(seed))
    (middle,) = clip_positions(count, **options)
    spread = clip_positions(count, **options, views=views)
    for clip in (drawn, middle, *spread):
        assert 0 <= clip[0] <= latest
        assert clip.tolist() == [min(clip[0] + n * stride, count - 1) for n in range(frames)]
    assert middle[0] == latest // 2
    assert spread[:, 0].tolist() == [latest * view // (views - 1) for view in range(views)]


def test_strided_sampling_starts_anywhere():
    rng = np.random.default_rng(0)
    options = {"frames": 3, "sampling": "strided", "stride": 4, "rng": rng}
    assert {int(clip_positions(14, **options)[0, 0]) for _ in range(200)} == {0, 1, 2, 3, 4, 5}
    assert clip_positions(6, **options).tolist() == [[0, 4, 5]]
