"""Configurations as train.py composes them, and the data sets that they name."""

import os
from pathlib import Path

import hydra
from omegaconf import OmegaConf

from envs import make_data
from eval.shared.folders import run_dir_for, sweep_dir_for
from eval.shared.overrides import CONFIG, ROOT, check_types, quoted, readable, task_folders
from policy.dataset.robomimic import ensure_zarr
from policy.registry import lookup, nearest

FIRST = ("typea", "scratch", "train")  # what a folder trains when no --config-name is given


RESOLVERS = {
    "cores": lambda most: min(os.cpu_count() or 1, most),
    "scaled": lambda base, batch_size: float(base) * batch_size / 256,
    "given": lambda value: value != "none",
    "stem": lambda path: Path(str(path)).name.split(".")[0],
}
for _name, _function in RESOLVERS.items():
    OmegaConf.register_new_resolver(_name, _function, replace=True)
OmegaConf.register_new_resolver("run_dir", run_dir_for, use_cache=True, replace=True)  # the same time all along
OmegaConf.register_new_resolver("sweep_dir", sweep_dir_for, use_cache=True, replace=True)


def first_config(folder):
    """Name of the configuration that ``folder`` trains by default."""
    names = [name for name in FIRST if (Path(folder) / f"{name}.yaml").exists()]
    return names[0] if names else FIRST[0]


def compose_task(task, overrides, name=None):
    """The configuration, not resolved, of ``train.py --config-dir=config/TASK`` with these overrides.

    name: as of --config-name. Raises ValueError for an unknown task, and what hydra raises for wrong overrides.
    """
    lookup("--task", task, dict.fromkeys(task_folders()))
    return _composed(CONFIG / task, name or first_config(CONFIG / task), overrides)


def compose(task, overrides, name=None):
    """As ``compose_task``, resolved, as a plain dict."""
    return OmegaConf.to_container(compose_task(task, overrides, name), resolve=True)


def compose_at(name, overrides):
    """The resolved configuration, as a plain dict, of the file config/NAME.yaml with these overrides."""
    return OmegaConf.to_container(_composed(CONFIG, name, overrides), resolve=True)


def _composed(folder, name, overrides):
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(folder)):
        config = hydra.compose(name, [f"hydra.searchpath=[{quoted(f'file://{CONFIG}')}]", *readable(overrides)])
    check_types(config)
    return config


def locate_data(task, cache_dir):
    """Path of the zarr that ``task.data`` names, made, rendered or converted as its entry says.

    An entry may name another to use ``otherwise``, where its source is not there; ``task["data"]`` is then that one.
    """
    name, datasets = task["data"], task["datasets"]
    names = sorted(name for name, entry in datasets.items() if entry is not None and name != "path")
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
