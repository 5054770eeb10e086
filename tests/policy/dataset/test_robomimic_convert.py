"""robomimic's HDF5 to zarr: contents, and goals of the controller by hand and against robosuite."""

import sys
import types

import h5py
import numpy as np
import pytest
import zarr
from robomimic_files import CAMERAS, OLD, both, call, each, make_hdf5, new, read, without

from policy.build import build_datasets
from policy.dataset.replay_buffer import ReplayBuffer
from policy.dataset.robomimic.conversion import convert
from policy.dataset.robomimic.rotation import matrix_to_6d, rotvec_to_matrix
from policy.files import digest

HAND_TO_SITE = rotvec_to_matrix([0, np.pi / 2, 0]) @ rotvec_to_matrix([0, 0, 2 * np.arctan2(0.6, 0.8)])
BASE = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1.0]])
BASE_POSITION = np.array([1, 2.1, 3.5])


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
    assert attrs["source"] == {"name": "in.hdf5", "bytes": source.stat().st_size, "sha256": digest(source)}
    assert attrs["filter_keys"] == {"train": [0, 2], "valid": [1]} and attrs["actions"] == "recorded"
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.zarr"]


def test_filter_keys_count_the_episodes_of_the_zarr(tmp_path):
    """Files may lack numbers: demo_2 is then the second episode."""
    source = make_hdf5(tmp_path / "in.hdf5", edit=lambda f: (f.__delitem__("data/demo_1"), f.__delitem__("mask/valid")))
    attrs = zarr.open_group(str(convert(source, tmp_path / "out.zarr")), mode="r").attrs
    assert attrs["filter_keys"] == {"train": [0, 1]}


@pytest.mark.parametrize(("filter_key", "demos"), [("train", [0, 2]), ("valid", [1]), (None, [0, 1, 2])])
def test_only_the_demos_of_a_filter_key_are_converted(tmp_path, capsys, filter_key, demos):
    source, output = make_hdf5(tmp_path / "in.hdf5"), tmp_path / "out.zarr"
    assert call(capsys, source, output, *(("--filter-key", filter_key) if filter_key else ()))[0] == 0
    root = zarr.open_group(str(output), mode="r")
    np.testing.assert_array_equal(np.diff(root["meta/episode_ends"][:], prepend=0), np.array([5, 7, 3])[demos])
    with h5py.File(source) as file:
        images = [file[f"data/demo_{demo}/obs/{CAMERAS[0]}"][:] for demo in demos]
    np.testing.assert_array_equal(root[f"data/{CAMERAS[0]}"][:], np.concatenate(images))
    keys = {"train": [0, 2], "valid": [1]}
    expected = {name: [demos.index(demo) for demo in members if demo in demos] for name, members in keys.items()}
    assert root.attrs["filter_keys"] == expected and root.attrs["filter_key"] == filter_key
    other = "valid" if filter_key == "train" else "train"
    code, _, (error,) = call(capsys, source, output, "--filter-key", other)
    assert code == 1 and "output: got" in error
    code, _, (error,) = call(capsys, source, tmp_path / "x.zarr", "--filter-key", "test")
    assert code == 1 and "filter_key: got 'test', allowed: train, valid" in error


def test_training_on_a_filter_key_sees_its_episodes_only(tmp_path):
    path = convert(make_hdf5(tmp_path / "in.hdf5"), tmp_path / "out.zarr")
    shape_meta = {"obs": {"pos": {"source": "robot0_eef_pos", "shape": [3], "type": "low_dim"}}}
    shape_meta["action"] = {"source": "action", "shape": [10], "type": "low_dim"}
    model = {"name": "diffusion", "horizon": 4, "obs_steps": 2}
    data = {"val_ratio": 0.5, "max_train_episodes": None, "pad_after": 3}

    def episodes(**changes):
        parts = build_datasets(path, shape_meta=shape_meta, model=model, data={**data, **changes}, seed=0)
        return [part.episodes.tolist() if part else [] for part in parts]

    assert sorted(sum(episodes(filter_key="train"), [])) == [0, 2]
    assert episodes(filter_key="valid", val_ratio=0) == [[1], []]
    assert sorted(sum(episodes(), [])) == sorted(sum(episodes(filter_key=None), [])) == [0, 1, 2]
    with pytest.raises(ValueError, match="data.filter_key: got 'test', allowed: train, valid"):
        episodes(filter_key="test")
    root = zarr.open_group(str(path), mode="r+")
    for wrong in ([], [3], ["demo_0"], [0.5], "train", None):
        root.attrs["filter_keys"] = {"train": wrong}
        with pytest.raises(ValueError, match="filter_keys"):
            episodes(filter_key="train")
    del root.attrs["filter_keys"]
    with pytest.raises(ValueError, match="data.filter_key: got 'train', allowed: null"):
        episodes(filter_key="train")


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
    fill = each(lambda demo: demo.create_dataset("obs/depth", data=np.full((len(demo["actions"]), 8, 8, 1), 0.1)))
    source = make_hdf5(tmp_path / "in.hdf5", edit=fill)
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


def test_a_delta_beyond_its_range_by_rounding_is_clipped(tmp_path):
    actions, source = converted(tmp_path, edit=lambda f: f["data/demo_1/actions"].__setitem__((2, 0), 1 + 5e-7))
    assert actions[7, 0] == np.float32(read(source, "obs/robot0_eef_pos")[7, 0] + 0.05)


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
