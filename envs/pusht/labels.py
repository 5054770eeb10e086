"""Pictures and clips whose classes the simulator knows: classification without a download, and what an encoder sees.

A label set is a small zarr beside the zarr of its pictures: data/label_<task> (F,) int64, the class of a frame or of
the clip that starts there, -1 for none; meta/episode_ends; attributes classes {task: names}, images, the path of the
zarr with data/img as seen from the set's folder, and span {task: frames that a clip of this task covers}.
"""

import hashlib
import os
from pathlib import Path

import h5py
import numpy as np
import zarr
from numpy.lib.stride_tricks import sliding_window_view

from envs.pusht.geometry import CORNERS
from envs.pusht.scenes import ensure_images, ensure_scenes, open_group, read_array
from envs.pusht_demos import write_zarr
from envs.robomimic.expert import TASKS
from envs.robomimic.hdf5 import demo_names
from envs.robomimic_demos import ensure_demos
from envs.shared.rendered_zarr import write_rendered

VERSION = 1  # raise it when the same states get other labels
MARGIN_PX, MARGIN_DEGREES = 2.0, 2.0  # scenes this close to another class have none
OCTANTS = [f"{angle}-{angle + 45}" for angle in range(0, 360, 45)]
# The edges of the T in the order of CORNERS, left and right as on an upright T.
SIDES = [
    "bar top",
    "bar right end",
    "under the bar right",
    "stem right",
    "stem bottom",
    "stem left",
    "under the bar left",
    "bar left end",
]
TURNS = ["counter-clockwise", "clockwise", "still"]
CAMERA = "agentview"


# Push-T: scenes ----------------------------------------------------------------------------------------------------


def labels(task, states):
    """Class (n,) int64 of each of ``states`` (n, 5), -1 within 2 px or 2 degrees of another class.

    task "octant": how far the T of the picture is turned clockwise from upright, in steps of 45 degrees; "side": which
    side of the T the agent's centre is nearest to; where a corner is nearest, that of its two which faces it more.
    """
    if task not in SCENE_TASKS:
        raise ValueError(f"task: got {task!r}, allowed: {', '.join(SCENE_TASKS)}")
    candidates = SCENE_TASKS[task][0](np.asarray(states, dtype=np.float64))  # (n, places around the state)
    agreed = (candidates == candidates[:, :1]).all(axis=1)
    return np.where(agreed, candidates[:, 0], -1).astype(np.int64)


def _octants(states):
    """Octants (n, 2) a margin before and after each state."""
    degrees = np.degrees(states[:, 4:5]) + [-MARGIN_DEGREES, MARGIN_DEGREES]
    return degrees // 45 % 8


def _sides(states):
    """Nearest sides (n, 17) of the agent and of points a margin around it."""
    offset = (states[:, :2] - states[:, 2:4]) @ [1, 1j]
    agent = offset * np.exp(-1j * states[:, 4])  # block frame
    ring = MARGIN_PX * np.exp(2j * np.pi * np.arange(16) / 16)
    return np.stack([_nearest_side(agent + step) for step in (0, *ring)], axis=1)


def _nearest_side(points):
    """Number of the edge of the T (n,) nearest to points (n,), x + iy in the block frame."""
    corners = CORNERS @ [1, 1j]
    edges = np.roll(corners, -1) - corners
    along = ((points[:, None] - corners) / edges).real  # 0 to 1 from one end of the edge to the other
    away = points[:, None] - (corners + np.clip(along, 0, 1) * edges)
    outward = -1j * edges / np.abs(edges)
    distance, ahead = np.abs(away), (away * outward.conj()).real
    tied = distance <= distance.min(axis=1, keepdims=True) + 1e-9  # a corner belongs to two edges
    return np.where(tied, ahead, -np.inf).argmax(axis=1)


SCENE_TASKS = {"octant": (_octants, OCTANTS), "side": (_sides, SIDES)}


def ensure_labels(*, cache_dir, frames, seed=0, image_size=96):
    """Path of a label set of ``frames`` independent random scenes, tasks "octant" and "side"; each is an episode."""
    images = ensure_scenes(cache_dir=cache_dir, frames=frames, seed=seed, image_size=image_size)
    target = images.with_name(f"{images.stem}_labels_v{VERSION}.zarr.zip")
    if not target.exists():
        states = zarr.open_group(str(images), mode="r")["data/state"][:]
        known = {task: (labels(task, states), names) for task, (_, names) in SCENE_TASKS.items()}
        _write(target, images, np.arange(1, frames + 1), known)
    return target


# Push-T: clips -----------------------------------------------------------------------------------------------------


