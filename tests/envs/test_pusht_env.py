"""The Push-T environment against gym-pusht itself and against the official recordings."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from paths import ROOT

from envs import make_data, make_env
from envs.pusht import scenes as pusht_scenes
from envs.pusht.env import PushT, keypoints, render_states
from envs.pusht.scenes import ensure_images, ensure_scenes, sample_states, scene_targets
from envs.shared import rendered_zarr

HUMAN = "pusht/pusht_cchi_v7_replay.zarr"


@pytest.fixture(scope="module")
def human():
    """The 206 official episodes, under data/ or $FIBOTTENTION_DATA; python -m policy.dataset.download pusht."""
    for folder in (os.environ.get("FIBOTTENTION_DATA"), ROOT / "data"):
        if folder is not None and (Path(folder) / HUMAN).exists():
            return zarr.open_group(str(Path(folder) / HUMAN), mode="r")
    pytest.skip(f"no {HUMAN} under data/ or $FIBOTTENTION_DATA; python -m policy.dataset.download pusht")


@pytest.fixture(scope="module")
def env():
    """One environment for all tests; each starts with a reset."""
    return PushT()


def moved_states(env, count=12, seed=5):
    """States (count, 5) on the way of an agent that runs through the block."""
    rng = np.random.default_rng(seed)
    env.reset(seed)
    states = []
    for _ in range(count):
        env.step(env.state[2:4] + rng.normal(0, 40, 2))
        states.append(env.state)
    return np.array(states)


# The official recordings ---------------------------------------------------------------------------------------------


def test_replaying_recorded_actions_reproduces_the_recorded_states(human, env):
    """20 episodes from their first state on. Measured: median error of a frame 1e-5 px, 99 % 0.45, largest 0.53."""
    states, actions, ends = human["data/state"][:], human["data/action"][:], human["meta/episode_ends"][:]
    starts = np.concatenate([[0], ends[:-1]])
    errors = []
    for episode in np.linspace(0, len(ends) - 1, 20).astype(int):
        recorded = states[starts[episode] : ends[episode]].astype(np.float64)
        env.reset_to(recorded[0])
        for expected, action in zip(recorded[1:], actions[starts[episode] : ends[episode]], strict=False):
            env.step(action)
            corners = np.linalg.norm(keypoints(env.state) - keypoints(expected), axis=-1)
            errors.append([np.abs(env.state[:4] - expected[:4]).max(), corners.max()])
    errors = np.array(errors)
    assert len(errors) > 2000
    assert (np.median(errors, axis=0) < 0.05).all()
    assert (errors < 2).all()


def test_rendered_images_equal_the_recorded_ones(human):
    """Mean difference of 12 frames in grey levels of 255. Measured: at most 0.14; with the T moved by 3 px: 0.35."""
    frames = [first + step for first in (30, 12_880, 25_600) for step in (0, 12, 24, 36)]
    recorded = np.stack([human["data/img"][frame] for frame in frames])
    states = human["data/state"].oindex[frames].astype(np.float64)

    def difference(at):
        return np.abs(render_states(at) - recorded).mean(axis=(1, 2, 3))

    assert (difference(states) < 0.2).all()
    assert (difference(states + [0, 0, 3, 0, 0]) > 0.3).all()  # so the tolerance above is well below 3 px of 512


# Against gym-pusht ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 100_000, 100_049])
def test_reset_and_steps_equal_the_gymnasium_environment(env, seed):
    import gym_pusht  # noqa: F401 (registers the environment)
    import gymnasium

    reference = gymnasium.make("gym_pusht/PushT-v0", obs_type="state", disable_env_checker=True)
    expected, _ = reference.reset(seed=seed)
    env.reset(seed)
    np.testing.assert_array_equal(env.state, expected)
    rng = np.random.default_rng(seed)
    for _ in range(15):
        action = expected[2:4] + rng.normal(0, 60, 2)
        expected, reward, terminated, _, info = reference.step(action.clip(0, 512))
        got, done, got_info = env.step(action)
        np.testing.assert_array_equal(env.state, expected)
        # The area of an intersection, which shapely computes, differs in its last bit from one call to another.
        assert (got, got_info["coverage"]) == pytest.approx((reward, info["coverage"]), rel=1e-12, abs=1e-12)
        assert (done, got_info["success"], set(got_info)) == (terminated, terminated, {"coverage", "success"})
    reference.close()


def test_missing_libraries_of_opencv_are_named(tmp_path):
    """A bare Debian has no libGL: every first use of the simulator says what to install."""
    (tmp_path / "cv2.py").write_text('raise ImportError("libGL.so.1: cannot open shared object file")')
    for use in ("envs.pusht.env import PushT; PushT()", "envs.pusht.physics import make_environment as m; m()"):
        result = subprocess.run(
            [sys.executable, "-c", f"from {use}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        last = result.stderr.rstrip().splitlines()[-1]
        assert "libGL.so.1" in last and "apt-get install libgl1 libglib2.0-0" in last


def test_states_are_restored_and_keypoints_are_the_corners_of_gym_pusht_and_the_agent(env):
    states = moved_states(env)
    ours = keypoints(states)
    assert ours.shape == (len(states), 9, 2)
    np.testing.assert_array_equal(keypoints(states.reshape(3, 4, 5)), ours.reshape(3, 4, 9, 2))
    for state, points in zip(states, ours, strict=True):
        env.reset_to(state)
        np.testing.assert_allclose(env.state, state, rtol=0, atol=1e-9)
        theirs = env._env.get_keypoints(env._env._block_shapes)  # the order of its corners is pymunk's
        distance = np.linalg.norm(points[:8, None] - theirs[None], axis=-1)  # (8, 8)
        assert distance.min(axis=0).max() < 1e-6 and distance.min(axis=1).max() < 1e-6
        assert tuple(points[8]) == tuple(state[:2])
        # Pre-trained encoders rely on their order: bar, then stem, as gym-pusht's add_tee lists them.
        local = [env._env.block.world_to_local(tuple(point)) for point in points[:8]]
        bar, stem = [(-60, 30), (60, 30), (60, 0), (-60, 0)], [(-15, 30), (-15, 120), (15, 120), (15, 30)]
        np.testing.assert_allclose(local, bar + stem, rtol=0, atol=1e-6)


def test_reset_to_forgets_the_past(env):
    """The same actions from the same state give the same states, whatever was done before."""
    start = moved_states(env)[-1]
    actions = start[2:4] + np.random.default_rng(1).normal(0, 50, (10, 2))

    def states():
        env.reset_to(start)
        return np.array([(env.step(action), env.state)[1] for action in actions])

    first = states()
    env.reset(99)
    np.testing.assert_array_equal(states(), first)
    env.reset_to(start)
    fresh = PushT()
    fresh.reset_to(start)
    np.testing.assert_array_equal(env.frame(), fresh.frame())  # no mark of an earlier action


# Steps and pictures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [[np.nan, 1], [1, np.inf], [1, 2, 3], [[1, 2]], 5])
def test_wrong_actions_are_named_and_change_nothing(env, action):
    env.reset(0)
    before = env.state
    with pytest.raises(ValueError, match="action"):
        env.step(np.array(action, dtype=float))
    np.testing.assert_array_equal(env.state, before)


@pytest.mark.parametrize("state", [[1, 2, 3, 4], [1, 2, 3, 4, np.nan]])
def test_wrong_states_are_named(env, state):
    with pytest.raises(ValueError, match="state"):
        env.reset_to(state)


def test_targets_outside_the_world_are_its_edge(env):
    after = []
    for action in ([-1000, 5000], [0, 512]):
        env.reset(1)
        env.step(action)
        after.append(env.state)
    np.testing.assert_array_equal(*after)


def test_an_episode_ends_on_success_or_after_max_steps():
    env = PushT(max_steps=3)
    for _ in range(2):  # the second time shows that a reset starts the count again
        env.reset(0)
        assert [env.step([256, 256])[1] for _ in range(3)] == [False, False, True]
    goal = [100, 100, 256, 256, np.pi / 4]
    env.reset_to(goal)
    reward, done, info = env.step([100, 100])
    assert (reward, done, info["success"]) == (1.0, True, True) and info["coverage"] > 0.95
    with pytest.raises(ValueError, match="max_steps"):
        PushT(max_steps=0)


def test_observations_are_the_picture_and_the_agent(env):
    moved_states(env, count=3)
    obs = env.observe()
    assert set(obs) == {"image", "agent_pos"}
    assert obs["image"].shape == (3, 96, 96) and obs["image"].dtype == np.uint8
    np.testing.assert_array_equal(obs["image"].transpose(1, 2, 0), env.image())
    np.testing.assert_array_equal(obs["agent_pos"], env.state[:2].astype(np.float32), strict=True)
    assert env.frame(128).shape == (128, 128, 3)


@pytest.mark.parametrize("image_size", [96, 64])
def test_render_states_equals_what_the_environment_shows(image_size):
    env = PushT(image_size=image_size)
    env.reset(3)
    states, shown = [], []
    for step in range(4):
        env.step([100 + 80 * step, 300])
        states.append(env.state)
        shown.append(env.image())
    rendered = render_states(np.array(states), image_size=image_size)
    np.testing.assert_array_equal(rendered, np.stack(shown), strict=True)
    assert len({image.tobytes() for image in rendered}) == 4


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        ValueError, match="task.env.name: got 'push' .did you mean 'pusht'.*, allowed: pusht, robosuite or"
    ):
        make_env("push")
    with pytest.raises(ValueError, match="task.maker.name"):
        make_data("pictures")
    assert isinstance(make_env("pusht", max_steps=7), PushT)


# Random scenes -------------------------------------------------------------------------------------------------------


def test_sampled_states_are_plausible(env):
    """Distances by pymunk's own queries, which know nothing of the formula in pusht_scenes."""
    states = sample_states(400, np.random.default_rng(0))
    assert states.shape == (400, 5) and np.isfinite(states).all()
    assert (states[:, :2] > 10).all() and (states[:, :2] < 502).all()
    assert (states[:, 4] >= 0).all() and (states[:, 4] < 2 * np.pi).all()
    distances = []
    for state in states:
        env.reset_to(state)
        distances.append(min(shape.point_query(tuple(state[:2])).distance for shape in env._env._block_shapes))
    distances = np.array(distances)  # negative inside
    assert distances.min() > 14 - 1e-6  # the agent's radius is 15, of which a pixel may overlap
    near_block = (distances < 45).mean()
    near_goal = (np.linalg.norm(states[:, 2:4] - 256, axis=1) < 50).mean()
    assert 0.45 < near_block < 0.75 and 0.25 < near_goal < 0.5


