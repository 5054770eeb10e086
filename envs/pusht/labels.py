"""Push-T pictures and clips whose classes the simulator knows: classification without a download.

``envs.shared.zarr_files.write_labels`` says what a label set holds.
"""

from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from envs.pusht.geometry import CORNERS
from envs.pusht.scenes import ensure_images, ensure_scenes
from envs.shared.checks import check_choice
from envs.shared.files import digest
from envs.shared.zarr_checks import find_array, open_zarr
from envs.shared.zarr_files import read_all, write_labels

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


# Scenes ------------------------------------------------------------------------------------------------------------


def labels(task, states):
    """Class (n,) int64 of each of ``states`` (n, 5), -1 within 2 px or 2 degrees of another class.

    task "octant": how far the T of the picture is turned clockwise from upright, in steps of 45 degrees; "side": which
    side of the T the agent's centre is nearest to; where a corner is nearest, that of its two which faces it more.
    """
    check_choice("task", task, SCENE_TASKS)
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
        states = read_all(open_zarr(images), "data/state", images)
        known = {task: (labels(task, states), names) for task, (_, names) in SCENE_TASKS.items()}
        write_labels(target, images, np.arange(1, frames + 1), known)
    return target


# Clips -------------------------------------------------------------------------------------------------------------


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
    root = open_zarr(images)
    if find_array(root, "data/state", images) is None:
        raise ValueError(f"{images}: got no data/state to tell turns from, allowed: a replay buffer with data/state")
    states, ends = (read_all(root, name, images) for name in ("data/state", "meta/episode_ends"))
    options = {"span": (frames - 1) * stride + 1, "still": still, "turning": turning}
    content = digest(f"{VERSION} {images.resolve()} {options}", states, ends)
    target = Path(cache_dir) / f"{images.name.split('.')[0]}_turns_{frames}x{stride}_{content[:12]}.zarr.zip"
    if not target.exists():
        known = {"turn": (turns(states, ends, **options), TURNS)}
        write_labels(target, images, ends, known, span={"turn": options["span"]})
    return target
