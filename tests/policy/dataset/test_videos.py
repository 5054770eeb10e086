"""Videos for classification: lists, exact frames, sampling, crops, and files that cannot be read.

The videos are made here: a frame's brightness tells its number, or a pixel's colour where it is.
"""

import os
import random
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from policy.dataset.video import dataset as videos
from policy.dataset.video import decode as video_decode
from policy.dataset.video.dataset import VideoDataset, open_videos, read_csv, scale_short_side, spatial_crops
from policy.dataset.video.decode import clip_positions, declared_size, frame_index, read_clip

COUNT = 48


def numbered(number, height=32, width=48):
    """A grainy picture whose mean is 8 + 4 * ``number``."""
    grain = np.random.default_rng(0).integers(-8, 9, (height, width, 1))
    return np.broadcast_to(8 + 4 * number + grain, (height, width, 3)).astype(np.uint8)


def places(_, height=64, width=96):
    """A picture whose red is twice the column and whose green is twice the row."""
    row, column = np.mgrid[:height, :width]
    return np.stack([2 * column, 2 * row, np.zeros_like(row)], axis=-1).astype(np.uint8)


def numbers(clip):
    """Frame numbers (...) of pictures (..., h, w, 3) of ``numbered``, or (..., 3, h, w) in [-1, 1]."""
    if isinstance(clip, torch.Tensor):
        clip = ((clip + 1) * 127.5).movedim(-3, -1).numpy()
    return np.round((clip.mean((-3, -2, -1)) - 8) / 4).astype(int)


ENCODERS = {  # pixels, quality, B-frames
    "libx264": ("yuv444p", {"crf": "1"}, 3),
    "libvpx-vp9": ("yuv420p", {"deadline": "realtime"}, 0),
    "mpeg4": ("yuv420p", {"sc_threshold": "1000000000"}, 2),
    "mpeg2video": ("yuv420p", {"sc_threshold": "1000000000"}, 2),
    "mjpeg": ("yuvj420p", {}, 0),
    "flv": ("yuv420p", {}, 0),
}


def write_video(path, count=COUNT, *, picture=numbered, codec="libx264", times=None, container=None, **options):
    """Encode pictures number 0 to ``count`` - 1, with B-frames and at least every twelfth a keyframe where possible."""
    pixels, quality, b_frames = ENCODERS[codec]
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=24, options={**quality, **options})
        stream.pix_fmt, stream.bit_rate = pixels, 4_000_000
        stream.height, stream.width = picture(0).shape[:2]
        stream.codec_context.gop_size = 12
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.time_base = Fraction(1, 240)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts = number * 10 if times is None else times[number]
            frame.time_base = Fraction(1, 240)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def clips(folder):
    """Four videos of 48, 20, 5 and 1 frames."""
    return [write_video(folder / f"{count}_frames.mp4", count) for count in (48, 20, 5, 1)]


