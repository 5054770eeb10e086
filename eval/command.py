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

USER_ERRORS = (ValueError, OSError, ImportError, HydraException, OmegaConfBaseException)
CONFIG = Path(__file__).parent.parent / "config"


def command(main):
    """Run ``main``; user errors become ``error: ...`` and exit code 1. DEBUG=1 in the environment shows the traceback."""

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
        return f"{group}: got {name!r}{_nearest(name, options)}, allowed: {', '.join(options)}"
    key = re.search(r"Could not override '([^']+)'", text)
    if key:
        return f"override: got {key[1]!r}{_nearest(key[1], known_keys())}, allowed: keys that --cfg job prints, or +{key[1]}"
    return " ".join(text.split("\nSet the environment")[0].split())


def _nearest(name, options):
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def known_keys():
    """Dotted names of all keys in the files of config/."""
    keys = set()
    for path in CONFIG.rglob("*.yaml"):
        group = path.parent.relative_to(CONFIG)
        globally = (
            group == Path() or "@package _global_" in path.read_text() or (CONFIG / "task" / f"{group}.yaml").exists()
        )
        keys.update(_names(OmegaConf.load(path), "" if globally else ".".join([*group.parts, ""])))
    return sorted(keys)


def _names(config, prefix):
    for key in config:
        yield f"{prefix}{key}"
        child = config._get_node(key)
        if OmegaConf.is_dict(child):
            yield from _names(child, f"{prefix}{key}.")
