"""Clips in seconds whatever the frame rate, and frames turned as the file says."""

import struct
from pathlib import Path

import numpy as np
import pytest
from films import numbers, write_video
from test_videos import dataset

from policy.dataset.video.decode import clip_numbers, frame_index, read_clip

LENGTH = 2  # s
CONTAINERS = {"clip.mp4": {}, "clip.mkv": {}, "clip.ts": {}, "clip.avi": {"codec": "mjpeg"}}
OPTIONS = {"sampling": "strided", "frames": 4, "stride": 4}


def level(seconds):
    """A picture that tells the time."""
    return np.full((32, 48, 3), round(8 + 100 * seconds), np.uint8)


def seconds_of(clip):
    """What ``level`` was made for, of pictures (..., 3, h, w) in [-1, 1]."""
    return (((clip + 1) * 127.5).mean((-3, -2, -1)) - 8) / 100


def scene(folder, name, ticks, **options):
    """A film of LENGTH s whose frames begin at ``ticks`` of 1/240 s."""
    times = list(ticks)
    return write_video(
        folder / f"{len(times)}_{name}", len(times), picture=lambda n: level(times[n] / 240), times=times, **options
    )


def even(rate):
    return range(0, 240 * LENGTH, 240 // rate)


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("sampling", ["strided", "uniform"])
def test_clips_of_one_scene_are_of_one_duration(tmp_path, name, sampling):
    """Filmed with 15, 30 and 60 frames a second, and with any distance between frames."""
    rng = np.random.default_rng(0)
    uneven = np.union1d(np.cumsum(rng.integers(1, 9, 200)), 0)
    ticks = {15: even(15), 30: even(30), 60: even(60), None: uneven[uneven < 240 * LENGTH].tolist()}
    paths = {rate: scene(tmp_path, name, one, **CONTAINERS[name]) for rate, one in ticks.items()}
    data = dataset(list(paths.values()), **{**OPTIONS, "sampling": sampling}, target_fps=15, temporal_views=2)
    shown = seconds_of(data.batch(range(4))["video"])  # (4, 2, 4)
    if sampling == "strided":
        views = np.array([[0, 4, 8, 12], [17, 21, 25, 29]]) / 15
        np.testing.assert_allclose(shown[:3], np.broadcast_to(views, (3, 2, 4)), atol=0.04)
    assert np.abs(shown - shown[:1]).max() <= 1 / 15 + 0.02
    counted = seconds_of(dataset(list(paths.values()), **OPTIONS).batch(range(3))["video"])[:, 0]
    lasts = counted[:, -1] - counted[:, 0]
    np.testing.assert_allclose(lasts, [12 / 15, 12 / 30, 12 / 60], atol=0.04)  # null: frames are counted


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_frame_of_a_moment_is_the_one_that_is_shown_then(tmp_path, name):
    ticks = [0, 5, 6, 40, 41, 90, 200, 239]
    index = frame_index(scene(tmp_path, name, ticks, **CONTAINERS[name]))
    moments = np.arange(0, 1, 1 / 60)
    expected = [max(n for n, tick in enumerate(ticks) if tick / 240 <= moment + 2e-3) for moment in moments]
    assert index.shown_at(moments).tolist() == expected


def test_a_training_clip_starts_at_any_moment(tmp_path):
    data = dataset([scene(tmp_path, "clip.mp4", even(60))], **OPTIONS, target_fps=10)
    (batch,) = data.stream([[(0, seed) for seed in range(60)]])
    shown = seconds_of(batch["video"])
    np.testing.assert_allclose(shown - shown[:, :1], np.broadcast_to(np.arange(4) * 0.4, (60, 4)), atol=0.04)
    assert shown[:, 0].min() < 0.05 and shown[:, 0].max() > 0.65


def test_a_short_video_repeats_its_last_frame_and_a_slow_one_each(tmp_path):
    index = frame_index(scene(tmp_path, "clip.mp4", even(15)))
    assert clip_numbers(index, target_fps=15, sampling="strided", frames=5, stride=10)[0].tolist() == [
        0,
        10,
        20,
        29,
        29,
    ]
    assert clip_numbers(index, target_fps=60, sampling="strided", frames=6, stride=2)[0].tolist() == [
        13,
        14,
        14,
        15,
        15,
        16,
    ]
    single = frame_index(scene(tmp_path, "clip.mkv", [0]))
    assert clip_numbers(single, target_fps=30, sampling="uniform", frames=3).tolist() == [[0, 0, 0]]


def test_without_time_stamps_seconds_are_refused(tmp_path):
    path = write_video(tmp_path / "raw.h264")
    assert dataset([path]).batch([0])["label"].tolist() == [0]
    with pytest.raises(ValueError, match="target_fps"):
        dataset([path], target_fps=24).batch([0])


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), 1e9])
def test_impossible_rates(rate):
    with pytest.raises(ValueError, match="target_fps"):
        dataset(["a.mp4"], target_fps=rate)


