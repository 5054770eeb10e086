"""What a robomimic HDF5 holds: its layout, checked over all demos, and its numbers, checked as they are read."""

import contextlib
import json
import re
from typing import NamedTuple

import h5py
import numpy as np

from policy.dataset.robomimic.hdf5_checks import check_own, check_stored
from policy.registry import choose

# What h5py raises for damage.
DAMAGE = (OSError, KeyError, RuntimeError, TypeError, OverflowError, MemoryError)


class Layout(NamedTuple):
    """A checked file: names of its demos, the frame after the last of each (E,), {dataset: (shape per frame, type)}.

    env_args: None where the file has none; filter_keys: {name: positions in ``demos``}.
    """

    demos: list
    ends: np.ndarray
    datasets: dict
    env_args: dict | None
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
    except (
        OSError,
        KeyError,
        RuntimeError,
        TypeError,
        OverflowError,
        MemoryError,
    ) as error:  # as h5py raises for damage
        raise ValueError(
            f"{source}: got a file that is not a whole HDF5 ({error}), allowed: robomimic's HDF5"
        ) from error


def read_layout(file, path, filter_key=None):
    """Check the shapes of all demos, or of those that mask/``filter_key`` names; ValueError names the place."""
    check_own(file, path)
    data = file.get("data")
    names = list(data) if isinstance(data, h5py.Group) else []
    if not names or not all(re.fullmatch(r"demo_\d+", name) for name in names):
        got = f"data/{next(n for n in names if not re.fullmatch(r'demo_[0-9]+', n))}" if names else "no demos"
        raise ValueError(f"{path}: got {got}, allowed: robomimic's HDF5 with data/demo_0, data/demo_1, ...")
    demos = sorted(names, key=lambda name: int(name.removeprefix("demo_")))
    masks = _read_masks(file, demos, path)
    if filter_key is not None:
        choose("filter_key", filter_key, [name for name, mask in masks.items() if mask])
        demos = masks[filter_key]
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
    filter_keys = {name: [demos.index(demo) for demo in mask if demo in demos] for name, mask in masks.items()}
    layout = Layout(demos, np.cumsum(lengths), datasets, _read_env_args(data, path), filter_keys)
    if not any(key.endswith("_image") for key in layout.images):
        cure = f"python -m envs.robomimic_images {path} {path.with_name(f'{path.stem}_image.hdf5')}"
        raise ValueError(
            f"{path}: got no images in obs ({', '.join(layout.low_dim) or 'nothing'}), allowed: obs/..._image; {cure}"
            " renders them from the states"
        )
    return layout


def _read_env_args(data, path):
    """The attribute env_args, parsed; None where there is none."""
    if "env_args" not in data.attrs:
        return None
    try:
        return dict(json.loads(data.attrs["env_args"]))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: data: got no readable attribute env_args ({error}), allowed: robomimic's") from error


def _read_masks(file, demos, path):
    """{filter key: its demos, in the order of ``demos``}."""
    group, masks = file.get("mask", {}), {}
    if not isinstance(group, (dict, h5py.Group)):
        raise ValueError(f"{path}: mask: got {group}, allowed: a group of lists of demos")
    for name, mask in group.items():
        try:
            members = [member.decode() for member in mask[:].tolist()]
        except (AttributeError, TypeError, ValueError) as error:  # a group, numbers, a table, no text
            raise ValueError(f"{path}: mask/{name}: got {mask}, allowed: a list of demos") from error
        unknown = sorted(set(members) - set(demos))
        if unknown:
            raise ValueError(f"{path}: mask/{name}: got {unknown[0]}, allowed: demos of this file")
        masks[name] = sorted(set(members), key=demos.index)
    return masks


def _read_shapes(demo, where):
    """({dataset: (shape per frame, kind of its type)}, frames) of one demo."""
    if not isinstance(demo, h5py.Group) or "actions" not in demo:
        raise ValueError(f"{where}: got no actions, allowed: a group with actions and obs")
    keys = [key for key in ("actions", "actions_abs", "states") if key in demo]
    obs = demo.get("obs", {})
    if not isinstance(obs, (dict, h5py.Group)):
        raise ValueError(f"{where}/obs: got {obs}, allowed: a group of numbers (T, ...)")
    keys += [f"obs/{key}" for key in obs]
    length, datasets = _read_length(demo, where), {}
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
        check_stored(dataset, f"{where}/{key}")
        datasets[key] = shape[1:], "uint8" if dataset.dtype == np.uint8 else "float32"
    return datasets, length


def _read_length(demo, where):
    """Frames of a demo: its num_samples, else those of its actions."""
    length = demo.attrs.get("num_samples", (getattr(demo["actions"], "shape", None) or [0])[0])
    try:
        return int(np.asarray(length).item())
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: num_samples: got {length!r}, allowed: a number") from error


def finite(file, demo, key, path, selection=slice(None)):
    """Frames ``selection`` of a dataset as float64; ValueError names the demo and the frame of NaN, inf or overflow."""
    with reading(path):
        values = file["data"][demo][key][selection].astype(np.float64)
    bad = ~(np.abs(values) <= np.finfo(np.float32).max)
    if bad.any():
        frame = int(np.argwhere(bad)[0][0]) + (selection.start or 0)
        raise ValueError(f"{path}: data/{demo}/{key}: got NaN or inf in frame {frame}, allowed: finite numbers")
    return values
