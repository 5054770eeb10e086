"""Checks of arguments whose errors help: KEY: got X, allowed: Y."""

import difflib
import os
from pathlib import Path


def check_choice(key, name, choices, also=""):
    """Raise ValueError, which lists the ``choices`` and the nearest one, for a ``name`` that is none of them."""
    if name not in list(choices):
        near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{key}: got {name!r}{hint}, allowed: {', '.join(choices)}{also}")


def check_positive(**values):
    """Raise ValueError for one of ``values`` below 1."""
    for key, value in values.items():
        if not value >= 1:
            raise ValueError(f"{key}: got {value}, allowed: >= 1")


def check_seed(seed):
    """Raise ValueError for a seed that numpy's seed sequences do not take as one word."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}, allowed: 0 to 2**32 - 1")


def check_demo_options(*, episodes, seed, recovery, processes):
    """Raise ValueError for options that no maker of demonstrations takes."""
    check_positive(episodes=episodes, processes=processes)
    check_seed(seed)
    if not 0 <= recovery <= 1:
        raise ValueError(f"recovery: got {recovery}, allowed: 0 to 1")


def check_output(output, *endings):
    """Raise ValueError for a name without one of the ``endings`` or in a folder that cannot be written."""
    output = Path(output)
    if not output.name.endswith(endings):
        raise ValueError(f"output: got {output}, allowed: a name ending in {' or '.join(endings)}")
    if not (output.parent.is_dir() and os.access(output.parent, os.W_OK | os.X_OK)):
        raise ValueError(f"output: got {output}, allowed: a name in a folder that is there and can be written")