def turns(states, episode_ends, *, span, still, turning):
    """Class (F,) int64 of how the block turns in the ``span`` frames of ``states`` (F, 5) from each frame on.

    Counter-clockwise or clockwise in the picture, by ``turning`` degrees or more from first to last frame; or still,
    never more than ``still`` degrees apart; -1 for neither, and where the episode ends before.
    """
    angle = np.degrees(np.unwrap(states[:, 4].astype(np.float64)))
    clips = sliding_window_view(np.append(angle, np.full(span - 1, np.nan)), span)  # (F, span)
    turned = clips[:, -1] - clips[:, 0]  # y points down: a growing angle is clockwise
    found = np.select([turned <= -turning, turned >= turning, np.ptp(clips, axis=1) <= still], range(3), -1)
    frames = np.arange(len(states))
    ends = episode_ends[np.searchsorted(episode_ends, frames, side="right")]
    return np.where(frames + span <= ends, found, -1)


def ensure_turns(source, *, cache_dir, frames=8, stride=2, image_size=96, still=1.0, turning=10.0):
    """Path of a label set, task "turn", of clips of ``frames`` frames, ``stride`` apart, of the Push-T set ``source``.

    still, turning: degrees, see ``turns``. Raises as ``ensure_images`` does, and ValueError for wrong options.
    """
    if frames < 2 or stride < 1:
        raise ValueError(f"frames, stride: got {frames}, {stride}, allowed: frames >= 2, stride >= 1")
    if not 0 <= still < turning:
        raise ValueError(f"still, turning: got {still}, {turning} degrees, allowed: 0 <= still < turning")
    images = Path(ensure_images(source, cache_dir=cache_dir, image_size=image_size))
    root = open_group(images)
    if "data/state" not in root:
        raise ValueError(f"{images}: got no data/state to tell turns from, allowed: a replay buffer with data/state")
    states, ends = (read_array(root, name, images) for name in ("data/state", "meta/episode_ends"))
    options = {"span": (frames - 1) * stride + 1, "still": still, "turning": turning}
    content = f"{VERSION} {images.resolve()} {options}".encode() + states.tobytes() + ends.tobytes()
    digest = hashlib.sha256(content).hexdigest()[:12]
    target = Path(cache_dir) / f"{images.name.split('.')[0]}_turns_{frames}x{stride}_{digest}.zarr.zip"
    if not target.exists():
        _write(target, images, ends, {"turn": (turns(states, ends, **options), TURNS)}, span={"turn": options["span"]})
    return target


# robomimic ---------------------------------------------------------------------------------------------------------


def ensure_clips(*, cache_dir, episodes=30, seed=0, image_size=84):
    """Path of a label set, task "task", of ``episodes`` scripted demonstrations each of lift and can, seen from ahead.

    One frame tells the two apart. Raises as ``ensure_demos`` does: ImportError without robosuite.
    """
    options = {"cache_dir": cache_dir, "episodes": episodes, "seed": seed, "image_size": image_size}
    demos = [ensure_demos(task=task, **options) for task in TASKS]
    name = f"{'_'.join(TASKS)}_{demos[0].stem.partition('_')[2]}"
    images, target = (Path(cache_dir) / f"{name}{end}" for end in (f"_{CAMERA}.zarr", f"_labels_v{VERSION}.zarr.zip"))
    if not (target.exists() and images.exists()):
        jobs, lengths = [], []
        for number, path in enumerate(demos):
            with h5py.File(path, "r") as file:
                jobs += [(path, demo, number) for demo in demo_names(file, path)]
                lengths += [int(file["data"][demo].attrs["num_samples"]) for _, demo, _ in jobs[len(lengths) :]]
        ends = np.cumsum(lengths)
        if not images.exists():
            write_rendered(
                images, _pictures, jobs, frames=sum(lengths), arrays={}, episode_ends=ends, description="collecting"
            )
        kinds = np.repeat([number for _, _, number in jobs], lengths)
        _write(target, images, ends, {"task": (kinds, list(TASKS))})
    return target


def _pictures(job):
    path, demo, _ = job
    with h5py.File(path, "r") as file:
        return {"img": file["data"][demo][f"obs/{CAMERA}_image"][()]}


def _write(target, images, episode_ends, known, **attributes):
    """The label set ``target`` of pictures in the zarr ``images``; known: {task: (labels (F,), names)}."""
    arrays = {f"data/label_{task}": values.astype(np.int64) for task, (values, _) in known.items()}
    attributes["classes"] = {task: names for task, (_, names) in known.items()}
    attributes["images"] = os.path.relpath(images, target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    with zarr.config.set({"array.write_empty_chunks": True}):  # readers take a missing chunk, as of zeros, for damage
        write_zarr(target, {**arrays, "meta/episode_ends": np.asarray(episode_ends, np.int64)}, attributes)
