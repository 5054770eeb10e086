"""What pip is told: every dependency has a tested version, every upper bound a reason, and a wheel holds every file."""

import itertools
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PARTS = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
WHEEL = ("policy", "envs", "eval", "config", "pretrained", "train.py")


def _lines_of_constraints():
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_every_dependency_has_a_tested_version_within_its_bounds(python):
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    pins = [line for line in _lines_of_constraints() if line.marker is None or line.marker.evaluate(here)]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins)
    parts = {part: names for part, names in PARTS.items() if part != "robomimic" or python != "3.13"}  # not for 3.13
    for requirement in map(Requirement, itertools.chain(*parts.values())):
        if requirement.name == PROJECT["name"] or (requirement.marker and not requirement.marker.evaluate(here)):
            continue
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: tested {version}"


def test_every_upper_bound_has_a_reason():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    for name in itertools.chain(*PARTS.values()):
        if any(bound.operator in ("<", "<=", "==", "~=") for bound in Requirement(name).specifier):
            assert any(f'"{name}",' in line and "#" in line for line in lines), name


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs git's list of files")
def test_a_wheel_holds_what_a_checkout_runs(tmp_path):
    pytest.importorskip("setuptools")
    listed = subprocess.run(["git", "ls-files", *WHEEL], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {name for name in listed.stdout.split("\n") if (ROOT / name).is_file()}
    for name in (*files, "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        assert files <= set(wheel.namelist())
