"""Frames read from files of every kind are those of a full decode; files that are cut off are not read."""

import os
from pathlib import Path

import av
import numpy as np
import pytest
from films import COUNT, broken_files, numbers, write_video

from policy.dataset.video import decode as video_decode
from policy.dataset.video.decode import declared_size, frame_index, read_clip

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
def film(request, tmp_path_factory):
    """(path, frames of a plain decode from first to last)."""
    path = write_video(tmp_path_factory.mktemp("film") / request.param, **FILES[request.param])
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
def test_decoding_starts_at_the_keyframe_before(tmp_path, monkeypatch, name):
    path = write_video(tmp_path / f"seek_{name}", **FILES[name])
    decoded = frames_decoded(monkeypatch)
    assert numbers(read_clip(path, [1, 40])).tolist() == [1, 40]
    assert len(decoded) <= 2 + 12
    monkeypatch.setattr(video_decode, "_after_seeking", lambda *_: {})  # as where a container cannot seek
    decoded.clear()
    assert numbers(read_clip(path, [1, 40])).tolist() == [1, 40]
    assert len(decoded) == 41


def test_frames_are_counted_once(tmp_path):
    path = write_video(tmp_path / "counted.avi", **FILES["mpeg4.avi"])
    before = frame_index.cache_info().misses
    for _ in range(3):
        assert frame_index(path).count == COUNT
    assert frame_index.cache_info().misses == before + 1


def test_frames_hidden_by_an_edit_list_do_not_count(tmp_path):
    source, path = write_video(tmp_path / "source.mp4"), tmp_path / "edited.mp4"
    with av.open(source) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.pts, packet.dts = (stamp - 5 * packet.duration for stamp in (packet.pts, packet.dts))
                packet.stream = stream
                new.mux(packet)
    assert frame_index(str(path)).count == COUNT - 5
    assert numbers(read_clip(str(path), [0, 1, 42])).tolist() == [5, 6, 47]


def test_positions_and_files_that_cannot_be_read(tmp_path):
    path = write_video(tmp_path / "whole.mp4", 5)
    for position in (-1, 5):
        with pytest.raises(ValueError, match="whole.mp4: positions"):
            read_clip(path, [3, position])
    for path in broken_files(tmp_path).values():
        with pytest.raises(ValueError, match=os.path.basename(path)):
            read_clip(path, [0])


CUT = {name: FILES[name] for name in ("h264.mp4", "fragments.mp4", "h264.mkv", "mpeg4.avi")}
CUT["faststart.mp4"] = {"container": {"movflags": "faststart"}}


@pytest.mark.parametrize("name", CUT)
def test_files_that_are_cut_off_are_not_read(tmp_path, name):
    path = Path(write_video(tmp_path / name, **CUT[name]))
    content = path.read_bytes()
    assert frame_index(str(path)).count == COUNT
    for part in (0.01, 0.3, 0.5, 0.9):
        cut = tmp_path / f"cut_{part}_{name}"
        cut.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(ValueError, match=cut.name):
            frame_index(str(cut))


def test_size_that_a_file_declares(tmp_path):
    for name in ("h264.mkv", "mpeg4.avi"):
        path = write_video(tmp_path / name, **FILES[name])
        assert declared_size(path) == os.path.getsize(path)
    streamed = write_video(tmp_path / "live.mkv", container={"live": "1"})
    assert declared_size(streamed) == 0 and frame_index(streamed).count == COUNT
    assert declared_size(write_video(tmp_path / "h264.mp4")) == 0
