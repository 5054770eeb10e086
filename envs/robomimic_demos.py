"""Makes robomimic demonstrations: `python -m envs.robomimic_demos --task lift --episodes 100 --output X.hdf5`.

The experts of envs/robomimic/expert.py act in robosuite; only successful episodes are kept, and their images are then
drawn from the recorded states, as robomimic's dataset_states_to_obs does. Episode i depends only on the seed, i, the
recovery fraction and the task, whatever the number of processes. Finished episodes wait in the folder
`<output>.partial`; the same command continues an interrupted run.

The result is robomimic's HDF5 (envs/robomimic/hdf5.py) for robosuite 1.5, actions (L, 7) delta OSC_POSE, with
mask/train and mask/valid (nine to one). Demos have the further attributes seed, of their episode, and recovery,
whether they start where the expert was pushed to; env_args tells with "reflections" whether the floor mirrors, which
robomimic ignores.
"""

import functools
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np

from envs.robomimic.backend import choose_renderer
from envs.robomimic.env import CAMERAS, RobosuiteEnv
from envs.robomimic.expert import TASKS, run_episode
from envs.robomimic.hdf5 import draw_states, installed_version, new_file, outcome, stored_arguments, write_part
from envs.shared.demo_pool import check_demo_options, check_output, demo_parser, is_recovery, make_set, run_command

VERSION = 1  # raise it when the same arguments make other episodes
ATTEMPTS = 16
SECONDS = {"lift": 1.6, "can": 5.5}  # an episode with images of 84 x 84 on one CPU core, for the estimate only
REFLECTION_FACTOR = 2.4  # how much longer drawing takes with reflections
MOST_PROCESSES = 8  # unless asked otherwise; each needs 1 GB of memory


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
    """Makes one episode and stores it at `path`; RuntimeError when the expert fails again and again."""
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


def join(output, paths, arguments):
    """Writes the whole set from its parts; returns a line about it."""
    failures, seconds = 0, 0.0
    with h5py.File(paths[0], "r") as part:
        env_args = json.loads(part.attrs["env_args"])
    with new_file(output, env_args=env_args, arguments=arguments) as file:
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
    return (
        f"{len(paths)} episodes, {steps:.1f} steps on average, {seconds / len(paths):.2f} s of CPU time each;"
        f" the expert succeeded in {rate:.1%}, {failures} failures left out"
    )


def split(episodes, seed):
    """{"train", "valid"}: episode numbers, a tenth (at least one of two and more) to validate with."""
    order = np.random.default_rng([seed, episodes]).permutation(episodes)
    valid = max(round(episodes / 10), int(episodes > 1))
    return {"train": np.sort(order[valid:]), "valid": np.sort(order[:valid])}


def make_demos(output, *, task, episodes, seed, recovery, cameras, image_size, reflections, processes):
    """Make the set `output`, or what is missing of it; False where it was complete. Options as the command's."""
    output = Path(output)
    arguments = {
        "version": VERSION,
        "task": task,
        "episodes": episodes,
        "seed": seed,
        "recovery": recovery,
        "cameras": list(cameras),
        "image_size": image_size,
        "reflections": reflections,
    }
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
        finish=lambda paths: print(join(output, paths, arguments)),
    )


def check_task(task, image_size):
    """ValueError with what was got and what is allowed."""
    if task not in TASKS:
        raise ValueError(f"--task got {task}, allowed {', '.join(TASKS)}")
    if image_size < 1:
        raise ValueError(f"--image-size got {image_size}, allowed 1 or more")


def ensure_demos(*, cache_dir, task, episodes, seed=0, recovery=0.5, image_size=84, reflections=False):
    """Path of a set of expert demonstrations under `cache_dir`, made once, with images of both cameras.

    task: "lift" or "can"; the rest as the options of the command. An interrupted making goes on where it stopped.
    Raises ValueError for bad options, ImportError without robosuite, OSError without OpenGL.
    """
    cache_dir = Path(cache_dir)
    check_task(task, image_size)
    processes = min(os.cpu_count() or 1, MOST_PROCESSES, max(episodes, 1))
    check_demo_options(SimpleNamespace(episodes=episodes, seed=seed, recovery=recovery, processes=processes))
    mirror = "_reflections" if reflections else ""
    name = f"{task}_{episodes}episodes_seed{seed}_recovery{recovery:g}_{image_size}px{mirror}_v{VERSION}.hdf5"
    output = cache_dir / name
    if not output.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        seconds = episodes * SECONDS[task] * (REFLECTION_FACTOR if reflections else 1) / processes
        print(
            f"making {episodes} expert demonstrations of {task} once, about {max(seconds / 60, 1):.0f} min with"
            f" {processes} processes: {output}"
        )
    make_demos(
        output,
        task=task,
        episodes=episodes,
        seed=seed,
        recovery=recovery,
        cameras=CAMERAS,
        image_size=image_size,
        reflections=reflections,
        processes=processes,
    )
    return output


def generate(options):
    """Makes the set that the options ask for, or the missing part of it."""
    check_demo_options(options)
    check_task(options.task, options.image_size)
    check_output(options.output, (".hdf5",))
    made = make_demos(
        options.output,
        task=options.task,
        episodes=options.episodes,
        seed=options.seed,
        recovery=options.recovery,
        cameras=() if options.no_images else CAMERAS,
        image_size=options.image_size,
        reflections=options.reflections,
        processes=options.processes,
    )
    state = f": {Path(options.output).stat().st_size / 1e6:.1f} MB" if made else " is complete"
    print(f"{options.output}{state}")


def _parser():
    processes = min(os.cpu_count() or 1, MOST_PROCESSES)
    description = __doc__.splitlines()[0]
    parser = demo_parser(
        "envs.robomimic_demos", description, episodes=200, output="name of the set: X.hdf5", processes=processes
    )
    parser.add_argument("--task", required=True, help=" or ".join(TASKS))
    parser.add_argument("--no-images", action="store_true", help="states, actions and low-dimensional obs only")
    parser.add_argument("--image-size", type=int, default=84, help="px (default %(default)s)")
    parser.add_argument("--reflections", action="store_true", help="mirror image in the floor; doubles the time")
    return parser


def main(arguments=None):
    """The command line; returns the exit code."""
    return run_command(generate, _parser(), arguments)


if __name__ == "__main__":
    sys.exit(main())
