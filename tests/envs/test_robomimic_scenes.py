"""Pictures of robosuite tasks with the truth behind them."""

import numpy as np
import pytest
import zarr

pytest.importorskip("robosuite")

from envs import make_data
from envs.robomimic import scenes as robomimic_scenes
from envs.robomimic.env import RobosuiteEnv
from envs.robomimic.expert import run_episode
from envs.robomimic.scenes import ensure_scenes, targets
from envs.shared import rendered_zarr


def turned(axis, angle):
    """Quaternion (x, y, z, w) of a turn by ``angle`` about a coordinate ``axis``."""
    quaternion = np.zeros(4)
    quaternion[axis], quaternion[3] = np.sin(angle / 2), np.cos(angle / 2)
    return quaternion


def test_targets_of_a_cube_by_hand():
    """Place in the world and from the gripper in units of 250 mm, and four times the angle to the fingers."""
    low_dim = {
        "cube_pos": np.array([0.1, -0.05, 0.9]),
        "cube_quat": turned(2, 0.5),
        "robot0_eef_pos": np.array([0.0, 0.0, 1.0]),
        "robot0_eef_quat": turned(2, -np.pi / 2 + 0.3),  # the fingers' axis, y, then points along x turned by 0.3
    }
    angle = 4 * (0.5 - 0.3)
    expected = [0.4, -0.2, 0.2, 0.4, -0.2, -0.4, 0.4 * np.cos(angle), 0.4 * np.sin(angle), 0]
    np.testing.assert_allclose(targets(low_dim, "lift"), expected, atol=1e-6)
    quarter = low_dim | {"cube_quat": turned(2, 0.5 + np.pi / 2)}  # looks the same
    np.testing.assert_allclose(targets(quarter, "lift"), expected, atol=1e-6)


def test_targets_of_a_can_by_hand():
    low_dim = {
        "Can_pos": np.array([0.35, 0.25, 0.9]),
        "Can_quat": turned(0, np.pi / 2),  # lying along -y
        "robot0_eef_pos": np.array([0.35, 0.0, 0.9]),
        "robot0_eef_quat": turned(2, 1.0),
    }
    np.testing.assert_allclose(targets(low_dim, "can"), [1, 1, 0, 0, 1, 0, 0, -0.4, 0], atol=1e-6)


def test_scenes_are_drawn_moments_with_their_truth(tmp_path, monkeypatch):
    monkeypatch.setattr(robomimic_scenes, "CHUNK", 4)
    monkeypatch.setattr(rendered_zarr, "CHUNK", 4)
    monkeypatch.setattr(robomimic_scenes, "FRAMES_PER_EPISODE", 2)
    monkeypatch.setattr(rendered_zarr, "in_processes", lambda draw, jobs: map(draw, jobs))
    path = make_data("robomimic_scenes", cache_dir=tmp_path, task="lift", frames=8, image_size=32)
    root = zarr.open_group(str(path), mode="r")
    truth, front = root["data/keypoint"][:], root["data/agentview_image"][:]
    assert truth.shape == (8, 9) and front.shape == (8, 32, 32, 3) and len(np.unique(front)) > 20
    assert root["data/robot0_eye_in_hand_image"].shape == (8, 32, 32, 3)
    np.testing.assert_array_equal(root["meta/episode_ends"][:], [2, 4, 6, 8])  # held out together
    # The second episode's moments, found again by their truth, are drawn from those states.
    env = RobosuiteEnv(task="Lift", actions="recorded", image_size=32, reflections=False)
    episode = run_episode(env, robomimic_scenes.SEED + 1, recovery=True)
    again = targets(episode["low_dim"], "lift")
    distance = np.abs(again[:, None] - truth[None, 2:4]).max(axis=2)
    assert (distance.min(axis=0) < 1e-6).all()
    for moment, frame in zip(distance.argmin(axis=0), (2, 3), strict=True):
        env.reset_to(episode["states"][moment])
        np.testing.assert_array_equal(env.image("agentview"), front[frame])
        np.testing.assert_array_equal(env.image("robot0_eye_in_hand"), root["data/robot0_eye_in_hand_image"][frame])
    env.close()
    assert ensure_scenes(cache_dir=tmp_path, task="lift", frames=8, image_size=32) == path


def test_impossible_scenes_are_refused(tmp_path):
    for key, value in (("task", "square"), ("frames", 0), ("frames", 100)):
        with pytest.raises(ValueError, match=key):
            ensure_scenes(**{"cache_dir": tmp_path, "task": "lift", "frames": 256, key: value})
