"""Films of rollouts: a grid of episodes as H.264."""

import numpy as np
import pytest
from films import decode

from eval.rollout.video import GAP, write_grid


def film(colours, *, success=False, size=64):
    frames = [np.full((size, size, 3), colour, np.uint8) for colour in colours]
    return {"frames": frames, "score": [0.1] * len(frames), "seed": 1, "success": success}


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (5, 3, 2)])
def test_video_of_a_grid(tmp_path, count, columns, rows):
    """Every tile shows its episode in time; one that ends early keeps its last frame."""
    colours = [(200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60), (60, 200, 200)]
    episodes = [film([(128, 128, 128)] * n + [colours[n]] * (n + 2)) for n in range(count)]
    path = write_grid(tmp_path / "a.mp4", episodes, hold=3)
    video = decode(path)
    longest = 2 * (count - 1) + 2
    assert len(video) == longest + 3
    height, width = (n * (64 + GAP) - GAP for n in (rows, columns))
    assert video.shape[1:] == (height, width, 3)
    for time, picture in enumerate(video):
        for number in range(count):
            row, column = divmod(number, columns)
            tile = picture[row * (64 + GAP) :, column * (64 + GAP) :][24:56, 8:56]
            expected = (128, 128, 128) if time < number else colours[number]
            assert np.abs(tile.mean(axis=(0, 1)) - expected).max() < 12, (time, number)


def test_video_of_odd_size_and_labels(tmp_path):
    """H.264 wants even sides. The label is white, with ink that turns green or red at the end."""
    for success, channel in ((True, 1), (False, 0)):
        video = decode(write_grid(tmp_path / "a.mp4", [film([(90, 90, 90)] * 4, success=success, size=129)], hold=1))
        assert video.shape == (5, 130, 130, 3)
        label = video[:, 1:13, 2:128].astype(int)
        assert np.median(label) > 240 and (label[0].min(axis=2) < 110).any()
        tint = label[-1] - label[-1].mean(axis=2, keepdims=True)
        assert tint[..., channel].max() > 25 and tint[..., 1 - channel].max() < 20
        assert np.abs(label[0] - label[0].mean(axis=2, keepdims=True)).max() < 10
