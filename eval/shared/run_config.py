"""The configuration of a run on disk: config.yaml as it was composed, resolved.yaml as it was built.

Resuming takes the composed one, in which a value stands once and others point at it (${...}). A change therefore
reaches all that is built from it.
"""

from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from policy.checkpoint import LAST, find_checkpoint, load_checkpoint
from policy.files import write_whole
from policy.registry import nearest

COMPOSED, RESOLVED = "config.yaml", "resolved.yaml"
# Keys that act at the start of a run only; a resumed one has weights, optimizer, tokens and folder already.
STARTING = (
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
    """Write both forms of the configuration into the run folder."""
    write_whole(run_dir / COMPOSED, OmegaConf.to_yaml(composed))
    write_whole(run_dir / RESOLVED, OmegaConf.to_yaml(OmegaConf.create(resolved)))


def stored_config(run_dir, overrides):
    """The composed configuration of the run to resume, with the changes ``overrides`` (hydra's key=value).

    Raises FileNotFoundError without a checkpoint, and ValueError, by name, for a change that would not reach the run.
    """
    run_dir = Path(run_dir)
    find_checkpoint(run_dir)
    changes = [change for change in overrides if not change.startswith("resume=")]
    if not (run_dir / RESOLVED).exists():  # a run from before there were two forms, or one whose files were deleted
        if changes:
            raise ValueError(f"resume={run_dir}: got {', '.join(changes)}, allowed: no change (no {RESOLVED} there)")
        _, config, _ = load_checkpoint(run_dir / "checkpoints" / LAST, prefix="none")
        return OmegaConf.create(config)
    config = OmegaConf.load(run_dir / COMPOSED)
    OmegaConf.set_struct(config, True)
    for change in OverridesParser.create().parse_overrides(changes):
        _apply(config, change)
    return config


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
