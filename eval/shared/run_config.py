"""The configuration of a run on disk: config.yaml as it was composed, resolved.yaml as it was built.

Resuming takes the composed one, in which a value stands once and others point at it (${...}). A change therefore
reaches all that is built from it. Runs and checkpoints may come from others: what they say imports no module and reads
nothing of this machine, such as its environment variables.
"""

import re
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from envs import ENVIRONMENTS
from eval.shared.compose import RESOLVERS
from policy.checkpoint import LAST, find_checkpoint, load_checkpoint
from policy.files import write_whole
from policy.registry import nearest

COMPOSED, RESOLVED = "config.yaml", "resolved.yaml"
REFERENCE = re.compile(rf"\$\{{(?:[\w.\[\]]+\}}|(?:{'|'.join(RESOLVERS)}):)")  # another key, or a function of ours
# Keys that act at the start of a run only; a resumed one has weights, optimizer, tokens and folder already, and which
# episodes are held out stays: those that were trained on would say nothing any more.
STARTING = (
    "seed",
    "data.val_ratio",
    "data.max_train_episodes",
    "output",
    "name",
    "label",
    "preset",
    "mode",
    "camera",
    "encoder.init",
    "encoder.pretrained",
    "training.optimizer",
    "tokens",
    "vocabulary",
)


def check_new(run_dir):
    """Raise ValueError where the folder ``run_dir`` of a new run holds another one."""
    run_dir = Path(run_dir)
    if (run_dir / "checkpoints").exists() or (run_dir / "metrics.jsonl").exists():
        raise ValueError(f"output: got {run_dir}, which holds a run, allowed: a new folder, or resume={run_dir}")


def write_config(run_dir, composed, resolved):
    """Write both forms of the configuration into the run folder; only references that resuming takes stay ones."""
    kept = OmegaConf.create(OmegaConf.to_container(composed))
    for key, _ in foreign_references(OmegaConf.to_container(composed)):  # typed by whoever started the run
        OmegaConf.update(kept, key, OmegaConf.select(composed, key))
    write_whole(run_dir / COMPOSED, OmegaConf.to_yaml(kept))
    write_whole(run_dir / RESOLVED, OmegaConf.to_yaml(OmegaConf.create(resolved)))


def stored_config(run_dir, overrides):
    """The composed configuration of the run to resume, with the changes ``overrides`` (hydra's key=value).

    Raises FileNotFoundError without a checkpoint, and ValueError, by name, for a change that would not reach the run.
    """
    run_dir = Path(run_dir)
    if run_dir.is_file():
        raise ValueError(f"resume: got {run_dir}, allowed: the folder of a run")
    find_checkpoint(run_dir)
    changes = [change for change in overrides if not change.startswith("resume=")]
    if not (run_dir / RESOLVED).exists():  # a run from before there were two forms, or one whose files were deleted
        if changes:
            raise ValueError(f"resume={run_dir}: got {', '.join(changes)}, allowed: no change (no {RESOLVED} there)")
        _, stored, _ = load_checkpoint(run_dir / "checkpoints" / LAST, prefix="none")
    else:
        stored = _read(run_dir / COMPOSED)
    check_references(stored, run_dir)
    config = OmegaConf.create(stored)
    OmegaConf.set_struct(config, True)
    parsed = OverridesParser.create().parse_overrides(changes)
    for change in parsed:
        _apply(config, change)
    if OmegaConf.select(config, "task.env") is not None:
        typed = any(change.key_or_group == "task.env.name" for change in parsed)
        env_of(config, allow_import=typed, allowed="the same again, task.env.name=..., for a run of someone you trust")
    return config


def _read(path):
    """The YAML file ``path`` as a plain dict, not resolved; ValueError for another file."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: got no configuration ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, allowed: the sections of a configuration")
    return content


def foreign_references(config):
    """Yield (key, text) of all in the plain ``config`` that OmegaConf would resolve to more than a key of it.

    ${oc.env:NAME} and the like become what only this machine knows.
    """
    for key, value in _values(config):
        if isinstance(value, str) and value.count("${") != len(REFERENCE.findall(value)):
            yield key, value


def check_references(config, source):
    """Raise ValueError, by key, for ``foreign_references`` in the ``config`` of a run or checkpoint, ``source``."""
    for key, value in foreign_references(config):
        raise ValueError(f"{source}: {key}: got {value!r}, allowed: ${{KEY}} or one of {', '.join(RESOLVERS)}")


def _values(config, prefix=""):
    """Yield (dotted key, value) of all that is no section or list."""
    for key, value in config.items() if isinstance(config, dict) else enumerate(config):
        if isinstance(value, dict | list):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def env_of(config, *, allow_import=False, allowed="--allow-import for a checkpoint of someone you trust"):
    """Options for ``envs.make_env`` that the configuration of a run or checkpoint names.

    Raises ValueError for a name that is not in the table of environments, unless ``allow_import``: a name of the form
    module:Class imports, and so executes, that module.
    """
    env = (config.get("task") or {}).get("env")
    name = env.get("name") if hasattr(env, "get") else None
    if not isinstance(name, str):
        raise ValueError(f"task.env: got {env!r}, allowed: a section with the name of an environment")
    if name not in ENVIRONMENTS and not allow_import:
        raise ValueError(f"task.env.name: got {name!r}, allowed: {', '.join(ENVIRONMENTS)}; or {allowed}")
    return env


def add_allow_import(parser):
    """The option of commands that make the environment of a checkpoint."""
    text = "import the environment that the checkpoint names as module:Class, which executes that module"
    parser.add_argument("--allow-import", action="store_true", help=text)


def _apply(config, change):
    key, given = change.key_or_group, change.input_line
    if change.is_sweep_override() or change.is_delete():
        raise ValueError(f"override with resume: got {given!r}, allowed: key=value")
    if key in STARTING:
        raise ValueError(f"{key}: got a change with resume, allowed: none, it acts at the start of a run only")
    parts = key.split(".")
    for count in range(1, len(parts)):
        section, part = ".".join(parts[: count - 1]), parts[count - 1]
        node = OmegaConf.select(config, section) if section else config
        if OmegaConf.is_dict(node) and part in node and OmegaConf.is_interpolation(node, part):
            source = node._get_node(part)._value()
            raise ValueError(f"{key}: got a change of a copy, allowed: one of what it copies, {source}")
    try:
        present = OmegaConf.select(config, key, throw_on_missing=False)
        known = change.is_add() or parts[-1] in _section(config, parts)
    except OmegaConfBaseException:
        present, known = None, False
    if not known:
        keys = sorted(_names(config))
        raise ValueError(f"override with resume: got {key!r}{nearest(key, keys)}, allowed: a key of its config.yaml")
    if OmegaConf.is_dict(present):
        raise ValueError(f"override with resume: got {given!r}, allowed: key=value of single values")
    OmegaConf.update(config, key, change.value(), force_add=change.is_add())


def _section(config, parts):
    """The keys of the section that holds the last of ``parts``."""
    section = OmegaConf.select(config, ".".join(parts[:-1])) if len(parts) > 1 else config
    return section if OmegaConf.is_dict(section) else ()


def _names(config, prefix=""):
    """Dotted names of all keys."""
    for key in config:
        yield f"{prefix}{key}"
        own = not OmegaConf.is_interpolation(config, key) and not OmegaConf.is_missing(config, key)
        if own and OmegaConf.is_dict(config[key]):
            yield from _names(config[key], f"{prefix}{key}.")
