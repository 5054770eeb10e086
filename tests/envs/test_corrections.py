"""Corrections for DAgger: which visited states the expert starts from, and the replay buffer of its episodes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from paths import ROOT

import envs
from envs import make_corrections
from envs.pusht import corrections as pusht_corrections
from envs.pusht.corrections import SHARE, SPREAD_PX, choose_starts
from envs.pusht.env import PushT, render_states
from envs.pusht.geometry import coverage
from envs.pusht.planner import PX_PER_RAD
from envs.pusht.scenes import ensure_images

GOAL = (256.0, 256.0, np.pi / 4)
OPTIONS = {"count": 4, "seed": 3, "image_size": 24, "processes": 1, "settings": "fast"}


def episode(seed, success, score=None, *, steps=40, pace=SPREAD_PX + 1):
    """A visited episode whose agent goes in a zigzag of ``pace`` px a step; its block is near no goal."""
    place = pace * np.arange(steps + 1)
    states = np.column_stack([50 + place % 400, 50 + pace * (place // 400), np.full((steps + 1, 3), (300, 400, 1.0))])
    return {"seed": seed, "success": success, "score": float(success) if score is None else score, "states": states}


@pytest.fixture(scope="module")
def visited():
    """The last 25 states before success of six embedded episodes: from there plans are short."""
    with zarr.storage.ZipStore(Path(envs.__file__).parent / "data" / "pusht_expert.zarr.zip", mode="r") as store:
        group = zarr.open_group(store, mode="r")
        states, ends = group["data/state"][:], group["meta/episode_ends"][:6]
    return [
        {"seed": 100 + i, "success": i > 2, "score": 0.1 * i, "states": states[end - 25 : end].astype(np.float64)}
        for i, end in enumerate(ends)
    ]


# The choice of starts --------------------------------------------------------------------------------------------


def test_failures_come_first_and_take_turns():
    """Lowest score first; then the successful ones, longest first; then what is left of the failures."""
    episodes = [episode(1, True, steps=20), episode(2, False, 0.8), episode(3, True), episode(4, False, 0.3)]
    _, origins = choose_starts(episodes, 1000, 0)
    seeds = origins[:, 0].tolist()
    assert seeds[: 2 * SHARE] == [4, 2] * SHARE
    assert seeds[2 * SHARE : 4 * SHARE] == [3, 1] * SHARE
    assert seeds[4 * SHARE : 6 * SHARE] == [4, 2] * SHARE
    assert sorted(seeds) == [1] * 21 + [2] * 41 + [3] * 41 + [4] * 41  # all of them, none twice
    assert len({tuple(origin) for origin in origins.tolist()}) == len(origins)


def test_starts_are_the_states_of_their_origins():
    episodes = {one["seed"]: one for one in (episode(5, False), episode(9, True))}
    starts, origins = choose_starts(list(episodes.values()), 12, 0)
    assert starts.shape == (12, 5) and origins.shape == (12, 2)
    for start, (seed, step) in zip(starts, origins, strict=True):
        np.testing.assert_array_equal(start, episodes[seed]["states"][step])


def test_every_failed_episode_is_used_before_a_successful_one():
    episodes = [episode(seed, seed % 2 == 0) for seed in range(20)]
    _, origins = choose_starts(episodes, 10, 0)
    assert sorted(origins[:, 0]) == list(range(1, 20, 2))


def test_the_choice_follows_the_seed():
    episodes = [episode(1, False), episode(2, False)]
    expected = choose_starts(episodes, 10, 0)
    for one, other in zip(choose_starts(episodes, 10, 0), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(choose_starts(episodes, 6, 0)[0], expected[0][:6])
    assert not np.array_equal(choose_starts(episodes, 10, 1)[1], expected[1])


def test_late_states_are_likelier():
    """A chance in proportion to time: the first draw of each of 200 episodes is at 2/3 of it on average."""
    _, origins = choose_starts([episode(seed, False) for seed in range(200)], 200, 0)
    assert sorted(origins[:, 0]) == list(range(200))
    assert origins[:, 1].mean() / 40 == pytest.approx(2 / 3, abs=0.06)  # 3.6 standard errors
    assert origins[:, 1].min() < 12 and origins[:, 1].max() > 37


def test_starts_of_an_episode_are_apart():
    """By the distance of agent, block and angle together; an agent that stands still gives one start."""
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(0, (3, 3, 1, 1, 0.05), (300, 5)), axis=0) + (200, 200, 300, 400, 0)
    walk[:, 4] %= 2 * np.pi
    starts, _ = choose_starts([{"seed": 0, "success": False, "score": 0, "states": walk}], 1000, 0)
    assert 10 < len(starts) < 200
    turn = starts[:, None, 4] - starts[None, :, 4]
    gaps = starts[:, None] - starts[None]
    gaps[..., 4] = PX_PER_RAD * ((turn + np.pi) % (2 * np.pi) - np.pi)
    gaps = np.linalg.norm(gaps, axis=2)[~np.eye(len(starts), dtype=bool)]
    assert SPREAD_PX < gaps.min() < 2 * SPREAD_PX
    stuck = episode(1, False, steps=100, pace=0.1)
    assert len(choose_starts([stuck], 10, 0)[0]) == 1
    assert len(choose_starts([episode(1, False), episode(2, False)], 1000, 0)[0]) == 82  # same places, other episodes


def test_solved_states_are_skipped():
    solved = episode(1, True, steps=5)
    solved["states"][:, 2:] = GOAL
    nearly = episode(2, True, steps=5)
    nearly["states"][:, 2:] = GOAL[0] + 2, GOAL[1], GOAL[2]
    assert 0.94 < coverage(*nearly["states"][0, 2:]) < 0.95
    assert set(choose_starts([solved, nearly], 10, 0)[1][:, 0]) == {2}
    with pytest.raises(ValueError, match="visited"):
        choose_starts([solved], 10, 0)
    with pytest.raises(ValueError, match="visited"):
        choose_starts([], 10, 0)


@pytest.mark.parametrize("wrong", [np.zeros((3, 4)), np.zeros(5), np.zeros((0, 5)), np.full((3, 5), np.nan)])
def test_wrong_states(wrong):
    bad = episode(7, False) | {"states": wrong}
    with pytest.raises(ValueError, match="visited.* 7"):
        choose_starts([episode(1, False), bad], 10, 0)


# The set ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(visited, tmp_path_factory):
    """A set of 4 corrections made without interruption."""
    output = tmp_path_factory.mktemp("corrections") / "whole.zarr"
    assert make_corrections("pusht", visited=visited, output=output, **OPTIONS) == output
    return output


def contents(path):
    """Arrays by name and attributes of a set."""
    root = zarr.open_group(str(path), mode="r")
    names = ("data/state", "data/action", "data/img", "meta/episode_ends")
    return {name: root[name][:] for name in names}, root.attrs.asdict()


def same(path, expected):
    (arrays, attributes), (others, wanted) = contents(path), contents(expected)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], strict=True)
    return attributes == wanted


def episodes_of(arrays):
    return np.split(np.arange(len(arrays["data/state"])), arrays["meta/episode_ends"][:-1])


def test_layout(whole, visited):
    arrays, attributes = contents(whole)
    frames = arrays["meta/episode_ends"][-1]
    assert zarr.open_group(str(whole), mode="r").metadata.zarr_format == 2
    assert arrays["data/state"].shape == (frames, 5) and arrays["data/action"].shape == (frames, 2)
    assert arrays["data/state"].dtype == arrays["data/action"].dtype == np.float32
    assert arrays["meta/episode_ends"].dtype == np.int64 and len(arrays["meta/episode_ends"]) == 4
    np.testing.assert_array_equal(arrays["data/img"], render_states(arrays["data/state"], image_size=24), strict=True)
    starts, origins = choose_starts(visited, 4, 3)
    assert attributes["origins"] == origins.tolist() and attributes["unsolved"] == 0
    assert attributes["arguments"]["starts"] == starts.tolist()
    for rows, start in zip(episodes_of(arrays), starts, strict=True):
        np.testing.assert_array_equal(arrays["data/state"][rows[0]], start.astype(np.float32))


def test_actions_replay_to_success(whole):
    """From each first state at rest the environment of the rollouts passes the same states; the last action solves."""
    arrays, _ = contents(whole)
    world = PushT()
    for rows in episodes_of(arrays):
        world.reset_to(arrays["data/state"][rows[0]])
        successes = []
        for row in rows:
            np.testing.assert_array_equal(world.state.astype(np.float32), arrays["data/state"][row])
            successes.append(world.step(arrays["data/action"][row])[2]["success"])
        assert successes == [False] * (len(rows) - 1) + [True]


@pytest.mark.slow
def test_options_matter(whole, visited, tmp_path):
    expected, _ = contents(whole)
    for number, change in enumerate(({"seed": 4}, {"settings": "recovery"}, {"count": 2}, {"image_size": 32})):
        output = tmp_path / f"{number}.zarr"
        pusht_corrections.make_corrections(visited=visited, output=output, **(OPTIONS | change))
        arrays, attributes = contents(output)
        (name, value) = next(iter(change.items()))
        assert attributes["arguments"][name] == value
        if name == "count":
            assert len(arrays["meta/episode_ends"]) == 2
            np.testing.assert_array_equal(arrays["data/action"], expected["data/action"][: len(arrays["data/action"])])
        elif name == "image_size":
            assert arrays["data/img"].shape[1:] == (32, 32, 3)
        else:
            assert not np.array_equal(arrays["data/action"], expected["data/action"])


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_starts(whole, visited, tmp_path, monkeypatch):
    """Killed after the first of four episodes; the next one is given other states, and two processes."""
    output = tmp_path / "set.zarr"
    np.savez(tmp_path / "visited.npz", *(one["states"] for one in visited))
    program = (
        "import time, numpy as np; from envs import make_corrections; from envs.pusht import corrections as module\n"
        "save = module.save_correction\n"
        "def slow(path, start, seed, index, settings):\n"
        "    time.sleep(100 * (index > 0)); save(path, start, seed, index, settings)\n"
        "module.save_correction = slow\n"
        f"states = np.load({str(tmp_path / 'visited.npz')!r})\n"
        "visited = [{'seed': 100 + i, 'success': i > 2, 'score': 0.1 * i, 'states': states[f'arr_{i}']}"
        " for i in range(6)]\n"
        f"make_corrections('pusht', visited=visited, output={str(output)!r}, **{OPTIONS})\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)})
    partial, end = tmp_path / "set.zarr.partial", time.monotonic() + 60
    while not (partial / "000000.npz").exists() and run.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert len(list(partial.glob("*.npz"))) == 1 and not output.exists()
    first = (partial / "000000.npz").stat().st_mtime_ns

    def draw_and_stop(*arguments, **options):
        ensure_images(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(pusht_corrections, "ensure_images", draw_and_stop)
    with pytest.raises(KeyboardInterrupt):
        make_corrections("pusht", visited=visited[3:], output=output, **(OPTIONS | {"processes": 2}))
    assert (partial / "000000.npz").stat().st_mtime_ns == first and not output.exists()
    monkeypatch.undo()
    make_corrections("pusht", visited=[], output=output, **OPTIONS)
    assert same(output, whole) and not partial.exists()
    made = output.stat().st_mtime_ns
    make_corrections("pusht", visited=[], output=output, **OPTIONS)
    assert output.stat().st_mtime_ns == made


def test_unsolved_episodes_are_left_out(visited, tmp_path, monkeypatch):
    calls = []

    def plan(start, rng, settings):
        calls.append(start)
        solved = len(calls) % 2 == 0
        return np.tile(np.float32(start), (len(calls), 1)), np.ones((len(calls), 2), np.float32), solved

    monkeypatch.setattr(pusht_corrections, "plan_episode", plan)
    make_corrections("pusht", visited=visited, output=tmp_path / "a.zarr", **OPTIONS)
    arrays, attributes = contents(tmp_path / "a.zarr")
    assert arrays["meta/episode_ends"].tolist() == [2, 6] and attributes["unsolved"] == 2
    assert attributes["origins"] == attributes["arguments"]["origins"][1::2]
    np.testing.assert_array_equal(arrays["data/state"][[0, 2]], np.float32(calls)[[1, 3]])
    monkeypatch.setattr(pusht_corrections, "plan_episode", lambda *_: (np.empty((0, 5)), np.empty((0, 2)), False))
    with pytest.raises(ValueError, match="count"):
        make_corrections("pusht", visited=visited, output=tmp_path / "b.zarr", **OPTIONS)
    assert not (tmp_path / "b.zarr").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", 0),
        ("image_size", 0),
        ("seed", -1),
        ("settings", "best"),
        ("processes", 0),
        ("output", "set.npz"),
        ("output", "no/folder/set.zarr"),
        ("visited", [episode(7, False) | {"states": np.full((3, 5), np.inf)}]),
    ],
)
def test_wrong_arguments(key, value, visited, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=key):
        make_corrections("pusht", **({"visited": visited, "output": "set.zarr"} | OPTIONS | {key: value}))
    assert not list(tmp_path.iterdir())


def test_a_set_of_other_arguments_or_origin_is_kept(whole, visited, tmp_path):
    output = tmp_path / "set.zarr"
    shutil.copytree(whole, output)
    with pytest.raises(ValueError, match="seed: got 8, allowed: 3"):
        make_corrections("pusht", visited=visited, output=output, **(OPTIONS | {"seed": 8}))
    assert same(output, whole)
    (tmp_path / "mine.zarr").mkdir()
    with pytest.raises(ValueError, match="output"):
        make_corrections("pusht", visited=visited, output=tmp_path / "mine.zarr", **OPTIONS)


def test_other_environments_have_no_corrections():
    for name in ("robosuite", "fake_env:FakeEnv"):
        with pytest.raises(ValueError, match="task.env.name"):
            make_corrections(name, visited=[])
