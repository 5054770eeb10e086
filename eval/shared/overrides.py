"""Keys and values that the files of config/ know, and checks of what a command line changes."""

import functools
import re
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

CONFIG = Path(__file__).parent.parent.parent / "config"
ROOT = CONFIG.parent
SHARED = ("attention", "base", "decoder", "denoiser", "encoder", "model", "preset", "scheduler", "task")

LEFT_OUT = {  # a value of each key that every file leaves at null, or computes
    **dict.fromkeys(("camera", "text", "source", "target", "output", "resume", "data.filter_key"), "text"),
    **dict.fromkeys(("num_classes", "workers", "resize", "attention.num_chunks", "attention.conv_kernel"), 8),
    "augment.color_jitter": 0.4,
}


def quoted(text):
    """``text`` as a value of hydra's grammar, whatever characters it has."""
    escaped = str(text).replace("\\'", "\\\\'").replace("'", "\\'")
    return f"'{escaped}'"


def readable(arguments, *, sweeps=False):
    """``arguments`` with quotes around values that hydra's grammar cannot read, such as paths with é, ( or a comma.

    sweeps: a comma parts the values of a sweep, unless they are one path that is there.
    """
    return [_readable(argument, sweeps) for argument in arguments]


def _readable(argument, sweeps):
    key, is_assignment, value = argument.partition("=")
    if argument.startswith("-") or not is_assignment or not value:
        return argument
    as_text = f"{key}={quoted(value)}"
    try:
        parsed = OverridesParser.create().parse_override(argument)
    except HydraException:
        return as_text
    if parsed.is_sweep_override() and (Path(value).exists() if sweeps else "/" in value):
        return as_text
    return argument


def task_folders():
    """Names of the folders of config/ that can be trained."""
    return sorted({path.parent.name for path in CONFIG.glob("*/*.yaml")} - set(SHARED))


def check_types(config):
    """Raise ValueError for a value of ``config`` whose type no file of config/ has for that key.

    A number where only text was seen, text where only numbers, null where it is nowhere null, and so on.
    """
    known = known_values()
    for key, value in _named(OmegaConf.to_container(config, resolve=True)):
        seen = [*_plain(key, known), *([LEFT_OUT[key]] if key in LEFT_OUT else [])]
        if all(other is None for other in seen):  # a key of a data set, or a new one
            continue
        kinds = {_kind(other) for other in seen}
        if _kind(value) not in kinds and not (_kind(value) == "integer" and "number" in kinds):
            example = next(other for other in seen if other is not None)
            example = f"{key}.{next(iter(example))}=..." if isinstance(example, dict) else repr(example)
            raise ValueError(f"{key}: got {value!r}, allowed: {' or '.join(sorted(kinds))}, as in {example}")


def _plain(key, known):
    """Values that the files give ``key``, copies (${other.key}) replaced by those of what they copy."""
    for value in known.get(key, []):
        if not (isinstance(value, str) and "${" in value):
            yield value
        elif copied := re.fullmatch(r"\$\{([\w.]+)\}", value):
            yield from _plain(copied[1], known)


def _kind(value):
    kinds = {bool: "true/false", int: "integer", float: "number", str: "text", list: "list", dict: "section"}
    return kinds.get(type(value), "null")


def known_keys():
    """Dotted names of all keys in the files of config/."""
    return sorted(known_values())


@functools.cache  # reading all files takes a quarter of a second
def known_values():
    """{dotted name: values that the files of config/ give it}, not resolved."""
    values = {}
    for path in CONFIG.rglob("*.yaml"):
        group = path.parent.relative_to(CONFIG)
        content = OmegaConf.to_container(OmegaConf.load(path))
        globally = group.parts[0] not in SHARED or "@package _global_" in path.read_text()
        for part in () if globally else reversed(group.parts):
            content = {part: content}
        for key, value in _named(content):
            values.setdefault(key, []).append(value)
    return values


def _named(section, prefix=""):
    """Yield (dotted name, value) of all keys in nested dictionaries."""
    for key, value in section.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _named(value, f"{prefix}{key}.")