# Turned --------------------------------------------------------------------------------------------------------------

ONE = 1 << 16
# {(a, b, c, d): what a player makes of the picture}, (column, row) going to (a column + c row, b column + d row)
TURNS = {
    (1, 0, 0, 1): lambda picture: picture,
    (0, 1, -1, 0): lambda picture: np.rot90(picture, -1),  # a telephone held upright
    (-1, 0, 0, -1): lambda picture: np.rot90(picture, 2),
    (0, -1, 1, 0): lambda picture: np.rot90(picture),
    (-1, 0, 0, 1): lambda picture: picture[:, ::-1],
    (1, 0, 0, -1): lambda picture: picture[::-1],
    (0, 1, 1, 0): lambda picture: picture.swapaxes(0, 1),
    (0, -1, -1, 0): lambda picture: np.rot90(picture, 2).swapaxes(0, 1),
}


def with_matrix(path, matrix):
    """``path`` after writing (a, b, c, d) into the header of its track (ISO 14496-12, section 8.3.2)."""
    content, (a, b, c, d) = Path(path).read_bytes(), matrix
    place = content.index(b"tkhd") + 44
    entries = [round(a * ONE), round(b * ONE), 0, round(c * ONE), round(d * ONE), 0, 0, 0, 1 << 30]
    Path(path).write_bytes(content[:place] + struct.pack(">9i", *entries) + content[place + 36 :])
    return path


def corner(_):
    """A picture without any symmetry."""
    row, column = np.mgrid[:32, :48]
    return np.dstack([4 * column, 7 * row, row + column]).astype(np.uint8)


@pytest.mark.parametrize("matrix", TURNS)
def test_frames_are_turned_as_the_file_says(tmp_path, matrix):
    plain, turned = (write_video(tmp_path / f"{name}.mp4", 20, picture=corner) for name in ("plain", "turned"))
    expected = np.stack([TURNS[matrix](picture) for picture in read_clip(plain, [3, 15])])
    np.testing.assert_array_equal(read_clip(with_matrix(turned, matrix), [3, 15]), expected)


def test_a_turned_video_goes_into_clips_upright(tmp_path):
    path = with_matrix(write_video(tmp_path / "turned.mp4", 5), (0, 1, -1, 0))
    assert read_clip(path, [0]).shape == (1, 48, 32, 3)
    assert numbers(dataset([path], frames=5).batch([0])["video"]).tolist() == [[[0, 1, 2, 3, 4]]]


def test_other_turns_are_refused(tmp_path):
    path = with_matrix(write_video(tmp_path / "oblique.mp4", 2), (0.7, 0.7, -0.7, 0.7))
    with pytest.raises(ValueError, match="oblique.mp4"):
        read_clip(path, [0])


def test_frames_of_several_sizes_are_refused(tmp_path):
    both = tmp_path / "both.ts"
    for side in (32, 64):
        part = write_video(tmp_path / "part.ts", 3, picture=lambda _, side=side: np.zeros((side, side, 3), np.uint8))
        both.write_bytes((both.read_bytes() if both.exists() else b"") + Path(part).read_bytes())
    with pytest.raises(ValueError, match="both.ts"):
        read_clip(str(both), range(frame_index(str(both)).count))


def test_an_unknown_codec_is_refused(tmp_path):
    path = Path(write_video(tmp_path / "unknown.mp4", 2))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(ValueError, match="unknown.mp4"):
        frame_index(str(path))
