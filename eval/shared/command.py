"""What all command lines share: one clear line instead of a traceback for what a user can mend."""

import difflib
import functools
import os
import re
import sys
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, HydraException, OmegaConfBaseException)
CONFIG = Path(__file__).parent.parent.parent / "config"


def command(main):
    """Run ``main``; user errors become one line ``error: ...`` and exit code 1. DEBUG=1 shows the traceback."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except USER_ERRORS as error:
            if os.environ.get("DEBUG"):
                raise
            print(f"error: {_explain(error)}", file=sys.stderr)
            raise SystemExit(1) from None

    return run


def _explain(error):
    """The message on one line; for a wrong hydra option or key, with the nearest one that exists."""
    text = str(error)
    option = re.search(
        r"Could not (?:find|load) '([^']+)'.*?Available options in '([^']+)':(.*?)Config search", text, re.DOTALL
    )
    if option:
        group, name, options = option[2], option[1].rsplit("/", 1)[-1], option[3].split()
        return f"{group}: got {name!r}{nearest(name, options)}, allowed: {', '.join(options)}"
    assignment = re.search(r"Error parsing override '(.*?)'\s", text)
    if assignment:
        return f"override: got {assignment[1]!r}, allowed: key=value"
    key = re.search(r"Could not override '([^']+)'", text)
    if key:
        near = nearest(key[1], known_keys())
        return f"override: got {key[1]!r}{near}, allowed: keys that --cfg job prints, or +{key[1]}"
    primary = re.search(
        r"Cannot find primary config '([^']+)'(?:.*provider=command-line, path=file://(\S+))?", text, re.DOTALL
    )
    if primary and primary[2]:
        names = sorted(path.stem for path in Path(primary[2]).glob("*.yaml"))
        return f"--config-name: got {primary[1]!r}{nearest(primary[1], names)}, allowed: {', '.join(names)}"
    folder = re.search(r"Additional config directory '([^']+)' not found", text)
    if primary or folder:
        folders = sorted(f"config/{path.parent.name}" for path in CONFIG.glob("*/typea.yaml"))
        return f"--config-dir: got {folder[1] if folder else 'none'}, allowed: {', '.join(folders)}"
    return " ".join(text.split("\nSet the environment")[0].split())


def nearest(name, options):
    """The addition (did you mean 'x'?) with the one of ``options`` most like ``name``, or nothing."""
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_types(config):
    """Raise ValueError for a value of ``config`` whose type no file of config/ has for that key.

    A number where only text was seen, text where only numbers, null where it is nowhere null, and so on.
    """
    known = known_values()
    for key, value in _named(OmegaConf.to_container(config, resolve=True)):
        seen = [other for other in known.get(key, []) if not (isinstance(other, str) and "${" in other)]
        if all(other is None for other in seen):  # nothing is known but that it may be left out
            continue
        kinds = {_kind(other) for other in seen}
        if _kind(value) not in kinds and not (_kind(value) == "integer" and "number" in kinds):
            example = next(other for other in seen if other is not None)
            example = f"{key}.{next(iter(example))}=..." if isinstance(example, dict) else repr(example)
            raise ValueError(f"{key}: got {value!r}, allowed: {' or '.join(sorted(kinds))}, as in {example}")


def _kind(value):
    kinds = {bool: "true/false", int: "integer", float: "number", str: "text", list: "list", dict: "section"}
    return kinds.get(type(value), "null")


def known_keys():
    """Dotted names of all keys in the files of config/."""
    return sorted(known_values())


def known_values():
    """{dotted name: values that the files of config/ give it}, not resolved."""
    values = {}
    for path in CONFIG.rglob("*.yaml"):
        group = path.parent.relative_to(CONFIG)
        content = OmegaConf.to_container(OmegaConf.load(path))
        folder_of_a_task = (path.parent / "typea.yaml").exists()
        globally = group == Path() or "@package _global_" in path.read_text() or folder_of_a_task
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
