"""robomimic demonstrations by the experts of envs/robomimic/expert.py, as robomimic's HDF5.

Only successful episodes are kept, and their images are then drawn from the recorded states, as robomimic's
dataset_states_to_obs does. Episode i depends only on the seed, i, the recovery fraction and the task, whatever the
number of processes.

The result is robomimic's HDF5 (envs/robomimic/hdf5.py) for robosuite 1.5, actions (L, 7) delta OSC_POSE, with
mask/train and mask/valid (nine to one). Demos have the further attributes seed, of their episode, and recovery,
whether they start where the expert was pushed to; env_args tells with "reflections" whether the floor mirrors, which
robomimic ignores.
"""

import functools
import json
import time
from pathlib import Path

import h5py
import numpy as np

from envs.robomimic.backend import choose_renderer
from envs.robomimic.env import CAMERAS, RobosuiteEnv
from envs.robomimic.expert import TASKS, run_episode
from envs.robomimic.hdf5 import draw_states, installed_version, new_file, outcome, stored_arguments, write_part
from envs.shared.checks import check_choice, check_demo_options, check_positive
from envs.shared.item_set import is_recovery, make_set
from envs.shared.workers import usual_processes

VERSION = 1  # raise it when the same arguments make other episodes
ATTEMPTS = 16
SECONDS = {"lift": 1.6, "can": 5.5}  # an episode with images of 84 x 84 on one CPU core, for the estimate only
REFLECTION_FACTOR = 2.4  # how much longer drawing takes with reflections


def episode_seed(seed, index, attempt):
    """A number of its own for every try at an episode of every set, and above the seeds of tests (100000...)."""
    return seed * 2**32 + 2**31 + index * ATTEMPTS + attempt


@functools.cache
def _environment(task, cameras, image_size, reflections):
    """The environment of this process: making one takes seconds."""
    return RobosuiteEnv(
        task=TASKS[task], actions="recorded", cameras=cameras, image_size=image_size, reflections=reflections
    )


def make_episode(path, task, seed, index, recovery, cameras, image_size, reflections):
    """Makes one episode and stores it at ``path``; RuntimeError when the expert fails again and again."""
    env = _environment(task, cameras, image_size, reflections)
    start = time.process_time()
    for attempt in range(ATTEMPTS):
        number = episode_seed(seed, index, attempt)
        episode = run_episode(env, number, recovery=recovery)
        if episode["success"]:
            break
    else:
        raise RuntimeError(f"the expert of {task} failed {ATTEMPTS} times in a row at episode {index} of seed {seed}")
    obs = {f"obs/{key}": values for key, values in draw_states(env, episode["states"])[0].items()}
    write_part(
        path,
        {"actions": episode["actions"], "states": episode["states"], **outcome(episode["rewards"] > 0), **obs},
        attributes={
            "num_samples": len(episode["actions"]),
            "model_file": env.model_xml,
            "seed": np.uint64(number),
            "recovery": recovery,
        },
        env_args=json.dumps(env.env_args | {"reflections": reflections}),
        failures=attempt,
        seconds=time.process_time() - start,
    )


def join(place, paths, arguments):
    """Writes the whole set from its parts and says a line about it."""
    failures, seconds = 0, 0.0
    with h5py.File(paths[0], "r") as part:
        env_args = json.loads(part.attrs["env_args"])
    with new_file(place, env_args=env_args, arguments=arguments) as file:
        for index, path in enumerate(paths):
            with h5py.File(path, "r") as part:
                if json.loads(part.attrs["env_args"]) != env_args:
                    raise ValueError(f"{path}: got an episode of another robosuite, allowed: one; remove {path.parent}")
                part.copy("demo", file["data"], f"demo_{index}")
                failures += int(part.attrs["failures"])
                seconds += float(part.attrs["seconds"])
        for name, indices in split(len(paths), arguments["seed"]).items():
            file[f"mask/{name}"] = np.array([f"demo_{index}" for index in indices], dtype="S")
        file.attrs["failures"] = failures
        steps = sum(int(demo.attrs["num_samples"]) for demo in file["data"].values()) / len(paths)
    rate = len(paths) / (len(paths) + failures)
    print(
        f"{len(paths)} episodes, {steps:.1f} steps on average, {seconds / len(paths):.2f} s of CPU time each;"
        f" the expert succeeded in {rate:.1%}, {failures} failures left out"
    )


def split(episodes, seed):
    """{"train", "valid"}: episode numbers, a tenth (at least one of two and more) to validate with."""
    order = np.random.default_rng([seed, episodes]).permutation(episodes)
    valid = max(round(episodes / 10), int(episodes > 1))
    return {"train": np.sort(order[valid:]), "valid": np.sort(order[:valid])}


def make_demos(output, *, task, episodes, seed, recovery, cameras, image_size, reflections, processes):
    """Make the set ``output``, or what is missing of it; False where it was complete. Options as the command's.

    Raises ValueError for wrong options and for a set of other ones at ``output``, ImportError without robosuite,
    OSError without OpenGL, RuntimeError where the expert fails again and again.
    """
    output = Path(output)
    check_demo_options(episodes=episodes, seed=seed, recovery=recovery, processes=processes)
    check_choice("task", task, TASKS)
    check_positive(image_size=image_size)
    content = {"task": task, "episodes": episodes, "seed": seed, "recovery": recovery}
    drawn = {"cameras": list(cameras), "image_size": image_size, "reflections": reflections}
    arguments = {"version": VERSION, **content, **drawn}
    if not output.exists():
        installed_version()
        choose_renderer()  # once, instead of in every worker
    return make_set(
        output,
        arguments,
        work=make_episode,
        jobs=[
            (task, seed, index, is_recovery(index, recovery), tuple(cameras), image_size, reflections)
            for index in range(episodes)
        ],
        suffix=".hdf5",
        processes=processes,
        stored=stored_arguments,
        finish=lambda place, paths: join(place, paths, arguments),
    )


def ensure_demos(*, cache_dir, task, episodes, seed=0, recovery=0.5, image_size=84, reflections=False):
    """Path of a set of expert demonstrations under ``cache_dir``, made once, with images of both cameras.

    task: "lift" or "can"; the rest as the options of the command. An interrupted making goes on where it stopped.
    Raises as ``make_demos``.
    """
    check_choice("task", task, TASKS)
    check_positive(episodes=episodes)
    processes = min(usual_processes(), episodes)
    mirror = "_reflections" if reflections else ""
    name = f"{task}_{episodes}episodes_seed{seed}_recovery{recovery:g}_{image_size}px{mirror}_v{VERSION}.hdf5"
    output = Path(cache_dir) / name
    if not output.exists():
        seconds = episodes * SECONDS[task] * (REFLECTION_FACTOR if reflections else 1) / processes
        print(
            f"making {episodes} expert demonstrations of {task} once, about {max(seconds / 60, 1):.0f} min with"
            f" {processes} processes: {output}"
        )
    options = {"task": task, "episodes": episodes, "seed": seed, "recovery": recovery, "image_size": image_size}
    make_demos(output, cameras=CAMERAS, reflections=reflections, processes=processes, **options)
    return output
