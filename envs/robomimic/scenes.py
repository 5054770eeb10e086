"""Pictures of robosuite tasks with the truth behind them, to pre-train an encoder (--config-name=pretrain).

The scenes are moments of expert episodes, half of them disturbed, that no demonstration set shares.
"""

from pathlib import Path

import numpy as np

from envs.robomimic.backend import rotation_matrix
from envs.robomimic.env import CAMERAS, RobosuiteEnv
from envs.robomimic.expert import TASKS, run_episode
from envs.shared.checks import check_choice
from envs.shared.rendered_zarr import CHUNK, write_rendered

MM_PER_UNIT = 250  # of the targets
CENTRES = {"lift": (0.0, 0.0, 0.85), "can": (0.1, 0.0, 0.9)}  # m, where targets are 0
THINGS = {"lift": "cube", "can": "Can"}
FRAMES_PER_EPISODE = 16
SEED = 900_000_000  # of the first scene episode, far from those of demonstrations and tests
_environments = {}  # of this process


def targets(low_dim, task):
    """What a picture should be read as: three points (F, 9) float32, in units of 250 mm, of low_dim {key: (F, D)}.

    The object in the world, the object from the gripper, and how the object is turned: for the cube the direction of
    four times its angle to the fingers (a quarter turn looks the same), for the can that of its axis; 100 mm long.
    """
    thing = THINGS[task]
    position = low_dim[f"{thing}_pos"]
    orientation = rotation_matrix(low_dim[f"{thing}_quat"])
    if task == "lift":
        fingers = rotation_matrix(low_dim["robot0_eef_quat"])[..., 1]
        side = orientation[..., 0]
        angle = 4 * (np.arctan2(side[..., 1], side[..., 0]) - np.arctan2(fingers[..., 1], fingers[..., 0]))
        turned = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], axis=-1)
    else:
        turned = orientation[..., 2]
    points = [position - CENTRES[task], position - low_dim["robot0_eef_pos"], 0.1 * turned]
    return (np.concatenate(points, axis=-1) * (1000 / MM_PER_UNIT)).astype(np.float32)


def _draw(job):
    """Moments of the episodes with these seeds: {camera_image: (CHUNK, h, w, 3) uint8, "keypoint": (CHUNK, 9)}."""
    task, seeds, image_size, reflections = job
    key = (task, image_size, reflections)
    if key not in _environments:
        _environments[key] = RobosuiteEnv(
            task=TASKS[task], actions="recorded", image_size=image_size, reflections=reflections
        )
    env = _environments[key]
    images, truth = {f"{camera}_image": [] for camera in CAMERAS}, []
    for seed in seeds:
        episode = run_episode(env, seed, recovery=seed % 2 == 1)
        chosen = np.random.default_rng([seed, 2]).integers(len(episode["states"]), size=FRAMES_PER_EPISODE)
        for state in episode["states"][np.sort(chosen)]:
            env.reset_to(state)
            for camera in CAMERAS:
                images[f"{camera}_image"].append(env.image(camera))
            truth.append(targets(env.low_dim(), task))
    return {key: np.stack(values) for key, values in images.items()} | {"keypoint": np.stack(truth)}


def ensure_scenes(*, cache_dir, task, frames, seed=0, image_size=84, reflections=False):
    """Path of a zarr with ``frames`` pictures a camera and ``keypoint`` (F, 9), see ``targets``, 16 an episode.

    frames: a multiple of 256.
    """
    check_choice("task", task, CENTRES)
    if frames < CHUNK or frames % CHUNK:
        raise ValueError(f"frames: got {frames}, allowed: a multiple of {CHUNK}")
    mirror = "_reflections" * reflections
    target = Path(cache_dir) / f"{task}_scenes_{frames}_seed{seed}_{image_size}px{mirror}.zarr"
    if not target.exists():
        print(f"drawing {frames} moments of expert episodes once into {target}")
        first = SEED + seed * 10_000_000
        seeds = np.arange(first, first + frames // FRAMES_PER_EPISODE).reshape(-1, CHUNK // FRAMES_PER_EPISODE)
        jobs = [(task, list(map(int, row)), image_size, reflections) for row in seeds]
        write_rendered(
            target,
            _draw,
            jobs,
            frames=frames,
            arrays={},
            episode_ends=np.arange(FRAMES_PER_EPISODE, frames + 1, FRAMES_PER_EPISODE),
            description="drawing scenes",
        )
    return target
