"""robomimic's HDF5 to zarr: contents, goals of the controller (also against robosuite), interruptions, bad files."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import types

import h5py
import numpy as np
import pytest
import zarr
from paths import ROOT

from policy.dataset.replay_buffer import ReplayBuffer
from policy.dataset.robomimic import conversion as robomimic
from policy.dataset.robomimic.__main__ import main
from policy.dataset.robomimic.conversion import convert, ensure_zarr
from policy.dataset.robomimic.rotation import matrix_to_6d, rotvec_to_matrix
from policy.files import digest

CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")
OLD = {"type": "OSC_POSE", "control_delta": True}
# The robot stands turned by a quarter; its grip site is turned against its hand, by two bodies in between.
MODEL = """<mujoco><worldbody>
<body name="table" pos="9 9 9"/>
<body name="robot0_base" pos="1 2 3" quat="0.5 0 0 0.5">
  <body name="robot0_link0" pos="0 0 0.5"><site name="robot0_right_center" pos="0.1 0 0"/>
    <body name="robot0_link1"><joint name="robot0_joint1"/>
      <body name="robot0_right_hand" quat="0.6 0.8 0 0"><site name="robot0_ee"/>
        <body name="gripper0_right_gripper" pos="0 0 1" quat="0.7071067811865476 0 0.7071067811865476 0">
          <body name="gripper0_finger"><joint name="gripper0_slide"/></body>
          <body name="gripper0_eef"><site name="gripper0_right_grip_site" quat="0.8 0 0 0.6"/>
          <site name="gripper0_right_grip_site_cylinder"/></body>
</body></body></body></body></body></worldbody></mujoco>"""
HAND_TO_SITE = rotvec_to_matrix([0, np.pi / 2, 0]) @ rotvec_to_matrix([0, 0, 2 * np.arctan2(0.6, 0.8)])
BASE = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]])
BASE_POSITION = np.array([1, 2.1, 3.5])


def new(**changes):
    """A controller description of robosuite 1.5."""
    return {"type": "BASIC", "body_parts": {"right": {"type": "OSC_POSE", "input_ref_frame": "world", **changes}}}


def make_hdf5(path, *, lengths=(5, 7, 3), arms=1, size=8, controller=None, edit=None, seed=0):
    """A small file in robomimic's format with random contents; ``edit`` changes the open file at the end."""
    rng = np.random.default_rng(seed)
    kwargs = {"controller_configs": new() if controller is None else controller}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_version": "", "type": 1, "env_kwargs": kwargs})
        data.attrs["total"] = sum(lengths)
        for number, length in enumerate(lengths):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = length
            demo.attrs["model_file"] = MODEL
            demo["actions"] = rng.uniform(-1, 1, (length, 7 * arms))
            demo["states"] = rng.normal(size=(length, 32))
            demo["rewards"], demo["dones"] = np.zeros(length), np.zeros(length)
            for camera in CAMERAS:
                images = rng.integers(0, 256, (length, size, size, 3), dtype=np.uint8)
                demo.create_dataset(f"obs/{camera}", data=images, compression="gzip")
            for arm in range(arms):
                demo[f"obs/robot{arm}_eef_pos"] = rng.normal(size=(length, 3))
                demo[f"obs/robot{arm}_eef_quat"] = rng.normal(size=(length, 4))
                demo[f"obs/robot{arm}_eef_quat_site"] = rng.normal(size=(length, 4))
            demo["next_obs/object"] = rng.normal(size=(length, 4))
        file["mask/train"] = np.array([f"demo_{n}" for n in (2, 0) if n < len(lengths)], dtype="S")
        file["mask/valid"] = np.array([f"demo_{n}" for n in (1,) if n < len(lengths)], dtype="S")
        if edit:
            edit(file)
    return path


def each(change):
    """An ``edit`` of every demo."""

    def edit(file):
        for demo in file["data"].values():
            change(demo)

    return edit


def without(*names):
    def change(demo):
        for name in names:
            del demo[name]

    return each(change)


def set_attr(name, value):
    return each(lambda demo: demo.attrs.__setitem__(name, value))


def both(*edits):
    return lambda file: [edit(file) for edit in edits]


