"""What all command lines share: one clear line instead of a traceback for what a user can mend."""

import argparse
import functools
import os
import re
import sys
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from eval.shared.overrides import known_keys, task_folders
from eval.shared.streams import lasting_streams
from policy.registry import nearest

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, HydraException, OmegaConfBaseException)

NO_MEMORY = re.compile("(can't|not enough|out of).*memory")  # torch has a class of its own on CUDA alone


def command(main):
    """Run ``main``; user errors, and want of memory, become one line ``error: ...`` and exit code 1; DEBUG=1 shows the
    traceback.

    Ctrl-C ends it with a line and exit code 130. Standard streams that are closed, or whose reader goes, end nothing.
    """

    @functools.wraps(main)
    @lasting_streams()
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except USER_ERRORS as error:
            if os.environ.get("DEBUG"):
                raise
            print(f"error: {_explain(error)}", file=sys.stderr)
            raise SystemExit(1) from None
        except (MemoryError, RuntimeError) as error:
            if os.environ.get("DEBUG") or not (isinstance(error, MemoryError) or NO_MEMORY.search(str(error))):
                raise
            reason = " ".join(str(error).split()) or "no more can be had"
            print(f"error: memory: got too little ({reason}), allowed: smaller sizes", file=sys.stderr)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            print("stopped by SIGINT", file=sys.stderr)
            raise SystemExit(130) from None

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
        folders = [f"config/{name}" for name in task_folders()]
        return f"--config-dir: got {folder[1] if folder else 'none'}, allowed: {', '.join(folders)}"
    return " ".join(text.split("\nSet the environment")[0].split())


class Parser(argparse.ArgumentParser):
    """Arguments of a command that measures; its help keeps the lines of the docstring and shows every default."""

    def __init__(self, name, description, **options):
        options.setdefault("formatter_class", _Help)
        super().__init__(prog=f"python -m {name}", description=description, **options)

    def error(self, message):
        """As argparse, but names the form with dashes where key=value was given."""
        for key, value in re.findall(r"(\S+?)=(\S+)", message):
            option = f"--{key.replace('_', '-')}"
            if option in self._option_string_actions:
                message = f"{key}={value}: write {option} {value}"
        super().error(message)


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        text = action.help or ""
        if "default" in text or action.default in (None, [], False, argparse.SUPPRESS) or action.required:
            return text
        return f"{text} (default: %(default)s)"
