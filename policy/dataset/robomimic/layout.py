"""What a robomimic HDF5 holds: its layout, checked over all demos, and its numbers, checked as they are read."""

import contextlib
import json
import re
from typing import NamedTuple

import h5py
import numpy as np


class Layout(NamedTuple):
    """A checked file: names of its demos, the frame after the last of each (E,), {dataset: (shape per frame, type)}."""

    demos: list
    ends: np.ndarray
    datasets: dict
    env_args: dict
    filter_keys: dict

    @property
    def images(self):
        """What is too large to be held at once: {dataset: (shape per frame, type)}."""
        return {key: spec for key, spec in self.datasets.items() if key.startswith("obs/") and len(spec[0]) == 3}

    @property
    def low_dim(self):
        return [key for key in self.datasets if key.startswith("obs/") and key not in self.images]


@contextlib.contextmanager
def reading(source):
    """Errors of the HDF5 library as one ValueError; what is written in here would be blamed on the file."""
    try:
        yield
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{source}: got a file that is not a whole HDF5 ({error}), allowed: robomimic's HDF5"
        ) from error


def read_layout(file, path):
    """Check the shapes of all demos; ValueError names the demo and the dataset."""
    data = file.get("data")
    names = list(data) if isinstance(data, h5py.Group) else []
    if not names or not all(re.fullmatch(r"demo_\d+", name) for name in names):
        got = f"data/{next(n for n in names if not re.fullmatch(r'demo_[0-9]+', n))}" if names else "no demos"
        raise ValueError(f"{path}: got {got}, allowed: robomimic's HDF5 with data/demo_0, data/demo_1, ...")
    demos = sorted(names, key=lambda name: int(name.removeprefix("demo_")))
    try:
        env_args = dict(json.loads(data.attrs["env_args"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: data: got no readable attribute env_args ({error}), allowed: robomimic's") from error
    datasets, lengths = None, []
    for name in demos:
        found, length = _read_shapes(data[name], f"{path}: data/{name}")
        datasets = datasets or found
        for key in sorted(found.keys() ^ datasets.keys()):
            raise ValueError(
                f"{path}: data/{name}/{key}: got {'one' if key in found else 'none'}, allowed: the same datasets as in"
                f" {demos[0]}"
            )
        for key, spec in found.items():
            if spec != datasets[key]:
                raise ValueError(f"{path}: data/{name}/{key}: got {spec}, allowed: {datasets[key]} as in {demos[0]}")
        lengths.append(length)
    filter_keys = {}
    for name, members in file.get("mask", {}).items():
        members = [member.decode() for member in members[:]]
        unknown = sorted(set(members) - set(demos))
        if unknown:
            raise ValueError(f"{path}: mask/{name}: got {unknown[0]}, allowed: demos of this file")
        filter_keys[name] = sorted(demos.index(member) for member in members)
    layout = Layout(demos, np.cumsum(lengths), datasets, env_args, filter_keys)
    if not any(key.endswith("_image") for key in layout.images):
        cure = f"python -m envs.robomimic_images {path} {path.with_name(f'{path.stem}_image.hdf5')}"
        raise ValueError(
            f"{path}: got no images in obs ({', '.join(layout.low_dim) or 'nothing'}), allowed: obs/..._image; {cure}"
            " renders them from the states"
        )
    return layout


def _read_shapes(demo, where):
    """({dataset: (shape per frame, kind of its type)}, frames) of one demo."""
    if not isinstance(demo, h5py.Group) or "actions" not in demo:
        raise ValueError(f"{where}: got no actions, allowed: a group with actions and obs")
    keys = [key for key in ("actions", "actions_abs", "states") if key in demo]
    obs = demo.get("obs", {})
    keys += [f"obs/{key}" for key in obs]
    length = int(demo.attrs.get("num_samples", len(demo["actions"])))
    datasets = {}
    for key in keys:
        dataset = demo[key]
        shape = getattr(dataset, "shape", ())
        if not shape or dataset.dtype.kind not in "biuf" or key in ("obs/action", "obs/state"):
            raise ValueError(f"{where}/{key}: got {dataset}, allowed: numbers (T, ...), not called action or state")
        if key in ("actions", "actions_abs", "states") and len(shape) != 2:
            raise ValueError(f"{where}/{key}: got shape {shape}, allowed: (T, numbers)")
        if key.endswith("_image") and (len(shape) != 4 or shape[3] != 3 or dataset.dtype != np.uint8):
            raise ValueError(f"{where}/{key}: got {dataset.dtype} {shape}, allowed: uint8 (T, h, w, 3)")
        if shape[0] != length or length < 1:
            raise ValueError(f"{where}/{key}: got {shape[0]} frames, allowed: {length}, its num_samples, at least 1")
        datasets[key] = shape[1:], "uint8" if dataset.dtype == np.uint8 else "float32"
    return datasets, length


def finite(file, demo, key, path, selection=slice(None)):
    """Frames ``selection`` of a dataset as float64; ValueError names the demo and the frame of NaN, inf or overflow."""
    with reading(path):
        values = file["data"][demo][key][selection].astype(np.float64)
    bad = ~(np.abs(values) <= np.finfo(np.float32).max)
    if bad.any():
        frame = int(np.argwhere(bad)[0][0]) + (selection.start or 0)
        raise ValueError(f"{path}: data/{demo}/{key}: got NaN or inf in frame {frame}, allowed: finite numbers")
    return values