def read(path, key):
    """All demos of a dataset after each other."""
    with h5py.File(path) as file:
        names = sorted(file["data"], key=lambda name: int(name[5:]))
        return np.concatenate([file[f"data/{name}/{key}"][:] for name in names])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def call(capsys, *arguments):
    """(exit code, standard output, error lines) of the program."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, [line for line in captured.err.splitlines() if line.startswith("error:")]


def test_everything_arrives(tmp_path):
    """Demos by number, not by name; every dataset of obs and the states, exact; next_obs and rewards stay behind."""
    source = make_hdf5(tmp_path / "in.hdf5", lengths=[60, 3, 9, 1, 2, 30, 4, 5, 6, 7, 8, 40])
    output = convert(source, tmp_path / "sub" / "out.zarr", actions="recorded")
    root = zarr.open_group(str(output), mode="r")
    assert root.metadata.zarr_format == 2
    np.testing.assert_array_equal(root["meta/episode_ends"][:], np.cumsum([60, 3, 9, 1, 2, 30, 4, 5, 6, 7, 8, 40]))
    low_dim = {"robot0_eef_pos", "robot0_eef_quat", "robot0_eef_quat_site"}
    assert set(root["data"].array_keys()) == {*CAMERAS, *low_dim, "action", "state"}
    for camera in CAMERAS:
        assert root[f"data/{camera}"].dtype == np.uint8 and root[f"data/{camera}"].chunks == (64, 8, 8, 3)
        np.testing.assert_array_equal(root[f"data/{camera}"][:], read(source, f"obs/{camera}"))
    for key in low_dim:
        np.testing.assert_array_equal(root[f"data/{key}"][:], read(source, f"obs/{key}").astype(np.float32))
    np.testing.assert_array_equal(root["data/action"][:], read(source, "actions").astype(np.float32))
    np.testing.assert_array_equal(root["data/state"][:], read(source, "states"))
    assert root["data/state"].dtype == np.float64 and root["meta/episode_ends"].dtype == np.int64
    attrs = dict(root.attrs)
    assert attrs["env_args"]["env_name"] == "Lift" and attrs["env_args"]["env_kwargs"]["controller_configs"] == new()
    assert attrs["source"] == {
        "name": "in.hdf5",
        "bytes": source.stat().st_size,
        "sha256": digest(source),
    }
    assert attrs["filter_keys"] == {"train": [0, 2], "valid": [1]} and attrs["actions"] == "recorded"
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.zarr"]


def test_filter_keys_count_the_episodes_of_the_zarr(tmp_path):
    """Files may lack numbers: demo_2 is then the second episode."""
    source = make_hdf5(tmp_path / "in.hdf5", edit=lambda f: (f.__delitem__("data/demo_1"), f.__delitem__("mask/valid")))
    attrs = zarr.open_group(str(convert(source, tmp_path / "out.zarr")), mode="r").attrs
    assert attrs["filter_keys"] == {"train": [0, 1]}


def test_the_replay_buffer_reads_it_even_where_all_is_black(tmp_path):
    """zarr leaves out chunks of zeros unless told otherwise, and the buffer refuses missing ones."""

    def blacken(demo):
        for name in (f"obs/{CAMERAS[0]}", "obs/robot0_eef_pos", "states"):
            demo[name][...] = 0

    source = make_hdf5(tmp_path / "in.hdf5", lengths=(70, 70), edit=each(blacken))
    images = {name: {"source": name, "shape": [3, 8, 8], "type": "rgb"} for name in CAMERAS}
    low_dim = {
        "pos": {"source": "robot0_eef_pos", "shape": [3], "type": "low_dim"},
        "state": {"source": "state", "shape": [32], "type": "low_dim"},
        "action": {"source": "action", "shape": [10], "type": "low_dim"},
    }
    buffer = ReplayBuffer.open(convert(source, tmp_path / "out.zarr"), {**images, **low_dim})
    np.testing.assert_array_equal(buffer.arrays[CAMERAS[1]], read(source, f"obs/{CAMERAS[1]}"))
    assert not buffer.arrays[CAMERAS[0]].any() and buffer.arrays["action"].shape == (140, 10)


def test_depth_images_are_streamed_as_floats(tmp_path):
    source = make_hdf5(
        tmp_path / "in.hdf5",
        edit=each(lambda demo: demo.create_dataset("obs/depth", data=np.full((len(demo["actions"]), 8, 8, 1), 0.1))),
    )
    depth = zarr.open_group(str(convert(source, tmp_path / "out.zarr")), mode="r")["data/depth"]
    assert depth.dtype == np.float32 and depth.shape == (15, 8, 8, 1) and (depth[:] == np.float32(0.1)).all()


# --- Goals of the controller -----------------------------------------------------------------------------------------


def converted(tmp_path, **options):
    """(actions of the zarr, source) of a synthetic file."""
    source = make_hdf5(tmp_path / "in.hdf5", **options)
    return zarr.open_group(str(convert(source, tmp_path / "out.zarr")), mode="r")["data/action"][:], source


def quat_rotation(quat):
    """By way of the axis and the angle, not by way of the function under test."""
    quat = quat / np.linalg.norm(quat, axis=-1, keepdims=True)
    axis = quat[:, :3] / np.linalg.norm(quat[:, :3], axis=-1, keepdims=True)
    return rotvec_to_matrix(axis * 2 * np.arccos(quat[:, 3:]))


def joined(position, rotation, gripper):
    return np.concatenate([position, matrix_to_6d(rotation), gripper], axis=1)


def sites(source, arm=0):
    """Rotations of the grip site, as the file has them."""
    return quat_rotation(read(source, f"obs/robot{arm}_eef_quat_site"))


def expected_deltas(source, *, rotation=None, scale=(0.05, 0.5), base=None, arm=0):
    actions = read(source, "actions")[:, 7 * arm : 7 * arm + 7]
    base = np.eye(3) if base is None else base
    position = read(source, f"obs/robot{arm}_eef_pos") + scale[0] * actions[:, :3] @ base.T
    turn = rotvec_to_matrix(scale[1] * actions[:, 3:6] @ base.T)  # the axis seen from the world
    return joined(position, turn @ (sites(source, arm) if rotation is None else rotation), actions[:, 6:])


@pytest.mark.parametrize(
    ("controller", "base"),
    [
        (new(), None),
        (OLD, None),
        ([OLD], None),
        (new(input_ref_frame="base"), BASE),
        ({"type": "BASIC", "body_parts": {"right": {"type": "OSC_POSE"}}}, BASE),  # 1.5's default frame
        ({"type": "BASIC", "body_parts": {"arms": {"right": {"type": "OSC_POSE"}}}}, BASE),
    ],
    ids=["new", "old", "list", "base", "default", "arms"],
)
@pytest.mark.parametrize("has_site", [True, False])
def test_deltas(tmp_path, controller, base, has_site):
    """The site's rotation counts where the file has it, whatever the hand's; else hand and model tell it."""
    edit = None if has_site else without("obs/robot0_eef_quat_site")
    actions, source = converted(tmp_path, edit=edit, controller=controller)
    rotation = None if has_site else quat_rotation(read(source, "obs/robot0_eef_quat")) @ HAND_TO_SITE
    np.testing.assert_allclose(actions, expected_deltas(source, rotation=rotation, base=base), atol=1e-6)


def test_the_ranges_of_the_controller_count(tmp_path):
    """Lists and numbers, asymmetric ones too: an action of 0 is then not a delta of 0."""
    ranges = {"input_min": [-2] * 6, "input_max": 2, "output_min": [-0.1, 0, 0, -1, 0, 0], "output_max": 0.5}
    actions, source = converted(tmp_path, controller=new(**ranges))
    recorded, low = read(source, "actions"), np.array(ranges["output_min"])
    deltas = low + (recorded[:, :6] + 2) / 4 * (0.5 - low)
    position = read(source, "obs/robot0_eef_pos") + deltas[:, :3]
    expected = joined(position, rotvec_to_matrix(deltas[:, 3:]) @ sites(source), recorded[:, 6:])
    np.testing.assert_allclose(actions, expected, atol=1e-6)


@pytest.mark.parametrize(("controller", "kept"), [(OLD, True), (new(), False)])
def test_a_rotation_of_zero_keeps_the_goal_up_to_robosuite_1_4(tmp_path, controller, kept):
    """But never that of the episode before."""

    def stop_turning(demo):
        demo["actions"][0, 3:6] = 0
        demo["actions"][2:4, 3:6] = 0

    actions, source = converted(tmp_path, controller=controller, edit=each(stop_turning))
    expected = expected_deltas(source)
    if kept:
        for first in (0, 5, 12):
            expected[first + 2 : min(first + 4, 15), 3:9] = expected[first + 1, 3:9]
    np.testing.assert_allclose(actions, expected, atol=1e-6)
    np.testing.assert_allclose(actions[[0, 5, 12], 3:9], matrix_to_6d(sites(source)[[0, 5, 12]]), atol=1e-6)


@pytest.mark.parametrize(
    ("controller", "base", "origin"),
    [
        ({**OLD, "control_delta": False}, np.eye(3), np.zeros(3)),
        (new(input_type="absolute"), np.eye(3), np.zeros(3)),
        (new(input_type="absolute", input_ref_frame="base"), BASE, BASE_POSITION),
    ],
    ids=["old", "world", "base"],
)
def test_absolute_actions_are_taken_over(tmp_path, controller, base, origin):
    """Not scaled, free of any range, with no need of poses."""

    def enlarge(demo):
        demo["actions"][...] *= 2

    edit = both(each(enlarge), without("obs/robot0_eef_pos", "obs/robot0_eef_quat", "obs/robot0_eef_quat_site"))
    actions, source = converted(tmp_path, controller=controller, edit=edit)
    recorded = read(source, "actions")
    expected = joined(recorded[:, :3] @ base.T + origin, base @ rotvec_to_matrix(recorded[:, 3:6]), recorded[:, 6:])
    np.testing.assert_allclose(actions, expected, atol=1e-6)


def add_goals(demo):
    demo["actions_abs"] = np.random.default_rng(len(demo["actions"])).normal(size=demo["actions"].shape)


@pytest.mark.parametrize("frame", ["world", "base"])
def test_goals_in_the_file_count_unless_their_frame_is_unknown(tmp_path, frame):
    """The file does not say in which frame those of a controller in the base's frame were written.

    The gripper is that of the actions, which controllers take as it is.
    """
    actions, source = converted(tmp_path, edit=each(add_goals), controller=new(input_ref_frame=frame))
    goals = read(source, "actions_abs")
    expected = joined(goals[:, :3], rotvec_to_matrix(goals[:, 3:6]), read(source, "actions")[:, 6:])
    if frame == "base":
        expected = expected_deltas(source, base=BASE)
    np.testing.assert_allclose(actions, expected, atol=1e-6)


def test_two_arms_have_their_own_poses_and_controllers(tmp_path):
    other = new(output_min=-0.2, output_max=0.2)
    actions, source = converted(tmp_path, arms=2, controller=[new(), other])
    assert actions.shape == (15, 20)
    for arm, scale in enumerate([(0.05, 0.5), (0.2, 0.2)]):
        expected = expected_deltas(source, scale=scale, arm=arm)
        np.testing.assert_allclose(actions[:, 10 * arm : 10 * arm + 10], expected, atol=1e-6)


def robosuite_episode(frame):
    """(observations, actions, goal positions and rotations in the world, model XML) of a random episode of Lift."""
    pytest.importorskip("robosuite")
    import robosuite
    from robosuite.controllers import load_composite_controller_config

    config = load_composite_controller_config(controller="BASIC")
    config["body_parts"]["right"]["input_ref_frame"] = frame
    off = dict.fromkeys(("has_renderer", "has_offscreen_renderer", "use_camera_obs"), False)
    env = robosuite.make("Lift", robots="Panda", controller_configs=config, seed=3, **off)
    model_file = env.sim.model.get_xml()
    rng, obs, actions, goals = np.random.default_rng(0), [], [], []
    for step in range(25):
        env.sim.forward()
        obs.append(env._get_observations(force_update=True))
        action = np.clip(rng.normal(size=7), -1, 1) * [1, 1, 1, 0, 0, 0, 1] if step % 5 == 0 else rng.uniform(-1, 1, 7)
        env.step(action)
        arm = env.robots[0].composite_controller.part_controllers["right"]
        position, rotation = arm.goal_pos, arm.goal_ori
        if frame == "base":
            position, rotation = arm.origin_pos + arm.origin_ori @ position, arm.origin_ori @ rotation
        actions.append(action)
        goals.append(joined(position[None], rotation[None], action[None, 6:])[0])
    env.close()
    return config, obs, np.array(actions), np.array(goals), model_file


@pytest.mark.parametrize("frame", ["world", "base"])
def test_the_goals_are_robosuites_own(tmp_path, monkeypatch, frame):
    """From the hand's rotation, from the site's, and from robosuite's own goals as absolute actions."""
    macros = types.ModuleType("robosuite.macros_private")
    macros.CONSOLE_LOGGING_LEVEL = "ERROR"
    monkeypatch.setitem(sys.modules, "robosuite.macros_private", macros)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    config, obs, actions, goals, model_file = robosuite_episode(frame)
    keys = ("robot0_eef_pos", "robot0_eef_quat", "robot0_eef_quat_site")

    def fill(file):
        demo = file["data/demo_0"]
        for key in keys:
            demo[f"obs/{key}"][...] = [step[key] for step in obs]
        demo["actions"][...] = actions
        demo.attrs["model_file"] = model_file

    options = {"lengths": [25], "controller": config}
    for name, edit in (("site", fill), ("hand", both(fill, without("obs/robot0_eef_quat_site")))):
        source = make_hdf5(tmp_path / f"{name}.hdf5", edit=edit, **options)
        result = zarr.open_group(str(convert(source, tmp_path / f"{name}.zarr")), mode="r")["data/action"][:]
        np.testing.assert_allclose(result, goals, atol=2e-6)
    moved = np.abs(goals[:, :3] - [step["robot0_eef_pos"] for step in obs]).max(axis=1)
    assert (moved > 0.01).all() and np.ptp(goals[:, 3:9], axis=0).max() > 0.1  # else anything would agree


