"""Strips of frames: a row a camera of HDF5 files and films, with the first and the last moment."""

import json

import h5py
import numpy as np
import pytest
from PIL import Image

from eval.film_strip import main, strip
from eval.rollout.video import write_grid


@pytest.fixture
def demos(tmp_path):
    """Two episodes of two cameras, at 20 steps a second; pixels tell the step."""
    path = tmp_path / "lift.hdf5"
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
        for demo, steps in (("demo_0", 41), ("demo_1", 3)):
            images = np.broadcast_to(np.arange(steps, dtype=np.uint8)[:, None, None, None], (steps, 8, 8, 3))
            for camera in ("agentview_image", "robot0_eye_in_hand_image"):
                file[f"data/{demo}/obs/{camera}"] = images
            file[f"data/{demo}/obs/robot0_eef_pos"] = np.zeros((steps, 3))
    return path


def test_each_camera_is_a_row_from_the_first_to_the_last_step(demos):
    rows = strip(demos, demo="demo_0", frames=5)
    assert [label.split("\n") for label, *_ in rows] == [["lift", "agentview"], ["lift", "eye in hand"]]
    for _, images, _ in rows:
        assert [image[0, 0, 0] for image in images] == [0, 10, 20, 30, 40]
    assert rows[0][2] == ["0.0 s", "0.5 s", "1.0 s", "1.5 s", "2.0 s"] and rows[1][2] is None
    assert len(strip(demos, demo="demo_1", frames=5)[0][1]) == 3


def test_films_and_demonstrations_share_a_picture(demos, tmp_path):
    frames = [np.full((64, 64, 3), shade, np.uint8) for shade in (0, 90, 180)]
    episode = {"frames": frames, "score": [0.0, 0.5, 1.0], "seed": 1, "success": True}
    film = write_grid(tmp_path / "film.mp4", [episode], fps=2, hold=1)
    ((label, images, titles),) = strip(film, demo=None, frames=3)
    assert label == "film" and titles == ["0.0 s", "1.0 s", "1.5 s"] and images[-1][40:].mean() > 170
    one, both = tmp_path / "one.png", tmp_path / "both.png"
    main([str(demos), "--side", "32", "--output", str(one)])
    main([str(demos), str(film), "--side", "32", "--caption", "words", "--output", str(both)])
    assert Image.open(both).height > Image.open(one).height + 32


@pytest.mark.parametrize(
    ("arguments", "key"),
    [(["x.txt"], "FILE"), (["{demos}", "--demo", "demo_9"], "--demo"), (["{demos}", "--frames", "0"], "--frames")],
)
def test_wrong_input_gives_one_line(demos, tmp_path, capsys, monkeypatch, arguments, key):
    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(SystemExit):
        main([*(argument.format(demos=demos) for argument in arguments), "--output", str(tmp_path / "strip.png")])
    assert capsys.readouterr().err.startswith(f"error: {key}: got ") and not (tmp_path / "strip.png").exists()
