"""Push-T pictures from known states: random scenes to learn to see, and the images of recorded episodes.

``ensure_images`` keeps an image copy of a data set that stores states and actions only; ``ensure_scenes`` makes
independent random scenes for pre-training (--config-name=pretrain).
"""

from pathlib import Path

import numpy as np

from envs.pusht.env import keypoints, render_states
from envs.pusht.geometry import AGENT_RADIUS, ARENA, GOAL_ANGLE, GOAL_X, GOAL_Y, RECTANGLES
from envs.shared.checks import check_positive
from envs.shared.files import digest
from envs.shared.rendered_zarr import CHUNK, write_rendered
from envs.shared.zarr_checks import find_array, open_zarr
from envs.shared.zarr_files import read_all


def sample_states(count, rng):
    """Independent plausible states (count, 5): a third of the blocks near the goal, half of the agents near the block.

    The agent never overlaps the block by more than a pixel, as the physics would not allow it.
    """
    near_goal = rng.random(count) < 1 / 3
    anywhere = np.column_stack([rng.uniform(60, 452, (count, 2)), rng.uniform(-np.pi, np.pi, count)])
    around = np.array([GOAL_X, GOAL_Y, GOAL_ANGLE]) + rng.normal(size=(count, 3)) * [25.0, 25.0, 0.3]
    blocks = np.where(near_goal[:, None], around, anywhere)
    blocks[:, 2] %= 2 * np.pi
    agents = np.full((count, 2), np.nan)
    touching = rng.random(count) < 0.5
    while (todo := np.flatnonzero(np.isnan(agents[:, 0]))).size:
        near = touching[todo]
        draw = np.where(
            near[:, None],
            blocks[todo, :2] + rng.uniform(-180, 180, (todo.size, 2)),
            rng.uniform(10, 502, (todo.size, 2)),
        )
        distance = _distance_to_block(draw, blocks[todo])
        inside = ((draw > 10) & (draw < 502)).all(axis=1)
        accept = inside & (distance > AGENT_RADIUS - 1) & (~near | (distance < 3 * AGENT_RADIUS))
        agents[todo[accept]] = draw[accept]
    return np.column_stack([agents, blocks])


def _distance_to_block(points, blocks):
    """Distance (n,) px of points (n, 2) to the T at blocks (n, 3); 0 inside."""
    offset = points - blocks[:, :2]
    cos, sin = np.cos(blocks[:, 2]), np.sin(blocks[:, 2])
    local = np.column_stack([cos * offset[:, 0] + sin * offset[:, 1], -sin * offset[:, 0] + cos * offset[:, 1]])
    distances = []
    for low, high in RECTANGLES.reshape(2, 2, 2):  # bar and stem, block frame
        outside = np.maximum(np.maximum(low - local, local - high), 0)
        distances.append(np.hypot(*outside.T))
    return np.minimum(*distances)


def _draw(job):
    states, image_size = job
    return {"img": render_states(states, image_size=image_size)}


def _write_images(target, arrays, episode_ends, states, image_size, description):
    """A zarr at ``target`` with ``img`` drawn from ``states`` (F, 5), and ``arrays``."""
    jobs = [(states[start : start + CHUNK], image_size) for start in range(0, len(states), CHUNK)]
    write_rendered(
        target, _draw, jobs, frames=len(states), arrays=arrays, episode_ends=episode_ends, description=description
    )


def ensure_images(source, *, cache_dir, image_size=96):
    """Path of a copy of the data set ``source`` that holds images, rendered once and cached under ``cache_dir``.

    A source that already stores ``data/img`` is returned as it is. Raises FileNotFoundError for a missing source
    and ValueError for one without states, damaged or inconsistent.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(f"data set: got {source}, which does not exist")
    root, needed = open_zarr(source), ("data/state", "data/action", "meta/episode_ends")
    if find_array(root, "data/img", source) is not None:
        return source
    if any(find_array(root, name, source) is None for name in needed):
        raise ValueError(
            f"{source}: got neither data/img to see nor data/state to render, allowed: a replay buffer with data/img,"
            " or with data/state, data/action and meta/episode_ends"
        )
    states, action, ends = (read_all(root, name, source) for name in needed)
    if states.ndim != 2 or states.shape[1] != 5 or not np.isfinite(states).all():
        raise ValueError(f"{source}: data/state: got shape {states.shape} or NaN, allowed: (F, 5) finite numbers")
    if ends.ndim != 1 or (ends.astype(np.int64) != ends).any():
        raise ValueError(f"{source}: episode_ends: got {ends.dtype} {ends.shape}, allowed: (E,) whole numbers")
    if not len(states) == len(action) == ends.max(initial=0):
        raise ValueError(
            f"{source}: got {len(states)} states, {len(action)} actions and episodes that end at"
            f" {ends.max(initial=0)}, allowed: as many of each"
        )
    content = digest(states, action, ends)
    target = Path(cache_dir) / f"{source.name.split('.')[0]}_{image_size}px_{content[:12]}.zarr"
    if not target.exists():
        print(f"rendering {len(states)} frames of {source} once into {target}")
        arrays = {"state": states, "action": action}
        _write_images(target, arrays, ends, states, image_size, "rendering demonstrations")
    return target


def ensure_scenes(*, cache_dir, frames, seed=0, image_size=96):
    """Path of a zarr with ``frames`` random scenes: img (F, h, w, 3) uint8 and keypoint (F, 18) in [-1, 1].

    keypoint holds x, y of the eight corners of the T and of the agent, each px / 256 - 1. Every frame is an episode
    of its own.
    """
    check_positive(frames=frames)
    target = Path(cache_dir) / f"pusht_scenes_{frames}_seed{seed}_{image_size}px.zarr"
    if not target.exists():
        states = sample_states(frames, np.random.default_rng(seed)).astype(np.float32)
        print(f"rendering {frames} random scenes once into {target}")
        arrays = {"state": states, "keypoint": scene_targets(states)}
        _write_images(target, arrays, np.arange(1, frames + 1), states, image_size, "rendering scenes")
    return target


def scene_targets(states):
    """What a picture should be read as: keypoints (F, 18) float32, px / 256 - 1."""
    return (keypoints(states).reshape(len(states), -1) / (ARENA / 2) - 1).astype(np.float32)