# --- Interruptions ---------------------------------------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
import policy.dataset.robomimic.conversion as robomimic
robomimic.BLOCK_BYTES = 1
save = robomimic.write_whole
def save_and_die(path, content):
    save(path, content)
    if json.loads(content)["frames"] == 128:
        os.kill(os.getpid(), signal.SIGKILL)
robomimic.write_whole = save_and_die
robomimic.convert(sys.argv[1], sys.argv[2])
"""


def interrupted(source, output):
    """A conversion killed after 128 frames; returns the folder it leaves."""
    result = subprocess.run([sys.executable, "-c", KILLED, source, output], cwd=ROOT, capture_output=True, check=False)
    assert result.returncode == -9 and not output.exists()
    return output.with_name(f"{output.name}.partial")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(source, interrupted conversion, folder) to copy from."""
    folder = tmp_path_factory.mktemp("killed")
    source = make_hdf5(folder / "in.hdf5", lengths=(100, 150, 50))
    return source, interrupted(source, folder / "out.zarr")


def test_a_killed_conversion_goes_on_where_it_stopped(killed, tmp_path, capsys):
    source, left = killed
    partial = shutil.copytree(left, tmp_path / "out.zarr.partial")
    chunks = [partial / "zarr" / "data" / name / f"{chunk}.0.0.0" for name in CAMERAS for chunk in (0, 1)]
    before = [chunk.stat().st_mtime_ns for chunk in chunks]
    assert not (partial / "zarr/data" / CAMERAS[0] / "2.0.0.0").exists()
    code, out, errors = call(capsys, source, tmp_path / "out.zarr")
    assert (code, errors) == (0, []) and "after 128 of 300 frames" in out and not partial.exists()
    assert [(tmp_path / "out.zarr" / c.relative_to(partial / "zarr")).stat().st_mtime_ns for c in chunks] == before
    convert(source, tmp_path / "whole.zarr")
    assert contents(tmp_path / "out.zarr") == contents(tmp_path / "whole.zarr")