@pytest.fixture(scope="module")
def broken(folder):
    """{what is wrong: path}."""
    whole = write_video(folder / "whole.mp4", container={"movflags": "faststart"})
    paths = {name: folder / f"{name}.mp4" for name in ("cut", "headless", "text", "empty", "no_frames", "gone")}
    content = Path(whole).read_bytes()
    paths["cut"].write_bytes(content[: len(content) * 2 // 3])
    paths["headless"].write_bytes(content[len(content) // 2 :])
    paths["text"].write_text("not a video at all\n" * 50)
    paths["empty"].touch()
    with av.open(str(paths["no_frames"]), "w") as file:
        file.add_stream("libx264", rate=24).width = 32
        file.start_encoding()
    paths["sound"] = folder / "sound.wav"
    with wave.open(str(paths["sound"]), "wb") as file:
        file.setparams((1, 2, 8000, 800, "NONE", ""))
        file.writeframes(bytes(1600))
    return {name: str(path) for name, path in paths.items()}


def dataset(paths, labels=None, **options):
    labels = np.arange(len(paths)) if labels is None else labels
    defaults = {"classes": [f"class {n}" for n in range(len(paths))], "frames": 4, "image_size": 16, "jitter": (16, 20)}
    return VideoDataset(paths, labels, **{**defaults, **options})


# Lists ---------------------------------------------------------------------------------------------------------------


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
    for header in ("path,label", "Path, Label", "path,pose,label"):
        (tmp_path / "list.csv").write_text(f"\ufeff\n# ours\n{header}\n\na.mp4,1\n   \n#a.mp4,x\na.mp4,2\n", "utf-8")
        assert read_csv(tmp_path / "list.csv")[1].tolist() == [1, 2]
    (tmp_path / "list.csv").write_text("a.mp4,1\npath,label\n")
    with pytest.raises(ValueError, match="list.csv:2"):
        read_csv(tmp_path / "list.csv")


@pytest.mark.parametrize("line", ["a.mp4", "a.mp4,", "a.mp4 cat", "a.mp4,cat", "a.mp4 1.5", "a.mp4 -1", "a.mp4,-1", "7", "a,b,c,d"])  # fmt: skip  # noqa: E501
def test_lines_that_say_no_label_are_named(tmp_path, line):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "list.csv").write_text(f"a.mp4 1\n\n{line}\n")
    with pytest.raises(ValueError, match=f"list.csv:3: got '{line}'"):
        read_csv(tmp_path / "list.csv")


def test_lists_that_are_none(tmp_path):
    for content in (b"", b"# only this\n\n", b"\xff\xfe\x00"):
        (tmp_path / "list.csv").write_bytes(content)
        with pytest.raises(ValueError, match="list.csv"):
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


# Exactly these frames ------------------------------------------------------------------------------------------------

IRREGULAR = np.cumsum(np.random.default_rng(0).integers(1, 40, COUNT)).tolist()
FILES = {
    "h264.mp4": {},
    "h264.mkv": {},
    "h264.ts": {},
    "raw.h264": {},
    "open_gop.mp4": {"x264-params": "open-gop=1"},
    "short_gop.mp4": {"x264-params": "keyint=2:bframes=1"},
    "no_keyframes.mp4": {"x264-params": "intra-refresh=1:keyint=12"},
    "irregular.mp4": {"times": IRREGULAR},
    "irregular.mkv": {"times": IRREGULAR},
    "fragments.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4.mkv": {"codec": "mpeg4"},
    "mpeg2.ts": {"codec": "mpeg2video"},
    "mpeg4.ts": {"codec": "mpeg4"},
    "images.avi": {"codec": "mjpeg"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "cannot_seek.swf": {"codec": "flv"},
}


@pytest.fixture(scope="module", params=FILES)
def film(request, folder):
    """(path, frames of a plain decode from first to last)."""
    path = write_video(folder / request.param, **FILES[request.param])
    with av.open(path) as container:
        return path, np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_frames_are_those_of_a_full_decode(film):
    path, whole = film
    assert numbers(whole).tolist() == list(range(COUNT)) and frame_index(path).count == COUNT
    rng = np.random.default_rng(0)
    single = [[n] for n in range(COUNT)]
    for positions in single + [rng.integers(0, COUNT, 6) for _ in range(10)] + [[47, 0, 47, 13, 12, 11], range(COUNT)]:
        clip = read_clip(path, positions)
        assert clip.dtype == np.uint8 and np.array_equal(clip, whole[list(positions)])


def frames_decoded(monkeypatch):
    """A list that gets the keys of all frames which ``read_clip`` decodes from now on."""
    decoded, keep = [], video_decode._keep

    def watched(frames, wanted):
        return keep(((key, decoded.append(key) or frame) for key, frame in frames), wanted)

    monkeypatch.setattr(video_decode, "_keep", watched)
    return decoded


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "mpeg4.mp4", "irregular.mkv"])
def test_decoding_starts_at_the_keyframe_before(folder, monkeypatch, name):
    path = write_video(folder / f"seek_{name}", **FILES[name])
    decoded = frames_decoded(monkeypatch)
    assert numbers(read_clip(path, [1, 40])).tolist() == [1, 40]
    assert len(decoded) <= 2 + 12
    monkeypatch.setattr(video_decode, "_after_seeking", lambda *_: {})  # as where a container cannot seek
    decoded.clear()
    assert numbers(read_clip(path, [1, 40])).tolist() == [1, 40]
    assert len(decoded) == 41


def test_frames_are_counted_once(folder, monkeypatch):
    path = write_video(folder / "counted.avi", **FILES["mpeg4.avi"])
    before = frame_index.cache_info().misses
    for _ in range(3):
        assert frame_index(path).count == COUNT
    assert frame_index.cache_info().misses == before + 1


def test_frames_hidden_by_an_edit_list_do_not_count(folder):
    source, path = write_video(folder / "source.mp4"), folder / "edited.mp4"
    with av.open(source) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.pts, packet.dts = (stamp - 5 * packet.duration for stamp in (packet.pts, packet.dts))
                packet.stream = stream
                new.mux(packet)
    assert frame_index(str(path)).count == COUNT - 5
    assert numbers(read_clip(str(path), [0, 1, 42])).tolist() == [5, 6, 47]


@pytest.mark.parametrize("position", [-1, COUNT])
def test_positions_are_checked(clips, position):
    with pytest.raises(ValueError, match="48_frames.mp4: positions"):
        read_clip(clips[0], [3, position])


@pytest.mark.parametrize("kind", ["cut", "headless", "text", "empty", "no_frames", "gone", "sound"])
def test_files_that_are_no_whole_videos(broken, kind):
    with pytest.raises(ValueError, match=os.path.basename(broken[kind])):
        read_clip(broken[kind], [0])


CUT = {name: FILES[name] for name in ("h264.mp4", "fragments.mp4", "h264.mkv", "mpeg4.avi")}
CUT["faststart.mp4"] = {"container": {"movflags": "faststart"}}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("part", [0.01, 0.3, 0.5, 0.9])
def test_files_that_are_cut_off_are_not_read(tmp_path, name, part):
    path = Path(write_video(tmp_path / name, **CUT[name]))
    content = path.read_bytes()
    assert frame_index(str(path)).count == COUNT
    cut = tmp_path / f"cut_{name}"
    cut.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match=f"cut_{name}"):
        frame_index(str(cut))


def test_size_that_a_file_declares(tmp_path):
    for name in ("h264.mkv", "mpeg4.avi"):
        path = write_video(tmp_path / name, **FILES[name])
        assert declared_size(path) == os.path.getsize(path)
    streamed = write_video(tmp_path / "live.mkv", container={"live": "1"})
    assert declared_size(streamed) == 0 and frame_index(streamed).count == COUNT
    assert declared_size(write_video(tmp_path / "h264.mp4")) == 0


# Pixels --------------------------------------------------------------------------------------------------------------


def test_scaling_is_that_of_pillow():
    rng = np.random.default_rng(0)
    for shape, size, expected in (((30, 47), 16, (16, 25)), ((47, 30), 16, (25, 16)), ((9, 12), 30, (30, 40))):
        image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        ours = scale_short_side(torch.from_numpy(image).permute(2, 0, 1)[None], size)[0]
        assert ours.shape == (3, *expected) and ours.dtype == torch.uint8
        theirs = Image.fromarray(image).resize(expected[::-1], Image.Resampling.BILINEAR)
        assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs)).max() <= 1


