"""What ``python train.py`` says of itself: usage without a configuration, annotated keys with one."""

import contextlib
import io
import re

from eval.shared.compose import first_config
from eval.shared.overrides import CONFIG, SHARED, task_folders

# Options that hydra takes; all else of the form --name is meant as key=value.
FLAGS = {
    "--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun",
    "--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--info",
}  # fmt: skip
KEY = re.compile(r"^(\s*)([\w.-]+):(.*?)(?:\s{2,}#\s*(.*)|\s+#\s(.*))?$")


def config_dir(arguments):
    """The folder named by --config-dir or -cd among the ``arguments``, or None."""
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            return value if equals else (arguments[number + 1] if number + 1 < len(arguments) else None)
    return None


def check_flags(arguments):
    """Raise ValueError for --key where key=value is meant."""
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("--") and name not in FLAGS:
            following = arguments[number + 1] if number + 1 < len(arguments) else "VALUE"
            raise ValueError(f"{argument}: write {name.lstrip('-')}={value if equals else following}")


def usage(text):
    """The docstring of train.py and the folders that can be trained."""
    lines = [f"  config/{name:<14} {_title(name)}" for name in task_folders()]
    return "\n".join([text.strip(), "", "What can be trained:", *lines])


def _title(folder):
    """The first comment of the configuration that the folder trains by default."""
    text = (CONFIG / folder / f"{first_config(CONFIG / folder)}.yaml").read_text()
    return text.split("\n")[0].lstrip("# ")


def annotated(show):
    """What ``show()`` prints, YAML, with the comment of each key in the files of config/."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        show()
    comments, lines, parents = _comments(), [], []
    for line in printed.getvalue().splitlines():
        found = KEY.match(line)
        if found:
            parents = [*parents[: len(found[1]) // 2], found[2]]
            comment = comments.get(".".join(parents))
            line = f"{line:<40}  # {comment}" if comment else line
        lines.append(line)
    return "\n".join(lines)


def _comments():
    """{dotted key: the comment beside it in config/base, or in the files of another group where these agree}."""
    comments = {}
    for path in [*CONFIG.glob("base/*.yaml"), *CONFIG.rglob("*.yaml")]:
        text = path.read_text()
        group = path.parent.relative_to(CONFIG).parts
        parents = [] if group[0] not in SHARED or "@package _global_" in text else list(group)
        offset, keys = len(parents), list(parents)
        for line in text.splitlines():
            found = KEY.match(line)
            if found and not line.lstrip().startswith(("#", "-")):
                keys = [*keys[: offset + len(found[1]) // 2], found[2]]
                comment = found[4] or found[5]
                if comment and not (found[3].lstrip().startswith("{") and len(keys) == 1):
                    comments.setdefault(".".join(keys), []).append((path.parent.name, comment))
    said = {
        key: [text for group, text in found if group == "base"] or [text for _, text in found]
        for key, found in comments.items()
    }
    return {key: texts[0] for key, texts in said.items() if len(set(texts)) == 1}