@pytest.mark.parametrize("change", ["source", "options"])
def test_another_source_or_other_options_start_afresh(killed, tmp_path, capsys, change):
    source, left = killed
    shutil.copytree(left, tmp_path / "out.zarr.partial")
    if change == "source":
        source = make_hdf5(tmp_path / "in.hdf5", lengths=(100, 150, 50), seed=1)
    kind = "absolute" if change == "source" else "recorded"
    code, out, _ = call(capsys, source, tmp_path / "out.zarr", "--actions", kind)
    assert code == 0 and "starting afresh" in out
    assert contents(tmp_path / "out.zarr") == contents(convert(source, tmp_path / "whole.zarr", actions=kind))


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, capsys):
    (tmp_path / "out.zarr.partial").mkdir()
    (tmp_path / "out.zarr.partial" / "thesis.tex").touch()
    code, _, (error,) = call(capsys, make_hdf5(tmp_path / "in.hdf5"), tmp_path / "out.zarr")
    assert code == 1 and "thesis.tex" in error and (tmp_path / "out.zarr.partial" / "thesis.tex").exists()


def test_what_is_there_stays_and_something_else_is_refused(tmp_path, capsys):
    source, output = make_hdf5(tmp_path / "in.hdf5"), tmp_path / "out.zarr"
    assert call(capsys, source, output)[0] == 0
    before = contents(output)
    code, out, _ = call(capsys, source, output)
    assert code == 0 and f"already there: {output}" in out
    for words in (
        "3 episodes, 15 frames",
        "action float32 (10,)",
        "agentview_image uint8 (8, 8, 3)",
        "state float64 (32,)",
    ):
        assert words in out
    for arguments in ((source, output, "--actions", "recorded"), (make_hdf5(tmp_path / "b.hdf5", seed=1), output)):
        code, _, (error,) = call(capsys, *arguments)
        assert code == 1 and f"output: got {output}" in error
    (tmp_path / "folder").mkdir()
    assert "got" in call(capsys, source, tmp_path / "folder")[2][0]
    assert contents(output) == before


