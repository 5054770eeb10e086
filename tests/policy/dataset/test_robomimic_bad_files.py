"""Files that are no robomimic data set, or whose goals are unknown: one line that names the place."""

import json
import re
import zlib

import h5py
import numpy as np
import pytest
from robomimic_files import CAMERAS, MODEL, OLD, both, call, each, make_hdf5, new, set_attr, without

from envs import make_data
from eval.film_strip import read_demo
from policy.dataset.robomimic import hdf5_checks
from policy.dataset.robomimic.conversion import convert, ensure_zarr


def poke(name, frame, value):
    return lambda file: file[name].__setitem__(frame, value)


def remove(*names):
    """An ``edit`` of the file; ``without`` is of every demo."""
    return lambda file: [file.__delitem__(name) for name in names]


def add(name, values):
    return lambda file: file.__setitem__(name, values)


def replaced(name, values):
    return both(remove(name), add(name, values))


def env_args(**changes):
    return lambda file: file["data"].attrs.__setitem__("env_args", json.dumps(changes))


def controllers(config):
    return env_args(env_kwargs={"controller_configs": config})


def model(old, replacement, *, frame="world"):
    """Poses follow from the model alone, in which ``old`` is replaced."""
    changed = set_attr("model_file", MODEL.replace(old, replacement))
    return both(without("obs/robot0_eef_quat_site"), changed, controllers(new(input_ref_frame=frame)))


def linked(name, target, path="/data"):
    """``name`` is a link to ``path`` of the file ``target``."""
    return lambda file: (
        name in file and file.__delitem__(name),
        file.__setitem__(name, h5py.ExternalLink(target, path)),
    )


def elsewhere(name, shape, kind):
    """``name`` is a data set whose content lies in /etc/passwd."""

    def edit(file):
        del file[name]
        if kind == "external":
            file.create_dataset(name, shape, "u1", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])
        else:
            layout = h5py.VirtualLayout(shape, "f8")
            layout[:] = h5py.VirtualSource("/etc/passwd", "data", shape)
            file.create_virtual_dataset(name, layout)

    return edit


def unwritten(name, shape, **options):
    return both(remove(name), lambda file: file.create_dataset(name, shape, "f8", **options))


def described(**changes):
    """env_args that say such things of the controller."""
    return env_args(env_kwargs={"controller_configs": {**new(), **changes}})


