"""Clips of robosuite demonstrations whose class is their task."""

from pathlib import Path

import h5py
import numpy as np

from envs.robomimic.demos import ensure_demos
from envs.robomimic.expert import TASKS
from envs.robomimic.hdf5 import demo_names
from envs.shared.rendered_zarr import write_rendered
from envs.shared.zarr_files import write_labels

VERSION = 1  # raise it when the same demonstrations get other labels
CAMERA = "agentview"


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
        write_labels(target, images, ends, {"task": (kinds, list(TASKS))})
    return target


def _pictures(job):
    path, demo, _ = job
    with h5py.File(path, "r") as file:
        return {"img": file["data"][demo][f"obs/{CAMERA}_image"][()]}
