"""Imports run one way, train.py -> eval -> policy, envs, and simulators are loaded at first use only."""

import ast
import subprocess
import sys

import pytest
from paths import ROOT

SIMULATORS = {"gym_pusht", "mujoco", "pygame", "pymunk", "robosuite"}
IMPORTERS = ("import_module", "__import__")
FILES = sorted(path for package in ("policy", "envs", "eval") for path in (ROOT / package).rglob("*.py"))


def imports(source, package=""):
    """[(top-level module, whether it is imported as soon as the file is)] of Python ``source``.

    Counts import statements and importlib.import_module or __import__ of a literal; relative ones are ``package``.
    """
    found = []

    def visit(node, at_import):
        if isinstance(node, ast.Import):
            found.extend((alias.name.split(".")[0], at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.append((package if node.level else node.module.split(".")[0], at_import))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rsplit(".", 1)[-1] in (
            "import_module",
            "__import__",
        ):
            literals = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
            found.extend((name.split(".")[0], at_import) for name in literals)
        in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not in_function)

    visit(ast.parse(source), True)
    return found


def imports_of(path):
    return imports(path.read_text(), package=path.relative_to(ROOT).parts[0])


def named(path):
    return str(path.relative_to(ROOT))


def test_the_walk_sees_every_kind_of_import():
    source = """
import a.b, c as d
from e.f import g
from . import h
if True:
    import i
try:
    import j
except ImportError:
    pass
class K:
    import l
def m():
    import n
    def o():
        from p import q
r = lambda: __import__("s.t")
import importlib
importlib.import_module("u.v")
"""
    top, late = [], []
    for name, at_import in imports(source, "own"):
        (top if at_import else late).append(name)
    assert top == ["a", "c", "e", "own", "i", "j", "l", "importlib", "u"]
    assert late == ["n", "p", "s"]


def test_the_walk_reads_this_project():
    """A wrong path or an empty glob would let every other test here pass."""
    assert len(FILES) > 25
    assert {"pymunk", "gym_pusht"} <= {name for path in FILES for name, _ in imports_of(path)}
    assert {"eval", "policy"} <= {name for name, _ in imports_of(ROOT / "train.py")}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_run_one_way(path):
    """At any depth: a lazy import in the wrong direction is wrong too."""
    package = path.relative_to(ROOT).parts[0]
    forbidden = {
        "policy": {"envs", "eval", "train", "tests"},
        "envs": {"policy", "eval", "train", "tests", "torch", "torchvision"},
        "eval": {"train", "tests"},
    }[package]
    assert {name for name, _ in imports_of(path)} & forbidden == set()


@pytest.mark.parametrize("path", [p for p in FILES if p.relative_to(ROOT).parts[0] != "envs"], ids=named)
def test_no_simulator_is_imported_at_the_top_outside_of_envs(path):
    assert {name for name, at_import in imports_of(path) if at_import} & SIMULATORS == set()


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import envs, envs.pusht, envs.pusht.scenes", {"policy", "torch", *SIMULATORS}),
        # What comes with robosuite only: without it an error has to name robosuite, not scipy.
        ("import envs.robomimic_demos, envs.robomimic_images, envs.robomimic.scenes", {"policy", "scipy", *SIMULATORS}),
        ("import policy, policy.build, policy.dataset.download", {"envs", "eval", *SIMULATORS}),
        ("import eval.rollout", SIMULATORS),
    ],
)
def test_importing_loads_no_simulator(statement, absent):
    program = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) & absent == set()