IMAGE, POSE, SITE = f"obs/{CAMERAS[0]}", "obs/robot0_eef_pos", "obs/robot0_eef_quat_site"
BAD = {  # name: (edit, what the error names)
    "no data": (remove("data"), "got no demos"),
    "no demos": (remove(*(f"data/demo_{i}" for i in range(3))), "got no demos"),
    "other groups": (lambda f: f.move("data/demo_1", "data/episode_1"), "data/episode_1"),
    "link to a file": (linked("data/demo_1", "/etc/passwd"), "data/demo_1.*/etc/passwd"),
    "link to images": (linked(f"data/demo_1/{IMAGE}", "other.hdf5"), f"data/demo_1/{IMAGE}.*other.hdf5"),
    "link beside": (linked("extra", "other.hdf5"), "/extra.*other.hdf5"),
    "content elsewhere": (elsewhere(f"data/demo_1/{IMAGE}", (7, 8, 8, 3), "external"), f"demo_1/{IMAGE}.*/etc/passwd"),
    "virtual": (elsewhere(f"data/demo_1/{POSE}", (7, 3), "virtual"), f"demo_1/{POSE}.*virtual.*/etc/passwd"),
    "link to itself": (lambda f: f.__setitem__("data/demo_1/self", f["data"]), None),
    "soft link": (lambda f: f.__setitem__("data/demo_1/self", h5py.SoftLink("/data")), None),
    "dangling": (replaced(f"data/demo_1/{POSE}", h5py.SoftLink("/nowhere")), "in.hdf5"),
    "data is numbers": (replaced("data", np.zeros(3)), "got no demos"),
    "demo is numbers": (replaced("data/demo_1", np.zeros(3)), "data/demo_1: got no actions"),
    "obs is numbers": (replaced("data/demo_1/obs", np.zeros(3)), "data/demo_1/obs"),
    "actions is a group": (
        both(remove("data/demo_1/actions"), lambda f: f.create_group("data/demo_1/actions")),
        "data/demo_1/actions",
    ),
    "empty actions": (replaced("data/demo_1/actions", h5py.Empty("f8")), "data/demo_1/actions"),
    "records": (replaced("data/demo_1/actions", np.zeros(7, "f4,i8")), "data/demo_1/actions"),
    "samples in words": (lambda f: f["data/demo_1"].attrs.__setitem__("num_samples", "seven"), "demo_1: num_samples"),
    "samples in lists": (lambda f: f["data/demo_1"].attrs.__setitem__("num_samples", [7, 7]), "demo_1: num_samples"),
    "samples nan": (lambda f: f["data/demo_1"].attrs.__setitem__("num_samples", np.nan), "demo_1: num_samples"),
    "mask is numbers": (replaced("mask", np.zeros(3)), "mask"),
    "mask of numbers": (replaced("mask/train", np.zeros(3)), "mask/train"),
    "mask of groups": (lambda f: f.create_group("mask/train/x") if f.pop("mask/train", None) else None, "mask/train"),
    "mask of one": (replaced("mask/train", b"demo_1"), "mask/train"),
    "mask of bytes": (replaced("mask/train", np.array([b"\xff\xfe"])), "mask/train"),
    "mask of tables": (replaced("mask/train", np.array([[b"demo_1"]])), "mask/train"),
    "huge": (unwritten("data/demo_1/states", (10**12, 32), chunks=(1000, 32)), "demo_1/states"),
    "huge in one": (unwritten("data/demo_1/states", (10**12, 32)), "demo_1/states"),
    "unwritten": (unwritten("data/demo_1/states", (7, 32)), "demo_1/states: got 0 of 1 chunks"),
    "half written": (
        both(
            unwritten("data/demo_1/states", (7, 32), chunks=(4, 32)),
            lambda f: f["data/demo_1/states"].__setitem__(slice(4), 1.0),
        ),
        "demo_1/states: got 1 of 2 chunks",
    ),
    "env_args is a list": (lambda f: f["data"].attrs.__setitem__("env_args", "[1]"), "env_args"),
    "env_args is a number": (lambda f: f["data"].attrs.__setitem__("env_args", 3), "env_args"),
    "env_args is null": (lambda f: f["data"].attrs.__setitem__("env_args", "null"), "env_args"),
    "env_args is deep": (lambda f: f["data"].attrs.__setitem__("env_args", "[" * 60_000), "env_args"),
    "kwargs is a list": (env_args(env_kwargs=[1]), "controller_configs"),
    "controller in words": (env_args(env_kwargs={"controller_configs": "OSC_POSE"}), "controller_configs"),
    "parts in words": (described(body_parts="right"), "controller_configs"),
    "part in words": (described(body_parts={"right": "OSC_POSE"}), "controller_configs"),
    "ranges in words": (controllers(new(output_max="far")), "output_max"),
    "ranges nan": (controllers(new(output_max=float("nan"))), "output_max"),
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
    "part": (controllers({"type": "BASIC", "body_parts": {"right": {"type": "IK_POSE"}}}), "IK_POSE"),
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
    "no model": (both(without(SITE), each(lambda d: d.attrs.__delitem__("model_file"))), "demo_0: .*model_file"),
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


@pytest.mark.parametrize("case", ["joints", "large delta", "no pose", "actions of 8", "no model", "no env_args"])
def test_recorded_actions_need_no_controller(tmp_path, capsys, case):
    source = make_hdf5(tmp_path / "in.hdf5", edit=BAD[case][0])
    assert call(capsys, source, tmp_path / "out.zarr", "--actions", "recorded")[0] == 0


@pytest.mark.parametrize("case", ["link to a file", "link to images", "link beside", "content elsewhere", "virtual"])
def test_no_reader_follows_a_file_into_another(tmp_path, case):
    edit, message = BAD[case]
    source = make_hdf5(tmp_path / "in.hdf5", edit=edit)
    with pytest.raises(ValueError, match=message):
        make_data("robomimic_file", source=source, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=message):
        read_demo(source, "demo_0")


def test_a_chunk_that_decompresses_to_far_more_than_it_may_is_refused(tmp_path, monkeypatch):
    def edit(file):
        name = f"data/demo_1/{IMAGE}"
        del file[name]
        images = file.create_dataset(name, (7, 8, 8, 3), "u1", chunks=(1, 8, 8, 3), compression="gzip")
        images[:] = 1
        images.id.write_direct_chunk((3, 0, 0, 0), zlib.compress(bytes(4 << 20)))

    source = make_hdf5(tmp_path / "in.hdf5", edit=edit)
    monkeypatch.setattr(hdf5_checks, "SLACK", 1 << 20)
    with pytest.raises(ValueError, match=f"demo_1/{IMAGE}.* bytes when decompressed"):
        convert(source, tmp_path / "out.zarr")


def test_files_that_are_no_whole_hdf5(tmp_path, capsys):
    good = make_hdf5(tmp_path / "good.hdf5", size=64)
    content, words = good.read_bytes(), tmp_path / "words.hdf5"

    def refused(bad):
        words.write_bytes(bad)
        code, _, (error,) = call(capsys, words, tmp_path / "out.zarr")
        assert code == 1 and f"{words}: got" in error

    for bad in (b"", b"words", content[: len(content) // 2], content[:-1]):
        refused(bad)
    with h5py.File(good) as file:
        place = file[f"data/demo_2/obs/{CAMERAS[1]}"].id.get_chunk_info(0)
    broken = bytearray(content)
    broken[place.byte_offset : place.byte_offset + place.size] = bytes(place.size)
    refused(bytes(broken))
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