def test_sampled_states_depend_on_the_generator():
    first, same, other = (sample_states(20, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert not np.isclose(first, other).any()


# Cached pictures -----------------------------------------------------------------------------------------------------


def state_only(path, states, ends=(4, 7), zarr_format=2, **extra):
    """A zarr of demonstrations without images at ``path``; extra: further arrays or replacements, None for none."""
    root = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)
    arrays = {"data/state": states, "data/action": states[:, :2] + 1, "meta/episode_ends": np.array(ends), **extra}
    for name, values in arrays.items():
        if values is not None:
            root.create_array(name, data=np.asarray(values))
    return path


@pytest.fixture
def states():
    """Seven states as float32, as data sets hold them."""
    return sample_states(7, np.random.default_rng(3)).astype(np.float32)


@pytest.fixture
def rendered_here(monkeypatch):
    """Draw in this process, which starts much faster; the list counts the calls."""
    calls = []
    monkeypatch.setattr(rendered_zarr, "in_processes", lambda draw, jobs: (calls.append(len(jobs)), map(draw, jobs))[1])
    return calls


def test_processes_give_the_pictures_in_order(tmp_path, monkeypatch, states):
    monkeypatch.setattr(pusht_scenes, "CHUNK", 3)
    path = ensure_images(state_only(tmp_path / "demos.zarr", states), cache_dir=tmp_path, image_size=32)
    np.testing.assert_array_equal(zarr.open_group(path, mode="r")["data/img"][:], render_states(states, image_size=32))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_images_are_rendered_once_into_the_cache(tmp_path, states, rendered_here, zarr_format):
    source, cache = state_only(tmp_path / "demos.zarr", states, zarr_format=zarr_format), tmp_path / "cache"
    target = ensure_images(source, cache_dir=cache)
    root = zarr.open_group(str(target), mode="r")
    np.testing.assert_array_equal(root["data/img"][:], render_states(states), strict=True)
    np.testing.assert_array_equal(root["data/state"][:], states, strict=True)
    np.testing.assert_array_equal(root["data/action"][:], states[:, :2] + 1, strict=True)
    np.testing.assert_array_equal(root["meta/episode_ends"][:], [4, 7])
    assert root.metadata.zarr_format == 2 and list(cache.iterdir()) == [target]
    assert ensure_images(source, cache_dir=cache) == target and len(rendered_here) == 1
    assert ensure_images(source, cache_dir=cache, image_size=32) != target
    state_only(source, states[::-1], zarr_format=zarr_format)  # other content under the same name
    assert ensure_images(source, cache_dir=cache) != target and len(rendered_here) == 3


def test_a_data_set_with_images_is_returned_as_it_is(tmp_path, states, rendered_here):
    source = state_only(tmp_path / "seen.zarr", states, **{"data/img": np.ones((7, 96, 96, 3), np.uint8)})
    assert make_data("pusht_images", source=source, cache_dir=tmp_path / "cache") == source
    assert rendered_here == [] and not (tmp_path / "cache").exists()


def unlink(name):
    return lambda path: (path / name).unlink()


def overwrite(name, content):
    return lambda path: (path / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data/state": None}, "data/state"),
        ({"data/action": None}, "data/action"),
        ({"meta/episode_ends": None}, "meta/episode_ends"),
        ({"data/state": np.ones((7, 4))}, r"data/state.* \(7, 4\)"),
        ({"data/state": np.full((7, 5), np.nan)}, "data/state.* NaN"),
        ({"data/action": np.ones((6, 2))}, "got 7 states, 6 actions"),
        ({"meta/episode_ends": [4, 8]}, "end at 8"),
        (unlink("data/state/0.0"), "data/state: got 0 of 1 chunks"),
        (overwrite("data/action/0.0", b"x"), "data/action: got a chunk"),
        (overwrite(".zgroup", b"{"), "not a readable zarr"),
    ],
)
def test_what_cannot_be_rendered_is_named(tmp_path, states, rendered_here, change, message):
    source = state_only(tmp_path / "demos.zarr", states, **(change if isinstance(change, dict) else {}))
    if callable(change):
        change(source)
    with pytest.raises(ValueError, match=f"demos.zarr: .*{message}"):
        ensure_images(source, cache_dir=tmp_path / "cache")
    assert rendered_here == [] and not (tmp_path / "cache").exists()
    with pytest.raises(FileNotFoundError, match="nowhere.zarr"):
        ensure_images(tmp_path / "nowhere.zarr", cache_dir=tmp_path)