def test_a_full_disk_is_one_line_and_can_be_resumed(tmp_path, capsys, monkeypatch):
    """A limit on the size of files stands for the disk: the second chunk, of noise, exceeds it."""
    monkeypatch.setattr(robomimic, "BLOCK_BYTES", 1)
    black = np.zeros((64, 64, 64, 3), np.uint8)
    calm = each(lambda demo: [demo[f"obs/{name}"].write_direct(black, np.s_[:], np.s_[:64]) for name in CAMERAS])
    source = make_hdf5(tmp_path / "in.hdf5", lengths=(80,), size=64, edit=calm)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        code, _, errors = call(capsys, source, tmp_path / "out.zarr")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and len(errors) == 1 and not (tmp_path / "out.zarr").exists()
    assert "out.zarr.partial" in errors[0] and "File too large" in errors[0]
    code, out, _ = call(capsys, source, tmp_path / "out.zarr")
    assert code == 0 and "after 64 of 80 frames" in out


def test_the_cache_notices_a_changed_source(tmp_path, capsys):
    source, cache = make_hdf5(tmp_path / "in.hdf5"), tmp_path / "cache"
    first = ensure_zarr(source, cache)
    assert ensure_zarr(source, cache) == first and ensure_zarr(source, cache, actions="recorded") != first
    assert capsys.readouterr().out.count("converting 15 frames") == 2
    stamp = source.stat()
    make_hdf5(source, seed=1)
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    second = ensure_zarr(source, cache)
    assert second != first and first.exists() and sorted(cache.iterdir()) == sorted({*cache.iterdir(), first, second})
    images = zarr.open_group(str(second), mode="r")[f"data/{CAMERAS[0]}"][:]
    np.testing.assert_array_equal(images, read(source, f"obs/{CAMERAS[0]}"))


