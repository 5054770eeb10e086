"""Configurations as train.py composes them, and the data sets that they name."""

import os
from pathlib import Path

import hydra
from omegaconf import OmegaConf

from envs import make_data
from eval.shared.command import CONFIG, check_types, nearest
from policy.dataset.robomimic.conversion import ensure_zarr

ROOT = CONFIG.parent

OmegaConf.register_new_resolver("cores", lambda most: min(os.cpu_count() or 1, most), replace=True)
OmegaConf.register_new_resolver("scaled", lambda base, batch_size: base * batch_size / 256, replace=True)
OmegaConf.register_new_resolver("given", lambda value: value != "none", replace=True)


def compose_at(name, overrides):
    """The resolved configuration, as a plain dict, of the file config/NAME.yaml with these overrides."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIG)):
        config = hydra.compose(name, overrides)
    check_types(config)
    return OmegaConf.to_container(config, resolve=True)


def compose(task, overrides):
    """The resolved configuration, as a plain dict, of ``train.py --config-dir=config/TASK`` with these overrides.

    Raises ValueError for an unknown task, and what hydra raises for wrong overrides.
    """
    tasks = sorted(path.parent.name for path in CONFIG.glob("*/typea.yaml"))
    if task not in tasks:
        raise ValueError(f"--task: got {task!r}{nearest(task, tasks)}, allowed: {', '.join(tasks)}")
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIG / task)):
        config = hydra.compose("typea", [f"hydra.searchpath=[file://{CONFIG}]", *overrides])
    return OmegaConf.to_container(config, resolve=True)


def locate_data(task, cache_dir):
    """Path of the zarr that ``task.data`` names, made, rendered or converted as its entry says.

    An entry may name another to use ``otherwise``, where its source is not there; ``task["data"]`` is then that one.
    """
    name, datasets = task["data"], task["datasets"]
    names = sorted(set(datasets) - {"path"})
    entry = dict(datasets[name]) if name in names else {**datasets["path"], "source": name}
    hint = entry.pop("hint", None)
    source = entry.get("source")
    otherwise = entry.pop("otherwise", None)
    if source is not None:
        source = Path(source) if Path(source).exists() else ROOT / source
        if not source.exists() and otherwise is not None:
            print(f"task.data={name}: {source} is not there (to get it: {hint}); using task.data={otherwise} instead")
            task["data"] = otherwise
            return locate_data(task, cache_dir)
        if not source.exists():
            advice = f"; to get it: {hint}" if hint else ""
            raise FileNotFoundError(
                f"task.data: got {name!r}{nearest(name, names)} ({source}), which does not exist;"
                f" allowed: {', '.join(names)} or a path{advice}"
            )
        entry["source"] = source
    path = Path(make_data(entry.pop("maker"), cache_dir=cache_dir, **entry))
    if path.suffix in (".hdf5", ".h5"):
        path = ensure_zarr(path, cache_dir, actions=task["env"]["actions"])
    return path
