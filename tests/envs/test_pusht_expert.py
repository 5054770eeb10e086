"""The Push-T expert: exact physics, the planner, the demonstration program and the embedded set."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

import envs
from envs.pusht import demos as pusht_demos
from envs.pusht import planner as pusht_planner
from envs.pusht.demos import disturbed_start, random_start
from envs.pusht.geometry import CORNERS, MARGIN, clearance, coverage, goal_distance, primitive_targets, to_world
from envs.pusht.physics import PushTSimulator, environment_at, full_state
from envs.pusht.planner import FAST, RECOVERY, SMOOTH, draw_primitives, plan_episode
from envs.pusht_demos import main
from envs.shared.item_set import is_recovery

EMBEDDED = Path(envs.__file__).parent / "data" / "pusht_expert.zarr.zip"


def replay(state, actions):
    """States (n, 5) before each action in the real environment, and whether exactly the last one ended it."""
    environment = environment_at(state)
    states, done = [], []
    for action in actions:
        states.append(environment.get_obs())
        done.append(bool(environment.step(action)[2]))
    return np.array(states), done[-1] and not any(done[:-1])


def near_the_block(seed):
    """A start as gym-pusht draws it, and 60 random targets near the block."""
    rng = np.random.default_rng(seed)
    state = random_start(rng)
    return state, (state[2:4] + rng.normal(0, 80, (60, 2))).clip(0, 512)


def in_the_corner(seed):
    """A start in contact with both parts of the T and a wall, where the order of the contacts matters."""
    rng = np.random.default_rng([5, seed])
    pose = (rng.uniform(60, 120), rng.uniform(60, 120), rng.uniform(0, 2 * np.pi))
    state = np.array([*to_world(30.0, 45.0, pose), *pose], dtype=np.float32)  # in the inner corner
    return state, (state[2:4] + rng.normal(0, 60, (60, 2))).clip(0, 512)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("start", [near_the_block, in_the_corner])
def test_physics_equals_the_environment(start, seed):
    """Block pose and coverage of gym-pusht within 1e-9 (measured: 0)."""
    state, targets = start(seed)
    environment, simulator = environment_at(state), PushTSimulator(60)
    start = full_state(environment, state[:2])
    for _ in range(2):  # the second time shows that a used simulator starts afresh
        simulator.restore(start)
        simulator.load_targets(targets, start)
        poses = [simulator.advance(step) for step in range(60)]
    for step, target in enumerate(targets):
        _, _, _, _, info = environment.step(target)
        np.testing.assert_allclose(poses[step], info["block_pose"], rtol=0, atol=1e-9)
        assert coverage(*poses[step]) == pytest.approx(info["coverage"], abs=1e-9)
    expected = full_state(environment, targets[-1])
    np.testing.assert_allclose(simulator.state_after(60, targets), expected, rtol=0, atol=1e-9)


def test_goal_distance_is_the_mean_over_the_corners():
    pose, goal = (200.0, 280.0, 1.1), (256.0, 256.0, np.pi / 4)
    gaps = [np.subtract(to_world(u, v, pose), to_world(u, v, goal)) for u, v in CORNERS]
    assert goal_distance(*pose) == pytest.approx(np.linalg.norm(gaps, axis=1).mean())
    assert goal_distance(*goal) == pytest.approx(0)


def test_approach_keeps_clear_of_the_block_and_obeys_the_limits():
    rng = np.random.default_rng(0)
    pose = (250.0, 230.0, 0.7)
    state = np.array([120.0, 120.0, 0, 0, *pose, 0, 0, 0, 120.0, 120.0])
    targets, approach, steps = primitive_targets(draw_primitives(rng, 200, SMOOTH), state, (14.0, 3.0, 60), 180)
    assert (steps > 0).mean() > 0.9
    for path, before, total in zip(targets, approach, steps, strict=True):
        if total:
            assert min(clearance(x, y, pose) for x, y in path[:before]) > 15 + MARGIN - 1.5
            moves = np.linalg.norm(np.diff(np.vstack([state[10:], path[:total]]), axis=0), axis=1)
            assert moves.max() < 14.1
            assert moves[0] < 3.1 and np.diff(moves[:4]).max() < 3.1  # later a corner can shorten a chord
            assert (path[:total] * 64 == np.round(path[:total] * 64)).all()


@pytest.mark.parametrize("settings, seed", [(FAST, 1), (FAST, 2), (SMOOTH, 3)])
def test_planner_solves_and_the_actions_replay(settings, seed):
    start = random_start(np.random.default_rng(seed))
    states, actions, solved = plan_episode(start, np.random.default_rng(seed), settings)
    assert solved and len(states) == len(actions) <= 300
    assert states.dtype == actions.dtype == np.float32 and states.shape[1:] == (5,) and actions.shape[1:] == (2,)
    replayed, ended = replay(states[0], actions)
    assert ended
    np.testing.assert_array_equal(replayed.astype(np.float32), states)
    again = plan_episode(start, np.random.default_rng(seed), settings)[1]
    np.testing.assert_array_equal(actions, again)


def test_planner_takes_over_in_the_middle_and_from_a_solved_pose():
    rng = np.random.default_rng(4)
    states = plan_episode(random_start(rng), rng, FAST)[0]
    start = disturbed_start(states, rng)
    found, actions, solved = plan_episode(start, rng, RECOVERY)
    assert solved and replay(start, actions)[1]
    np.testing.assert_array_equal(found[0], start)
    done = np.array([100, 100, 256, 256, np.pi / 4], dtype=np.float32)
    assert plan_episode(done, rng, FAST)[2]


def test_planner_refuses_a_bad_state():
    for state in (np.zeros(4), np.array([1, 2, 3, np.nan, 0])):
        with pytest.raises(ValueError, match="state"):
            plan_episode(state, np.random.default_rng(0), FAST)


def test_settings_change_the_plan(monkeypatch):
    """Speeds, effort and the episode length do what they say."""
    start = random_start(np.random.default_rng(6))
    slow = plan_episode(start, np.random.default_rng(0), replace(FAST, max_speed=10.0, push_speeds=(3.0, 5.0)))[1]
    fast = plan_episode(start, np.random.default_rng(0), FAST)[1]
    assert np.linalg.norm(np.diff(slow, axis=0), axis=1).max() < 10.1 < 17 < np.abs(np.diff(fast, axis=0)).max() + 5
    assert len(fast) < len(slow)
    monkeypatch.setattr(pusht_planner, "EPISODE_STEPS", 5)
    _, actions, solved = plan_episode(start, np.random.default_rng(0), replace(FAST, first_samples=50, depth=1))
    assert not solved and len(actions) <= 5


def test_recovery_episodes_are_spread_evenly():
    assert [is_recovery(i, 0.5) for i in range(6)] == [False, True] * 3
    assert not any(is_recovery(i, 0.0) for i in range(50)) and all(is_recovery(i, 1.0) for i in range(50))
    assert sum(is_recovery(i, 0.3) for i in range(100)) == 30


def demos(output, *extra, episodes=4, processes=1):
    """Runs the program for a small set; returns its exit code."""
    arguments = ["--episodes", episodes, "--seed", 7, "--settings", "fast", "--processes", processes]
    return main([str(value) for value in [*arguments, "--output", output, *extra]])


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    """A set of 4 episodes made without interruption."""
    output = tmp_path_factory.mktemp("demos") / "whole.zarr.zip"
    assert demos(output) == 0
    return output


@pytest.mark.slow
def test_a_resumed_set_equals_an_uninterrupted_one(small_set, tmp_path, monkeypatch, capsys):
    output, make = tmp_path / "resumed.zarr.zip", pusht_demos.make_episode

    def stop_at_two(seed, index, recovery, settings):
        if index == 2:
            raise KeyboardInterrupt
        return make(seed, index, recovery, settings)

    monkeypatch.setattr(pusht_demos, "make_episode", stop_at_two)
    assert demos(output) == 130
    assert not output.exists()
    assert demos(output, "--seed", 8) == 1
    assert "seed: got 8" in capsys.readouterr().err
    monkeypatch.undo()
    assert demos(output, processes=2) == 0  # and the number of processes does not matter
    assert output.read_bytes() == small_set.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_layout_of_a_set(small_set, tmp_path):
    shutil.unpack_archive(small_set, tmp_path / "set.zarr", format="zip")
    group = zarr.open_group(tmp_path / "set.zarr", mode="r")
    assert group.metadata.zarr_format == 2
    ends = group["meta/episode_ends"][:]
    assert group["data/state"].shape == (ends[-1], 5) and group["data/action"].shape == (ends[-1], 2)
    assert group["data/state"].dtype == group["data/action"].dtype == np.float32
    assert group["meta/recovery"][:].tolist() == [False, True, False, True]
    assert group["meta/seed"][:, :2].tolist() == [[7, i] for i in range(4)]
    assert group.attrs["arguments"]["episodes"] == 4 and group.attrs["unsolved"] == 0


def test_unsolved_episodes_are_retried_and_then_left_out(tmp_path, monkeypatch, capsys):
    calls = []

    def fail_often(state, rng, settings):
        calls.append(state)
        solved = len(calls) == 2
        return np.zeros((3, 5), np.float32), np.zeros((3, 2), np.float32), solved

    monkeypatch.setattr(pusht_demos, "plan_episode", fail_often)
    assert demos(tmp_path / "a.zarr", "--recovery", "0", episodes=2) == 0
    assert len(calls) == 2 + pusht_demos.ATTEMPTS and not np.array_equal(calls[0], calls[1])
    assert "1 episodes, 1 left out" in capsys.readouterr().out
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert group["meta/seed"][:].tolist() == [[7, 0, 1]] and group.attrs["unsolved"] == 1


@pytest.mark.parametrize(
    "key, value",
    [
        ("episodes", "0"),
        ("episodes", "many"),
        ("recovery", "1.5"),
        ("recovery", "nan"),
        ("seed", "-1"),
        ("processes", "0"),
        ("settings", "best"),
        ("output", "set.npz"),
        ("output", "no/such/folder/set.zarr"),
    ],
)
def test_bad_arguments(key, value, tmp_path, monkeypatch, capsys):
    """One line that names the option and the value, an exit code of 1, and nothing written."""
    monkeypatch.chdir(tmp_path)
    try:
        code = demos("set.zarr", f"--{key}", value)
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 1 and error.startswith("error: ") and key in error and value in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_existing_outputs(small_set, tmp_path, capsys):
    assert demos(small_set) == 0 and "is complete" in capsys.readouterr().out
    assert demos(small_set, "--recovery", "0.25") == 1
    assert "recovery: got 0.25" in (error := capsys.readouterr().err) and "0.5" in error
    for output in (tmp_path / "file.zarr.zip", tmp_path / "folder.zarr"):
        output.write_text("mine") if output.suffix == ".zip" else output.mkdir()
        assert demos(output) == 1
        assert f"output: got {output}" in capsys.readouterr().err
    assert (tmp_path / "file.zarr.zip").read_text() == "mine"


def test_embedded_set_replays_to_success():
    with zarr.storage.ZipStore(EMBEDDED, mode="r") as store:
        group = zarr.open_group(store, mode="r")
        states, actions = group["data/state"][:], group["data/action"][:]
        ends, recovery = group["meta/episode_ends"][:], group["meta/recovery"][:]
    assert len(ends) >= 400 and ends[-1] == len(states) == len(actions)
    assert 0.4 < recovery.mean() < 0.6
    for episode in np.linspace(0, len(ends) - 1, 40).astype(int):
        rows = slice(ends[episode - 1] if episode else 0, ends[episode])
        replayed, ended = replay(states[rows][0], actions[rows])
        assert ended, f"episode {episode}"
        assert np.median(np.abs(replayed - states[rows])) < 1e-3
