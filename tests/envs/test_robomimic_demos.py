"""Scripted experts, the demonstration program, and images drawn from the states of any robomimic HDF5."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from paths import ROOT

pytest.importorskip("robosuite")

from envs import make_data, robomimic_images  # noqa: E402
from envs.robomimic import demos as demo_maker  # noqa: E402
from envs.robomimic import images as image_maker  # noqa: E402
from envs.robomimic.demos import episode_seed, split  # noqa: E402
from envs.robomimic.env import RobosuiteEnv  # noqa: E402
from envs.robomimic.expert import LIMITS, run_episode  # noqa: E402
from envs.robomimic_demos import main  # noqa: E402

ROBOT = {"eef_pos": 3, "eef_quat": 4, "eef_quat_site": 4, "gripper_qpos": 2, "gripper_qvel": 2}
ROBOT |= {"joint_pos": 7, "joint_vel": 7}
LOW_DIM = {**{f"robot0_{key}": size for key, size in ROBOT.items()}, "object": 10}
IMAGES = ("agentview_image", "robot0_eye_in_hand_image")
SET = {"--task": "lift", "--episodes": 3, "--seed": 7, "--image-size": 32, "--processes": 1}


def command(output, *flags, **changes):
    """Arguments of the program for the small set, with changes such as episodes=2."""
    options = SET | {f"--{name.replace('_', '-')}": value for name, value in changes.items()} | {"--output": output}
    return [*flags, *(str(word) for pair in options.items() for word in pair)]


def contents(path):
    """{name: (attributes, array or None)} of everything in an HDF5 file."""
    found = {}

    def add(name, item):
        found[name] = dict(item.attrs), item[()] if isinstance(item, h5py.Dataset) else None

    with h5py.File(path, "r") as file:
        file.visititems(add)
    return found


def assert_same(path, expected):
    first, second = contents(path), contents(expected)
    assert first.keys() == second.keys()
    for name, (attributes, values) in first.items():
        assert attributes == second[name][0], name
        np.testing.assert_array_equal(values, second[name][1], err_msg=name)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """A set of 3 episodes of Lift, made by this process without interruption."""
    output = tmp_path_factory.mktemp("demos") / "lift.hdf5"
    assert main(command(output)) == 0
    return output


@pytest.fixture(scope="module")
def lift(demos):
    """The environment that this process made the demos with."""
    return demo_maker._environment("lift", demo_maker.CAMERAS, 32, False)


# Experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_expert_of_lift_succeeds(lift):
    for seed in (11, 12, 13):
        for recovery in (False, True):
            episode = run_episode(lift, seed, recovery=recovery)
            length = len(episode["actions"])
            assert episode["success"] and length < 80
            assert episode["rewards"][-5:].tolist() == [1.0] * 5 and episode["states"].shape == (length, 32)
            assert np.abs(episode["actions"]).max() <= 1
            assert {key: values.shape[1] for key, values in episode["low_dim"].items() if key in LOW_DIM} == LOW_DIM
    again = run_episode(lift, 13, recovery=True)
    np.testing.assert_array_equal(again["actions"], episode["actions"])
    assert not np.array_equal(run_episode(lift, 13)["states"][0], episode["states"][0])


@pytest.mark.slow
def test_the_expert_of_can_succeeds():
    env = RobosuiteEnv(task="PickPlaceCan", actions="recorded", cameras=())
    for seed, recovery in ((21, False), (22, True), (23, True)):
        episode = run_episode(env, seed, recovery=recovery)
        assert episode["success"] and len(episode["actions"]) < 200
        assert episode["low_dim"]["object"].shape[1] == 14
    env.close()


def test_the_expert_can_fail(lift, monkeypatch):
    monkeypatch.setitem(LIMITS, "Lift", 10)
    episode = run_episode(lift, 11)
    assert not episode["success"] and len(episode["actions"]) == 10


# The program ------------------------------------------------------------------------------------------------------


def test_layout(demos):
    with h5py.File(demos, "r") as file:
        data = file["data"]
        assert sorted(data) == ["demo_0", "demo_1", "demo_2"]
        env_args = json.loads(data.attrs["env_args"])
        assert env_args["env_name"] == "Lift" and env_args["type"] == 1 and env_args["reflections"] is False
        assert env_args["env_kwargs"]["camera_heights"] == 32
        assert data.attrs["total"] == sum(demo.attrs["num_samples"] for demo in data.values())
        for index, demo in enumerate(data[f"demo_{i}"] for i in range(3)):
            length = demo.attrs["num_samples"]
            assert demo["actions"].shape == (length, 7) and demo["states"].shape == (length, 32)
            assert demo["rewards"][()].tolist() == [0.0] * (length - 5) + [1.0] * 5
            np.testing.assert_array_equal(demo["dones"], demo["rewards"])
            assert set(demo["obs"]) == {*LOW_DIM, *IMAGES} and "next_obs" not in demo
            for key, size in LOW_DIM.items():
                assert demo["obs"][key].shape == (length, size) and demo["obs"][key].dtype == np.float64
            for key in IMAGES:
                image = demo["obs"][key]
                assert image.shape == (length, 32, 32, 3) and image.dtype == np.uint8 and image.compression == "gzip"
            assert demo.attrs["seed"] == episode_seed(7, index, 0) and demo.attrs["recovery"] == (index == 1)
            assert demo.attrs["model_file"].startswith("<mujoco") and str(Path.home()) not in demo.attrs["model_file"]
        masks = {name: {member.decode() for member in file["mask"][name]} for name in file["mask"]}
        assert sorted(map(len, masks.values())) == [1, 2] and masks["train"] | masks["valid"] == set(data)


def test_seeds_are_disjoint_and_the_split_is_nine_to_one():
    seeds = [episode_seed(s, i, a) for s in (0, 1, 2**32 - 1) for i in (0, 1, 10**6) for a in (0, 15)]
    assert len(set(seeds)) == len(seeds) and min(seeds) > 10**9 and max(seeds) < 2**64
    parts = split(200, 3)
    assert len(parts["valid"]) == 20 and sorted([*parts["train"], *parts["valid"]]) == list(range(200))
    assert not np.array_equal(split(200, 4)["valid"], parts["valid"])
    assert [len(part) for part in split(1, 0).values()] == [1, 0]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_set(demos, tmp_path, capsys):
    """The killed one works with two processes, which end with it; what they finished is not made again."""
    output, partial = tmp_path / "set.hdf5", tmp_path / "set.hdf5.partial"
    words = [sys.executable, "-m", "envs.robomimic_demos", *command(output, processes=2)]
    run = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not (done := list(partial.glob("*.hdf5"))) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=60)  # the workers hold the pipe too: this ends when they have ended
    assert done and not output.exists()
    before = {path: path.stat().st_mtime_ns for path in partial.glob("*.hdf5")}
    assert main(command(output, seed=8)) == 1
    assert "seed: got 8" in capsys.readouterr().err
    made = []
    original = demo_maker.make_episode

    def noting(path, *job):
        made.append(path)
        original(path, *job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_maker, "make_episode", noting)
        assert main(command(output)) == 0
    assert len(made) == 3 - len(before) and not set(made) & set(before)
    assert_same(output, demos)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    assert main(command(output)) == 0 and "is complete" in capsys.readouterr().out


def test_failed_episodes_are_drawn_again_and_counted(tmp_path, monkeypatch, capsys):
    seeds = []

    def fail_twice(env, seed, *, recovery):
        seeds.append(seed)
        return run_episode(env, seed, recovery=recovery) | {"success": len(seeds) != 1 and len(seeds) != 3}

    monkeypatch.setattr(demo_maker, "run_episode", fail_twice)
    assert main(command(tmp_path / "a.hdf5", "--no-images", episodes=2, recovery=0)) == 0
    assert seeds == [episode_seed(7, index, attempt) for index in (0, 1) for attempt in (0, 1)]
    assert "succeeded in 50.0%, 2 failures" in capsys.readouterr().out
    with h5py.File(tmp_path / "a.hdf5", "r") as file:
        assert [file["data"][f"demo_{i}"].attrs["seed"] for i in (0, 1)] == [seeds[1], seeds[3]]
        assert set(file["data/demo_0/obs"]) == set(LOW_DIM)
    monkeypatch.setattr(demo_maker, "run_episode", lambda *a, **k: {"success": False})
    assert main(command(tmp_path / "b.hdf5", "--no-images", episodes=1)) == 1
    assert "error: the expert of lift failed 16 times in a row" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key, value",
    [("task", "square"), ("episodes", 0), ("image_size", 0), ("recovery", 2), ("seed", -1), ("output", "set.zarr")],
)
def test_bad_arguments(key, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = {"output": "set.hdf5", key: value}
    assert main(command(**options)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {key}: got ") and str(value) in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_maker_makes_a_set_once(tmp_path, capsys, monkeypatch, demos):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    options = {"cache_dir": tmp_path / "cache", "task": "lift", "episodes": 1, "seed": 7, "image_size": 32}
    path = make_data("robomimic_demos", **options)
    assert "making 1 expert demonstrations of lift once" in capsys.readouterr().out
    assert path.parent == tmp_path / "cache" and "seed7" in path.name and "32px" in path.name
    for name, (_, values) in contents(path).items():
        if name.startswith("data/demo_0/"):
            np.testing.assert_array_equal(values, contents(demos)[name][1])
    assert make_data("robomimic_demos", **options) == path and not capsys.readouterr().out
    for key, value in (("task", "nut"), ("episodes", 0), ("seed", -1), ("image_size", 0)):
        with pytest.raises(ValueError, match=key):
            make_data("robomimic_demos", **options | {key: value})


# What is in a set -------------------------------------------------------------------------------------------------


def test_robomimic_reads_the_set(demos):
    pytest.importorskip("robomimic")
    from robomimic.utils import obs_utils
    from robomimic.utils.dataset import SequenceDataset

    low_dim = ["robot0_eef_pos", "object"]
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": low_dim, "rgb": list(IMAGES)}})
    options = {"frame_stack": 2, "seq_length": 10, "filter_by_attribute": "train", "load_next_obs": False}
    keys = {"obs_keys": [*low_dim, *IMAGES], "dataset_keys": ["actions", "rewards", "dones"]}
    dataset = SequenceDataset(hdf5_path=str(demos), **keys, **options)
    with h5py.File(demos, "r") as file:
        lengths = [file["data"][name.decode()].attrs["num_samples"] for name in file["mask/train"]]
    assert len(dataset) == sum(lengths)
    sample = dataset[3]
    assert sample["actions"].shape == (11, 7) and sample["obs"]["agentview_image"].shape == (11, 32, 32, 3)
    assert sample["obs"]["object"].shape == (11, 10)


def test_recorded_actions_replay_to_success(demos, lift):
    for name in ("data/demo_0", "data/demo_1"):
        found = contents(demos)
        states, actions, hand = (found[f"{name}/{key}"][1] for key in ("states", "actions", "obs/robot0_eef_pos"))
        lift.reset_to(states[0])
        moved = []
        for action in actions:
            moved.append(lift.low_dim()["robot0_eef_pos"])
            success = lift.step(action)[2]["success"]
        assert success
        assert np.abs(np.stack(moved) - hand).max() < 0.01


def test_states_images_and_values_agree(demos, lift):
    with h5py.File(demos, "r") as file:
        demo = file["data/demo_1"]
        for row in (20, 3):
            lift.reset_to(demo["states"][row])
            low_dim = lift.low_dim()
            for key in LOW_DIM:
                np.testing.assert_array_equal(demo["obs"][key][row], low_dim[key], err_msg=key)
            for camera in lift.cameras:
                np.testing.assert_array_equal(demo["obs"][f"{camera}_image"][row], lift.image(camera))
        to_cube = demo["obs/object"][:, :3] - demo["obs/robot0_eef_pos"]
        np.testing.assert_allclose(demo["obs/object"][:, 7:], to_cube, rtol=0, atol=1e-9)  # not of the row before


# Images for other files -------------------------------------------------------------------------------------------


@pytest.fixture
def bare(demos, tmp_path):
    """The set without obs, rewards and dones, as recorded raw; with something of its own."""
    path = tmp_path / "raw.hdf5"
    shutil.copy(demos, path)
    with h5py.File(path, "a") as file:
        file["data"].attrs["collector"] = "me"
        for demo in file["data"].values():
            del demo["obs"], demo["rewards"], demo["dones"]
            demo["extra"] = np.arange(3)
    return path


def draw(source, output, *words):
    return robomimic_images.main([str(source), str(output), "--image-size", "32", "--processes", "1", *words])


def change_env_args(path, **changes):
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = json.dumps(json.loads(file["data"].attrs["env_args"]) | changes)


def test_images_of_a_raw_file_are_those_of_the_set(bare, demos, tmp_path, capsys, monkeypatch):
    output, render, done = tmp_path / "out.hdf5", image_maker.render_demo, []

    def stop_at_one(*job):
        if done:
            raise KeyboardInterrupt
        done.append(job)
        render(*job)

    monkeypatch.setattr(image_maker, "render_demo", stop_at_one)
    assert draw(bare, output) == 130 and not output.exists()
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.undo()
    assert draw(bare, output) == 0
    assert "only the states" not in capsys.readouterr().out
    found, expected = contents(output), contents(demos)
    for name in expected:
        np.testing.assert_array_equal(found[name][1], expected[name][1], err_msg=name)
    extra = {f"data/demo_{i}/extra" for i in range(3)}
    assert found.keys() - expected.keys() == extra
    assert found["data"][0]["collector"] == "me" and found["data/demo_2"][0] == expected["data/demo_2"][0]
    assert draw(bare, output) == 0 and "is complete" in capsys.readouterr().out
    assert draw(bare, output, "--cameras", "agentview") == 1
    assert "cameras: got ['agentview']" in capsys.readouterr().err


def test_models_of_other_versions_are_left_alone(bare, demos, tmp_path, capsys):
    change_env_args(bare, env_version="1.4.1")
    with h5py.File(bare, "a") as file:
        for demo in file["data"].values():
            demo.attrs["model_file"] = "<mujoco>of another version</mujoco>"
            demo["rewards"] = np.full(demo.attrs["num_samples"], 0.25)
    assert draw(bare, tmp_path / "out.hdf5", "--cameras", "robot0_eye_in_hand") == 0
    assert "only the states are restored" in capsys.readouterr().out
    found, expected = contents(tmp_path / "out.hdf5"), contents(demos)
    name = "data/demo_0/obs/robot0_eye_in_hand_image"
    np.testing.assert_array_equal(found[name][1], expected[name][1])
    assert "data/demo_0/obs/agentview_image" not in found
    assert set(found["data/demo_0/rewards"][1]) == {0.25}  # what was there stays
    np.testing.assert_array_equal(found["data/demo_0/dones"][1], expected["data/demo_0/dones"][1])


def _narrow_states(file):
    for demo in file["data"].values():
        states = demo.pop("states")[()]
        demo["states"] = states[:, :31]


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda file: file.pop("data/demo_1/states"), "data/demo_1: got no states"),
        (_narrow_states, "data/demo_0: state: got shape (31,)"),
        (lambda file: file["data/demo_0"].attrs.__setitem__("model_file", "<mujoco>"), "data/demo_0: model_file"),
        ({"type": 2}, "env_args type: got 2"),
        ({"env_version": "2.0.1"}, "env_version: got '2.0.1'"),
        ({"env_name": "Lifting"}, "env_name: got 'Lifting' (did you mean 'Lift'?)"),
        (lambda file: file["data"].attrs.pop("env_args"), "attribute env_args"),
        (lambda file: file.pop("data"), "got no data/demo_0"),
    ],
)
def test_files_that_cannot_be_drawn(damage, words, bare, tmp_path, capsys):
    if isinstance(damage, dict):
        change_env_args(bare, **damage)
    else:
        with h5py.File(bare, "a") as file:
            damage(file)
    assert draw(bare, tmp_path / "out.hdf5") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error and "raw.hdf5" in error
    assert not (tmp_path / "out.hdf5").exists()


def test_bad_sources_and_options(bare, tmp_path, capsys):
    (tmp_path / "short.hdf5").write_bytes(bare.read_bytes()[:-1000])
    (tmp_path / "text.hdf5").write_text("no HDF5")
    for source in (tmp_path / f"{name}.hdf5" for name in ("short", "text", "missing")):
        assert draw(source, tmp_path / "out.hdf5") == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and str(source) in error and error.count("\n") == 1
    for option, value in (("image-size", "0"), ("cameras", ""), ("processes", "0"), ("cameras", "nowhere")):
        assert draw(bare, tmp_path / "out.hdf5", f"--{option}", value) == 1
        assert f"{option.replace('-', '_')}: got" in capsys.readouterr().err
    assert draw(bare, tmp_path / "out.zarr") == 1 and "output: got" in capsys.readouterr().err


@pytest.mark.slow
def test_the_maker_draws_a_file_once(bare, demos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    options = {"cache_dir": tmp_path / "cache", "image_size": 32}
    path = make_data("robomimic_file", source=bare, **options)
    assert "drawing the images of" in capsys.readouterr().out and path.parent == tmp_path / "cache"
    name = "data/demo_2/obs/agentview_image"
    np.testing.assert_array_equal(contents(path)[name][1], contents(demos)[name][1])
    assert make_data("robomimic_file", source=str(bare), **options) == path and not capsys.readouterr().out
    assert make_data("robomimic_file", source=demos, **options) == demos
    (tmp_path / "x.zarr").mkdir()
    assert make_data("robomimic_file", source=tmp_path / "x.zarr", **options) == tmp_path / "x.zarr"
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        make_data("robomimic_file", source=tmp_path / "none.hdf5", **options)