def test_askers_at_once_get_one_complete_result(tmp_path, capsys):
    """Threads stand for processes: the lock belongs to the open file."""
    source, cache = make_hdf5(tmp_path / "in.hdf5", lengths=(200, 200)), tmp_path / "cache"
    results, barrier = [], threading.Barrier(4)

    def ask():
        barrier.wait()
        path = ensure_zarr(source, cache)
        results.append((path, zarr.open_group(str(path), mode="r").attrs["complete"]))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(results[0][0], True)] * 4 and [path.name for path in cache.iterdir()] == [results[0][0].name]
    assert capsys.readouterr().out.count("converting 400 frames") == 1


# --- Bad files -------------------------------------------------------------------------------------------------------


def poke(name, frame, value):
    def edit(file):
        file[name][frame] = value

    return edit


def replaced(name, values):
    def edit(file):
        del file[name]
        file[name] = values

    return edit


def env_args(**changes):
    return lambda file: file["data"].attrs.__setitem__("env_args", json.dumps(changes))


def remove(*names):
    """An ``edit`` of the file; ``without`` is of every demo."""

    def edit(file):
        for name in names:
            del file[name]

    return edit


def add(name, values):
    return lambda file: file.__setitem__(name, values)


def controllers(config):
    return env_args(env_kwargs={"controller_configs": config})


def model(old, replacement, *, frame="world"):
    """Poses follow from the model alone, in which ``old`` is replaced."""
    changed = set_attr("model_file", MODEL.replace(old, replacement))
    return both(without("obs/robot0_eef_quat_site"), changed, controllers(new(input_ref_frame=frame)))