def corners(crop):
    """(top, left, scale, mirrored) of crops (..., 3, s, s) in [-1, 1] of ``places``."""
    crop = (crop.double() + 1) * 127.5 / 2
    across, down = crop[..., 0, :, :].mean(-2), crop[..., 1, :, :].mean(-1)
    slope = (across[..., -2] - across[..., 1]) / (crop.shape[-1] - 3)
    left = torch.minimum(across[..., 1], across[..., -2])
    return down[..., 1], left, 1 / slope.abs(), slope < 0


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (40, 40)])
def test_crops_lie_where_they_should(shape):
    clip = torch.from_numpy(places(0, *shape)).permute(2, 0, 1)[None].expand(2, -1, -1, -1)
    rows, columns = (side - 30 for side in shape)
    (middle,) = spatial_crops(clip, 30, 1)
    assert (middle[:, 0, 0, 0] == columns // 2 * 2).all() and (middle[:, 1, 0, 0] == rows // 2 * 2).all()
    three = spatial_crops(clip, 30, 3)
    assert three.shape == (3, 2, 3, 30, 30) and torch.equal(three[1], middle)
    left, top = three[:, 0, 0, 0, 0] // 2, three[:, 0, 1, 0, 0] // 2
    assert left.tolist() == ([0, columns // 2, columns] if columns >= rows else [columns // 2] * 3)
    assert top.tolist() == ([rows // 2] * 3 if columns >= rows else [0, rows // 2, rows])


@pytest.fixture(scope="module")
def landscape(folder):
    return write_video(folder / "places.mp4", 6, picture=places)


def train(data, seeds):
    (batch,) = data.stream([[(0, seed) for seed in seeds]])
    return batch


def test_a_training_clip_is_one_crop_for_all_its_frames(landscape):
    data = dataset([landscape], image_size=48, jitter=(64, 64), frames=3)
    batch = train(data, range(60))
    assert batch["video"].shape == (60, 3, 3, 48, 48) and batch["video"].dtype == torch.float32
    assert batch["label"].dtype == torch.int64 and set(batch) == {"video", "label"}
    assert batch["video"].min() >= -1 and batch["video"].is_contiguous()
    top, left, scale, mirrored = corners(batch["video"])
    for values in (top, left):
        assert (values - values[:, :1]).abs().max() < 1
    assert top.min() < 3 and 14 < top.max() < 18.5 and left.min() < 4 and 44 < left.max() < 50
    assert (scale - 1).abs().max() < 0.05
    assert (mirrored == mirrored[:, :1]).all() and 0.3 < mirrored.float().mean() < 0.7


def test_jitter_scales_training_clips(landscape):
    scale = corners(train(dataset([landscape], image_size=48, jitter=(64, 128), flip=0), range(40))["video"])[2]
    assert 1.0 <= scale.min() + 0.05 < 1.2 and 1.8 < scale.max() < 2.1
    scale = corners(train(dataset([landscape], image_size=48, jitter=None, flip=0), range(5))["video"])[2]
    assert (scale - 48 / 64).abs().max() < 0.05  # None: the short side is image_size


@pytest.mark.parametrize("flip", [0, 1])
def test_flip_is_a_probability(landscape, flip):
    mirrored = corners(train(dataset([landscape], image_size=48, jitter=(64, 64), flip=flip), range(20))["video"])[3]
    assert (mirrored == bool(flip)).all()


def test_evaluation_scales_to_the_smallest_jitter_and_cuts_the_middle(landscape):
    batch = dataset([landscape], image_size=48, jitter=(64, 128), flip=1).batch([0])
    top, left, scale, mirrored = corners(batch["video"])
    assert batch["video"].shape == (1, 1, 4, 3, 48, 48) and not mirrored.any()
    assert (scale - 1).abs().max() < 0.05 and (top - 9).abs().max() < 1 and (left - 25).abs().max() < 1
    scale = corners(dataset([landscape], image_size=48, jitter=None).batch([0])["video"])[2]
    assert (scale - 48 / 64).abs().max() < 0.05


def test_views_are_clips_times_crops(landscape, clips):
    batch = dataset([landscape], image_size=48, jitter=(64, 64), temporal_views=2, spatial_views=3).batch([0])
    assert batch["video"].shape == (1, 6, 4, 3, 48, 48)
    left = corners(batch["video"])[1].mean(-1)[0]
    assert (left - torch.tensor([1.0, 25, 49] * 2)).abs().max() < 1
    options = {"sampling": "strided", "stride": 5, "temporal_views": 3}
    batch = dataset(clips, **options, spatial_views=3).batch([0])
    expected = clip_positions(48, frames=4, sampling="strided", stride=5, views=3)
    assert numbers(batch["video"])[0].tolist() == np.repeat(expected, 3, axis=0).tolist()


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"sampling": "uniform"}, {"sampling": "strided", "stride": 5}])
@pytest.mark.parametrize("frames", [3, 7])
def test_clips_hold_the_sampled_frames(clips, options, frames):
    data = dataset(clips, frames=frames, **options)
    assert (len(data), data.num_classes, data.classes[3], data.labels.tolist()) == (4, 4, "class 3", [0, 1, 2, 3])
    batch = data.batch([2, 0, 3, 1])
    assert batch["label"].tolist() == [2, 0, 3, 1]
    expected = [clip_positions(count, frames=frames, **options)[0].tolist() for count in (5, 48, 1, 20)]
    assert numbers(batch["video"])[:, 0].tolist() == expected
    ((drawn, again),) = [numbers(train(data, [7, 7])["video"])]
    rng = np.random.default_rng([7, 0])
    assert drawn.tolist() == again.tolist() == clip_positions(48, frames=frames, **options, rng=rng)[0].tolist()


REQUESTS = [[(0, 5), (1, 6)], [(2, 7)], [(1, 6), (3, 8), (0, 9)], [(0, 5)], [(1, None), (3, None)]]


def equal(batches, others):
    return all(
        set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(batches, others, strict=True)
    )


def test_samples_depend_on_seed_and_index_alone(clips):
    data = dataset(clips, jitter=(16, 32))
    batches = list(data.stream(REQUESTS))
    assert equal(batches, dataset(clips, jitter=(16, 32), workers=2).stream(iter(REQUESTS)))
    assert torch.equal(batches[0]["video"][1], batches[2]["video"][0])
    assert torch.equal(batches[0]["video"][0], batches[3]["video"][0])
    assert not torch.equal(batches[2]["video"][2], batches[3]["video"][0])
    assert equal(batches[-1:], [data.batch([1, 3])])
    first, second = next(dataset(clips[:1] * 2, jitter=(16, 32)).stream([[(0, 5), (1, 5)]]))["video"]
    assert not torch.equal(first, second)  # the same video and seed
    drawn = numbers(next(data.stream([[(0, seed) for seed in range(20)]]))["video"])
    assert len({tuple(clip) for clip in drawn.tolist()}) > 15


def test_nothing_global_is_drawn_from(clips):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    list(dataset(clips).stream(REQUESTS))
    list(dataset(clips, workers=1).stream(REQUESTS[:1]))
    assert states() == before


# What cannot be read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_videos_are_replaced_in_training(clips, broken, workers):
    paths = [clips[0], broken["cut"], clips[1], broken["text"]]
    data = dataset(paths, [0, 1, 2, 3], workers=workers)
    requests = [[(0, 1), (1, 2)], [(3, 3), (2, 4)], [(1, 2), (1, 5)]]
    batches = list(data.stream(requests))
    assert set(data.unreadable) == {broken["cut"], broken["text"]}
    assert torch.equal(batches[0]["video"][1], batches[2]["video"][0])  # although it is known by now
    for batch, request in zip(batches, requests, strict=True):
        assert set(batch) == {"video", "label"}
        assert batch["video"].shape == (2, 4, 3, 16, 16) and set(batch["label"].tolist()) <= {0, 2}
        for clip, label, (_, seed) in zip(batch["video"], batch["label"], request, strict=True):
            (expected,) = dataset(paths).stream([[(int(label), seed)]])
            assert torch.equal(expected["video"][0], clip)
    labels = torch.cat([batch["label"] for batch in dataset(paths).stream([[(1, n) for n in range(20)]])])
    assert set(labels.tolist()) == {0, 2}  # not always the same one


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_videos_are_left_out_of_evaluation(clips, broken, workers):
    paths = [clips[0], *broken.values(), clips[1]]
    data = dataset(paths, workers=workers)
    last = len(paths) - 1
    first, none, second = data.stream([[(0, None), (1, None)], [(2, None)], [(n, None) for n in range(3, last + 1)]])
    assert [batch["label"].tolist() for batch in (first, none, second)] == [[0], [], [last]]
    assert first["video"].shape == (1, 1, 4, 3, 16, 16) and none["video"].shape == (0, 1, 4, 3, 16, 16)
    assert none["video"].dtype == torch.float32
    assert numbers(second["video"]).tolist() == [clip_positions(20, frames=4, sampling="uniform").tolist()]
    assert set(data.unreadable) == set(broken.values())
    report = data.report_unreadable().splitlines()
    assert report[0] == "7 of 9 videos could not be read" and len(report) == 8
    assert f"  {broken['sound']}: got no pictures, allowed: a video" in report
    assert dataset(clips).report_unreadable() == "0 of 4 videos could not be read"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("seed", [None, 3])
def test_nothing_readable_is_an_error(broken, workers, seed):
    data = dataset([broken["text"], broken["sound"]], workers=workers)
    with pytest.raises(ValueError, match="videos"):
        list(data.stream([[(0, seed)], [(1, seed)]]))
    assert len(data.unreadable) == 2


def test_an_unreadable_video_is_tried_once(clips, broken, monkeypatch):
    tried = []
    monkeypatch.setattr(videos, "frame_index", lambda path: tried.append(path) or frame_index(path))
    data = dataset([clips[0], broken["text"]])
    for _ in range(3):
        train(data, [1])
        data.batch([1])
    assert tried.count(broken["text"]) == 1


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, options",
    [("frames", {"frames": 0}), ("stride", {"stride": 0}), ("image_size", {"image_size": 0, "jitter": None}),
     ("temporal_views", {"temporal_views": 0}), ("workers", {"workers": -1}), ("sampling", {"sampling": "random"}),
     ("spatial_views", {"spatial_views": 2}), ("jitter", {"image_size": 17}), ("jitter", {"jitter": (20, 16)}),
     ("flip", {"flip": 1.5}), ("labels", {"labels": [0]}), ("labels", {"labels": [0, 2]}),
     ("labels", {"labels": [0, -1]}), ("labels", {"paths": [], "labels": []})],
)  # fmt: skip
def test_wrong_options_are_named(key, options):
    with pytest.raises(ValueError, match=key):
        dataset(**{"paths": ["a.mp4", "b.mp4"], **options})
