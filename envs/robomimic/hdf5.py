"""robomimic's HDF5 (arXiv 2108.03298): recorded states drawn, one demo a part file, parts joined to one whole file.

Layout (L frames a demo): data (attributes total, env_args) / demo_i (attributes num_samples, model_file):
  actions (L, A), states (L, S)    as recorded; states before the action of the same row
  rewards (L,), dones (L,)         after it; dones as of dataset_states_to_obs --done_mode 2: success, and the end
  obs/{camera}_image (L, h, w, 3) uint8, gzip; obs/{low-dim key} (L, D) float64, of the states
and mask/{filter key}, names of demos. Each has a checksum of HDF5, fletcher32. There is no next_obs: robomimic reads it
only where load_next_obs asks for it (its offline RL, not its imitation learning), and it would double the file.
"""

import contextlib
import errno
import json
import re
from importlib import metadata
from pathlib import Path

import h5py
import numpy as np

from envs.robomimic.backend import INSTALL
from envs.robomimic.hdf5_checks import check_own, probe

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of the low-dimensional values what can be told from a state: robosuite's accelerations cannot.
LOW_DIM = re.compile(
    r"robot\d+_(right_|left_)?(eef_(pos|quat|quat_site)|gripper_(qpos|qvel)|joint_(pos|vel))|object", re.ASCII
)


def installed_version():
    """The version of robosuite, without importing it; ImportError naming the command when it is not there."""
    try:
        return metadata.version("robosuite")
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"robosuite: is not installed; to install it: {INSTALL}") from error


def draw_states(env, states):
    """What ``env`` (RobosuiteEnv) shows of ``states`` (L, S): ({obs key: (L, ...)}, success (L,) bool)."""
    frames, success = [], []
    for state in states:
        env.reset_to(state)
        low_dim = {key: value for key, value in env.low_dim().items() if LOW_DIM.fullmatch(key)}
        frames.append(low_dim | {f"{camera}_image": env.image(camera) for camera in env.cameras})
        success.append(env.success)
    return {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}, np.array(success)


def outcome(success):
    """rewards (L,) float64 and dones (L,) int64 of robomimic from the success (L,) after every action."""
    rewards = np.asarray(success, dtype=np.float64)
    dones = (rewards > 0).astype(np.int64)
    dones[-1] = 1
    return {"rewards": rewards, "dones": dones}


# Writing ---------------------------------------------------------------------------------------------------------


def write_part(path, datasets, *, attributes=None, **about):
    """One demo as the file ``path``; ``attributes`` are the demo's, ``about`` the part's."""
    with h5py.File(path, "w") as file:
        file.attrs.update(about)
        demo = file.create_group("demo")
        demo.attrs.update(attributes or {})
        for name, values in datasets.items():
            image = values.ndim == 4
            # A frame a chunk: data loaders read a few consecutive ones anywhere.
            options = {"chunks": (1, *values.shape[1:]), "compression": "gzip"} if image else {"chunks": values.shape}
            demo.create_dataset(name, data=values, fletcher32=True, **options)  # compared whenever a chunk is read


@contextlib.contextmanager
def new_file(path, *, env_args, arguments, **about):
    """A robomimic file at ``path`` to fill.

    arguments: what decides on its content; it and ``about`` are kept as attributes of the root, which robomimic does
    not read. env_args: a dict.
    """
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        file.attrs.update({"arguments": json.dumps(arguments), **about})
        yield file
        data.attrs["env_args"] = json.dumps(env_args, indent=4)
        data.attrs["total"] = sum(int(demo.attrs["num_samples"]) for demo in data.values())


def stored_arguments(path):
    """The ``arguments`` of a file of ``new_file``; KeyError, OSError or ValueError for another."""
    with h5py.File(path, "r") as file:
        return json.loads(file.attrs["arguments"])


# Reading ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_file(path):
    """The HDF5 ``path`` for reading; FileNotFoundError for none, ValueError for a damaged one, also found later.

    ValueError, too, where data of it lie in other files.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data set: got {path}, which is no file")
    probe(path)
    try:
        with h5py.File(path, "r") as file:
            check_own(file, path)
            yield file
    except (OSError, RuntimeError, KeyError, TypeError) as error:  # as h5py raises for damage
        if getattr(error, "errno", None) in FULL:  # of another file, which is being written from this one
            raise
        raise ValueError(f"{path}: got a file that is not a whole HDF5 ({error}), allowed: robomimic's HDF5") from error


def demo_names(file, path):
    """Names of the demos in the order of their numbers; ValueError for a file that is not robomimic's."""
    names = list(file["data"]) if isinstance(file.get("data"), h5py.Group) else []
    if not names or not all(re.fullmatch(r"demo_\d+", name) for name in names):
        raise ValueError(f"{path}: got no data/demo_0, data/demo_1, ..., allowed: robomimic's HDF5")
    return sorted(names, key=lambda name: int(name.removeprefix("demo_")))


def has_images(file, path):
    """Whether the demos of ``file`` come with images."""
    demo = file["data"][demo_names(file, path)[0]]
    obs = demo.get("obs") if isinstance(demo, h5py.Group) else None
    return isinstance(obs, h5py.Group) and any(key.endswith("_image") for key in obs)