IMAGE, POSE, SITE = f"obs/{CAMERAS[0]}", "obs/robot0_eef_pos", "obs/robot0_eef_quat_site"
BAD = {  # name: (edit, what the error names)
    "no data": (remove("data"), "got no demos"),
    "no demos": (remove(*(f"data/demo_{i}" for i in range(3))), "got no demos"),
    "other groups": (lambda f: f.move("data/demo_1", "data/episode_1"), "data/episode_1"),
    "no env_args": (lambda f: f["data"].attrs.__delitem__("env_args"), "env_args"),
    "bad env_args": (lambda f: f["data"].attrs.__setitem__("env_args", "{"), "env_args"),
    "no images": (without(*(f"obs/{name}" for name in CAMERAS)), r"envs.robomimic_images \S*in.hdf5 \S*in_image.hdf5"),
    "no obs": (without("obs"), "got no images"),
    "float image": (replaced(f"data/demo_1/{IMAGE}", np.zeros((7, 8, 8, 3))), f"demo_1/{IMAGE}"),
    "grey image": (replaced(f"data/demo_0/{IMAGE}", np.zeros((5, 8, 8), "u1")), f"demo_0/{IMAGE}"),
    "image shape": (replaced(f"data/demo_1/{IMAGE}", np.zeros((7, 9, 8, 3), "u1")), rf"demo_1/{IMAGE}.*\(9, 8, 3\)"),
    "words": (replaced(f"data/demo_0/{POSE}", b"words"), f"demo_0/{POSE}"),
    "missing key": (remove(f"data/demo_2/{POSE}"), f"demo_2/{POSE}: got none"),
    "missing states": (remove("data/demo_2/states"), "demo_2/states: got none"),
    "more keys": (replaced("data/demo_1/next_obs", 1), None),
    "extra key": (add("data/demo_1/obs/more", np.zeros((7, 2))), "demo_1/obs/more: got one"),
    "key shape": (replaced("data/demo_1/states", np.zeros((7, 31))), "demo_1/states.*31.*32"),
    "action shape": (replaced("data/demo_1/actions", np.zeros(7)), r"demo_1/actions.*\(7,\)"),
    "no actions": (remove("data/demo_1/actions"), "data/demo_1: got no actions"),
    "obs length": (replaced(f"data/demo_1/{POSE}", np.zeros((6, 3))), f"demo_1/{POSE}: got 6"),
    "num_samples": (lambda f: f["data/demo_1"].attrs.__setitem__("num_samples", 8), "demo_1/actions.* 7 .* 8"),
    "empty": (both(remove("data/demo_0"), add("data/demo_0/actions", np.zeros((0, 7)))), "demo_0/actions: got 0"),
    "mask": (add("mask/more", np.array([b"demo_7"])), "mask/more: got demo_7"),
    "obs called action": (each(lambda d: d.__setitem__("obs/action", d["actions"][:])), "obs/action"),
    "nan action": (poke("data/demo_1/actions", 3, np.nan), "demo_1/actions.* frame 3"),
    "inf obs": (poke(f"data/demo_2/{POSE}", 1, np.inf), f"demo_2/{POSE}.* frame 1"),
    "huge obs": (poke(f"data/demo_2/{POSE}", 1, 1e39), f"demo_2/{POSE}.* frame 1"),
    "nan state": (poke("data/demo_2/states", 1, np.nan), "demo_2/states.* frame 1"),
    "large delta": (poke("data/demo_1/actions", (2, 4), -1.001), "demo_1: actions: got -1.001 in frame 2, column 4"),
    "joints": (controllers({"type": "JOINT_POSITION"}), "JOINT_POSITION"),
    "part": (
        controllers({"type": "BASIC", "body_parts": {"right": {"type": "IK_POSE"}}}),
        "IK_POSE.*--actions recorded",
    ),
    "mobile": (controllers({**new(), "type": "HYBRID_MOBILE_BASE"}), "HYBRID_MOBILE_BASE"),
    "no controller": (env_args(env_kwargs={}), "controller_configs"),
    "variable gains": (controllers(new(impedance_mode="variable")), "impedance_mode"),
    "delta ignored": (controllers({**new(), "control_delta": False}), "control_delta"),
    "old in 1.5": (
        env_args(env_version="1.5.1", env_kwargs={"controller_configs": {**OLD, "control_delta": False}}),
        "control_delta",
    ),
    "input type": (controllers(new(input_type="both")), "input_type"),
    "ranges": (controllers(new(output_max=[1, 2])), "output_max"),
    "actions of 8": (each(lambda d: replaced("actions", np.zeros((d.attrs["num_samples"], 8)))(d)), "actions: got 8"),
    "goals of 6": (each(lambda d: d.__setitem__("actions_abs", d["actions"][:, :6])), "actions_abs"),
    "no pose": (without(POSE), f"demo_0: got no {POSE}"),
    "no rotation": (without("obs/robot0_eef_quat", SITE), "demo_0: got no .*obs/robot0_eef_quat"),
    "zero rotation": (poke(f"data/demo_1/{SITE}", 1, 0), f"demo_1: {SITE}"),
    "no model": (
        both(without(SITE), each(lambda d: d.attrs.__delitem__("model_file"))),
        "demo_0: .*no attribute model_file",
    ),
    "no xml": (both(without(SITE), set_attr("model_file", "<a")), "model_file that is no XML"),
    "no world": (both(without(SITE), set_attr("model_file", "<a/>")), "model_file without worldbody"),
    "no site": (model("grip_site", "grip"), "got 0 grip sites"),
    "joint between": (model('"gripper0_eef">', '"gripper0_eef"><joint name="twist"/>'), "gripper0_eef.*twist"),
    "angles": (model('quat="0.8 0 0 0.6"', 'euler="0 0 1"'), "gripper0_right_grip_site.*euler"),
    "mobile base": (model('pos="0 0 0.5">', '><joint name="wheel"/>', frame="base"), "robot0_link0.*wheel"),
    "no base": (model("robot0_right_center", "center", frame="base"), "got 0 sites robot0_right_center"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_clear_line_and_leave_nothing(tmp_path, capsys, case):
    edit, message = BAD[case]
    source = make_hdf5(tmp_path / "in.hdf5", edit=edit)
    code, _, errors = call(capsys, source, tmp_path / "out.zarr")
    if message is None:  # what is not read may be anything
        assert (code, errors) == (0, [])
        return
    assert code == 1 and len(errors) == 1 and re.search(message, errors[0]), errors
    assert str(source) in errors[0] and [path.name for path in tmp_path.iterdir()] == ["in.hdf5"]


@pytest.mark.parametrize("case", ["joints", "large delta", "no pose", "actions of 8", "no model"])
def test_recorded_actions_need_no_controller(tmp_path, capsys, case):
    source = make_hdf5(tmp_path / "in.hdf5", edit=BAD[case][0])
    assert call(capsys, source, tmp_path / "out.zarr", "--actions", "recorded")[0] == 0


def test_a_delta_beyond_its_range_by_rounding_is_clipped(tmp_path):
    actions, source = converted(tmp_path, edit=poke("data/demo_1/actions", (2, 0), 1 + 5e-7))
    assert actions[7, 0] == np.float32(read(source, "obs/robot0_eef_pos")[7, 0] + 0.05)


def test_files_that_are_no_whole_hdf5(tmp_path, capsys):
    good = make_hdf5(tmp_path / "good.hdf5", size=64)
    content, words = good.read_bytes(), tmp_path / "words.hdf5"
    for bad in (b"", b"words", content[: len(content) // 2], content[:-1]):
        words.write_bytes(bad)
        code, _, (error,) = call(capsys, words, tmp_path / "out.zarr")
        assert code == 1 and f"{words}: got" in error
    with h5py.File(good) as file:
        place = file[f"data/demo_2/obs/{CAMERAS[1]}"].id.get_chunk_info(0)
    broken = bytearray(content)
    broken[place.byte_offset : place.byte_offset + place.size] = bytes(place.size)
    words.write_bytes(broken)
    code, _, (error,) = call(capsys, words, tmp_path / "out.zarr")
    assert code == 1 and f"{words}: got" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.hdf5", "words.hdf5"]


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("data set", ["none.hdf5", "out.zarr"]),
        ("output", ["in.hdf5", "out.zarr.zip"]),
        ("actions", ["in.hdf5", "out.zarr", "--actions", "relative"]),
    ],
)
def test_bad_arguments(tmp_path, capsys, monkeypatch, key, arguments):
    monkeypatch.chdir(tmp_path)
    make_hdf5(tmp_path / "in.hdf5")
    code, _, (error,) = call(capsys, *arguments)
    assert code == 1 and f"{key}: got" in error and [path.name for path in tmp_path.iterdir()] == ["in.hdf5"]
    with pytest.raises(FileNotFoundError):
        ensure_zarr(tmp_path / "none.hdf5", tmp_path)