def test_interrupted_rendering_leaves_nothing_behind(tmp_path, states, monkeypatch):
    def interrupted(draw, jobs):
        yield draw(jobs[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(rendered_zarr, "in_processes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_images(state_only(tmp_path / "demos.zarr", states), cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_random_scenes_hold_pictures_and_their_keypoints(tmp_path, rendered_here):
    path = make_data("pusht_scenes", cache_dir=tmp_path, frames=5, seed=2)
    root = zarr.open_group(str(path), mode="r")
    states = root["data/state"][:]
    np.testing.assert_array_equal(states, sample_states(5, np.random.default_rng(2)).astype(np.float32))
    np.testing.assert_array_equal(root["data/img"][:], render_states(states))
    np.testing.assert_array_equal(root["meta/episode_ends"][:], [1, 2, 3, 4, 5])
    px = (root["data/keypoint"][:].reshape(5, 9, 2).astype(np.float64) + 1) * 256
    np.testing.assert_allclose(px, keypoints(states), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(root["data/keypoint"][:], scene_targets(states), strict=True)
    assert ensure_scenes(cache_dir=tmp_path, frames=5, seed=2) == path and len(rendered_here) == 1
    assert ensure_scenes(cache_dir=tmp_path, frames=5, seed=3) != path
    with pytest.raises(ValueError, match="frames"):
        ensure_scenes(cache_dir=tmp_path, frames=0)
