"""Small files in robomimic's format, edits of them, and the program that converts them."""

import functools
import json

import commands
import h5py
import numpy as np

from policy.dataset.robomimic.__main__ import main

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
    return lambda file: [change(demo) for demo in file["data"].values()]


def without(*names):
    return each(lambda demo: [demo.__delitem__(name) for name in names])


def set_attr(name, value):
    return each(lambda demo: demo.attrs.__setitem__(name, value))


def both(*edits):
    return lambda file: [edit(file) for edit in edits]


def read(path, key):
    """All demos of a dataset after each other."""
    with h5py.File(path) as file:
        names = sorted(file["data"], key=lambda name: int(name[5:]))
        return np.concatenate([file[f"data/{name}/{key}"][:] for name in names])


call = functools.partial(commands.call, main)
