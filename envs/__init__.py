"""Simulators, experts and demonstrations: numpy in, numpy out; this package never imports torch or ``policy``.

An environment has ``reset(seed)``, ``observe() -> {key: array}``, ``step(action) -> (reward, done, info)`` with
info["success"], and ``frame(size) -> (size, size, 3) uint8``. Simulators are imported at first use only. A new task
is one module, a line in each table below and a config.
"""

import importlib

ENVIRONMENTS = {"pusht": "envs.pusht:PushT", "robosuite": "envs.robosuite_env:RobosuiteEnv"}
DATA_MAKERS = {"pusht_images": "envs.pusht_scenes:ensure_images", "pusht_scenes": "envs.pusht_scenes:ensure_scenes"}


def _load(kind, name, table):
    if name not in table:
        raise ValueError(f"{kind}: got {name!r}, allowed: {', '.join(sorted(table))}")
    module, attribute = table[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def make_env(name, **options):
    """The environment called ``name``."""
    return _load("task.env.name", name, ENVIRONMENTS)(**options)


def make_data(name, **options):
    """Path of the data set that the maker called ``name`` prepares (renders, caches) from ``options``."""
    return _load("task.maker.name", name, DATA_MAKERS)(**options)
