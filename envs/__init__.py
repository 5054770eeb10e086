"""Simulators, experts and demonstrations: numpy in, numpy out; this package never imports torch or ``policy``.

An environment has ``reset(seed)``, ``observe() -> {key: array}``, ``step(action) -> (reward, done, info)`` with
info["success"], ``frame(size) -> (size, size, 3) uint8`` and, where needed, ``close()``. Simulators are imported at
first use only. A new task is one module, a line in each table below (in CORRECTIONS where an expert can take over) and
a config; an environment may also be named "module:attribute". A property ``state`` (S,) lets rollouts record states.
"""

import importlib
import inspect

from envs.shared.checks import check_choice

ENVIRONMENTS = {"pusht": "envs.pusht.env:PushT", "robosuite": "envs.robomimic.env:RobosuiteEnv"}
DATA_MAKERS = {
    "pusht_images": "envs.pusht.scenes:ensure_images",
    "pusht_labels": "envs.pusht.labels:ensure_labels",
    "pusht_scenes": "envs.pusht.scenes:ensure_scenes",
    "pusht_turns": "envs.pusht.labels:ensure_turns",
    "robomimic_clips": "envs.robomimic.clips:ensure_clips",
    "robomimic_demos": "envs.robomimic.demos:ensure_demos",
    "robomimic_file": "envs.robomimic.images:ensure_file",
    "robomimic_scenes": "envs.robomimic.scenes:ensure_scenes",
}
CORRECTIONS = {"pusht": "envs.pusht.corrections:make_corrections"}


def _load(kind, name, table, also=""):
    check_choice(kind, name, table, also)
    module, attribute = table[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def _make(key, factory, options):
    """``factory`` called with ``options``; ValueError where it takes others."""
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ValueError(
            f"{key}: got {', '.join(options) or 'no options'}, allowed: those of its class ({error})"
        ) from None
    return factory(**options)


def make_env(name, **options):
    """The environment called ``name`` in the table, or an environment class "module:attribute" from anywhere.

    Importing such a module executes it: a name from a checkpoint goes through eval/shared/run_config.py first. Raises
    ValueError for another name, another class or options that it does not take.
    """
    if not isinstance(name, str) or ":" not in name:
        return _make("task.env", _load("task.env.name", name, ENVIRONMENTS, " or module:attribute"), options)
    module, attribute = name.split(":", 1)
    kind = getattr(importlib.import_module(module), attribute, None)
    if not all(hasattr(kind, method) for method in ("reset", "observe", "step", "frame")):
        raise ValueError(f"task.env.name: got {name!r}, allowed: a class with reset, observe, step and frame")
    return _make("task.env", kind, options)


def close_env(env):
    """Free what ``env`` holds, if it has a ``close``."""
    if hasattr(env, "close"):
        env.close()


def make_data(name, **options):
    """Path of the data set that the maker called ``name`` prepares (renders, caches) from ``options``."""
    return _load("task.maker.name", name, DATA_MAKERS)(**options)


def make_corrections(name, **options):
    """Path of a data set with expert episodes from states visited in the environment called ``name``, for DAgger."""
    return _load("dagger: task.env.name", name, CORRECTIONS)(**options)
