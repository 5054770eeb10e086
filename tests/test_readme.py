"""README.md and docs/*.md: their commands parse, their links lead somewhere, the names that they promise import."""

import importlib
import io
import itertools
import re
import runpy
import shlex
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from paths import ROOT

from eval.shared.compose import compose

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TAUGHT = ROOT / "docs/extending.md"  # its commands use parts that the reader writes
PLACEHOLDERS = {"TASK", "NAME"}  # of a folder or file of config/
NAMES = {
    "policy": ["load_policy", "load_encoder"],
    "policy.attention": [
        "build_attention",
        "fibottention",
        "fibottention_mask",
        "list_attentions",
        "shuffle_heads",
        "wythoff_offsets",
    ],
    "policy.diffusion": [
        f"DiffusionPolicy.{name}" for name in ("act", "normalizer", "reset", "sample", "select_action")
    ],
    "policy.normalizer": ["Normalizer"],
    "policy.dataset.replay_buffer": ["ReplayBuffer.open"],
}


def _commands(pages):
    """The command lines of all code blocks and inline code, without comments; what [brackets] enclose is included."""
    found = []
    for page in pages:
        text = page.read_text()
        lines = itertools.chain(*(b.split("\n") for b in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)))
        lines = [*lines, *re.findall(r"`(python (?:-m|train\.py) [^`]*)`", text)]
        for line in lines:
            line = re.sub(r"(?<= )\[([^\]]*)\]", r"\1", line.split(" #")[0])
            found += [shlex.split(part) for part in line.split("&&") if part.strip() and not part.startswith("#")]
    return found


def _training(words):
    """(folder, name, overrides) of a command that trains; None where the folder or name is only a placeholder."""
    words = words[words.index("train.py") + 1 :]
    folder, name, overrides = None, None, []
    for word in words:
        if word.startswith("--config-dir="):
            folder = word.removeprefix("--config-dir=config/")
        elif word.startswith("--config-name="):
            name = word.removeprefix("--config-name=")
        elif not word.startswith("-") and "=" in word:
            overrides.append(word)
    return None if folder is None or {folder, name} & PLACEHOLDERS else (folder, name, tuple(overrides))


def _jobs(overrides):
    """Overrides of the jobs of a sweep, without the choice of hydra's launcher, which may not be installed."""
    parsed = OverridesParser.create().parse_overrides([o for o in overrides if not o.startswith("hydra")])
    choices = [
        [f"{o.key_or_group}={c}" for c in o.sweep_string_iterator()] if o.is_sweep_override() else [o.input_line]
        for o in parsed
    ]
    count = max(map(len, choices), default=1)  # every choice once, not every combination
    return [[choice[job % len(choice)] for choice in choices] for job in range(count)]


COMMANDS = _commands(PAGES)
TRAININGS = sorted(
    {_training(words) for words in _commands(p for p in PAGES if p != TAUGHT) if "train.py" in words} - {None}, key=str
)
MODULES = sorted({words[words.index("-m") + 1] for words in COMMANDS if "-m" in words} - {"venv", "pytest"})


@pytest.mark.parametrize("folder, name, overrides", TRAININGS)
def test_a_command_that_trains_composes(folder, name, overrides):
    for job in _jobs(overrides):
        assert compose(folder, job, name)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", MODULES)
def test_a_command_that_measures_exists_with_its_options(module, monkeypatch):
    uses = [words[words.index("-m") + 2 :] for words in COMMANDS if module in words]
    asked = {(words[0],) if module == "eval.speed" and words else () for words in uses}
    known = {part: _help(module, part, monkeypatch) for part in asked}
    for words in uses:
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        missing = options - known[(words[0],) if module == "eval.speed" and words else ()]
        assert not missing, f"{module} {' '.join(words)}"


def _help(module, part, monkeypatch):
    """The options that ``python -m MODULE [PART] --help`` names, each with a line of its own."""
    monkeypatch.setattr(sys, "argv", [module, *part, "--help"])
    printed = io.StringIO()
    with pytest.raises(SystemExit) as end, redirect_stdout(printed), redirect_stderr(printed):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert end.value.code == 0, printed.getvalue()
    lines = [*printed.getvalue().partition("options:")[2].split("\n"), ""]
    for line, following in itertools.pairwise(lines):  # an explanation follows two spaces, or stands in the next line
        assert not re.fullmatch(r"  --\S+( \S+)*", line) or following.startswith(" " * 10), f"{module}: {line}"
    return set(re.findall(r"--[a-z][a-z-]*", printed.getvalue()))


def test_extras_that_are_to_be_installed_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for page in PAGES for extra in re.findall(r"-e \"?\.\[([a-z,]+)\]", page.read_text())}
    assert named and {one for extra in named for one in extra.split(",")} <= set(extras)


def test_the_line_after_tests_is_the_command_that_ci_runs():
    lines = (ROOT / "README.md").read_text().split("\n")
    assert "pytest" in lines[lines.index("# tests") + 1]
    assert "train.py --config-dir=config/pusht" in lines[lines.index("# train") + 1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not heading or heading in _headings(path), target


def _headings(page):
    """Anchors of a page's headings, as GitHub derives them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_page_is_linked_from_readme():
    linked = set(re.findall(r"\]\((docs/[a-z]+\.md)", (ROOT / "README.md").read_text()))
    assert linked == {f"docs/{page.name}" for page in PAGES[1:]}


@pytest.mark.parametrize("module, name", [(module, name) for module, names in NAMES.items() for name in names])
def test_public_names_import(module, name):
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found) or isinstance(found, property)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_compile_and_import(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(block, str(page), "exec")
        for module, names in re.findall(r"^from ((?:policy|envs|eval)[\w.]*) import ([\w, ]+)$", block, re.MULTILINE):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
