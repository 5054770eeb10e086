"""How robosuite draws without a display: a picture, or one line that names the variable; no traceback, no waiting."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

pytest.importorskip("robosuite")

from envs.robomimic import backend  # noqa: E402

VARIABLES = ("MUJOCO_GL", backend.DEVICE, "PYOPENGL_PLATFORM", "CUDA_VISIBLE_DEVICES", backend.SEEN)


@pytest.fixture
def clean(monkeypatch):
    """No variable is set, and what a test leaves in them is forgotten."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def egl(clean):
    """As ``clean``, where EGL works."""
    if backend._try("egl")[1] is not None:
        pytest.skip("no EGL here")
    return clean


SETTINGS = [
    *({"CUDA_VISIBLE_DEVICES": value} for value in ("", "-1", "GPU-8932f937-d72c-4106-c12f", "1,0", "0,1", "99", "x")),
    {backend.DEVICE: "0"},
    {backend.DEVICE: ""},
    {backend.DEVICE: "0", "CUDA_VISIBLE_DEVICES": "1"},
    {"PYOPENGL_PLATFORM": "osmesa"},
    {"MUJOCO_GL": "EGL", "CUDA_VISIBLE_DEVICES": "-1"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_that_draw(egl, settings, capsys):
    for name, value in settings.items():
        egl.setenv(name, value)
    assert backend.choose_renderer() == "egl" == os.environ["MUJOCO_GL"] == os.environ["PYOPENGL_PLATFORM"]
    assert os.environ[backend.DEVICE].isdigit()
    assert capsys.readouterr().out.count("\n") == ("MUJOCO_GL" not in settings)
    egl.setattr(backend, "_try", None)  # tried once, for the processes below, too
    assert backend.choose_renderer() == "egl" and not capsys.readouterr().out


REFUSED = [
    ({"MUJOCO_GL": "glx"}, ValueError, "MUJOCO_GL: got 'glx'.*egl, osmesa"),
    ({"MUJOCO_GL": "nonsense"}, ValueError, "MUJOCO_GL: got 'nonsense'.*egl, osmesa"),
    ({"MUJOCO_GL": "egl", backend.DEVICE: "x"}, OSError, f"{backend.DEVICE}: got 'x', allowed: 0 to"),
    ({"MUJOCO_GL": "egl", backend.DEVICE: "-1"}, OSError, f"{backend.DEVICE}: got '-1', allowed: 0 to"),
    ({"MUJOCO_GL": "egl", backend.DEVICE: "99"}, OSError, f"{backend.DEVICE}: got '99', allowed: 0 to"),
]


@pytest.mark.parametrize(("settings", "error", "words"), REFUSED)
def test_settings_that_are_refused(egl, settings, error, words):
    for name, value in settings.items():
        egl.setenv(name, value)
    with pytest.raises(error, match=words) as caught:
        backend.choose_renderer()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("named", ["", *backend.RENDERERS])
def test_no_renderer_is_one_error_that_names_the_packages(clean, named):
    clean.setenv("MUJOCO_GL", named)
    clean.setattr(backend, "_try", lambda name: (None, f"no {name} here"))
    with pytest.raises(OSError, match=f"MUJOCO_GL={named}" if named else "rendering") as caught:
        backend.choose_renderer()
    message = str(caught.value)
    assert "\n" not in message and os.environ["MUJOCO_GL"] == named
    tried = [named] if named else backend.RENDERERS
    for words in (*(f"{name}: no {name} here" for name in tried), "libegl1", "libosmesa6"):
        assert words in message


def test_the_second_renderer_is_taken_when_the_first_fails(clean, capsys):
    clean.setattr(backend, "_try", lambda name: (None, "broken") if name == "egl" else ("", None))
    assert backend.choose_renderer() == "osmesa" == os.environ["MUJOCO_GL"]
    assert capsys.readouterr().out.count("\n") == 1
    assert backend.choose_renderer() == "osmesa" and not capsys.readouterr().out


def test_a_driver_that_hangs(clean):
    clean.setattr(backend, "PATIENCE", 0.3)
    clean.setattr(backend, "PROBES", dict.fromkeys(backend.RENDERERS, "import time; time.sleep(60)"))
    with pytest.raises(OSError, match="no answer in 0.3 s"):
        backend.choose_renderer()


@pytest.mark.parametrize("renderer", ["egl", ""])
def test_without_robosuite_the_error_names_the_command(renderer):
    program = """
import sys
sys.modules["robosuite"] = sys.modules["mujoco"] = None
from envs.robomimic import backend
backend._try = lambda name: (None, "ModuleNotFoundError: No module named 'mujoco'")
from envs.robomimic.env import RobosuiteEnv
try:
    RobosuiteEnv(task="Lift")
except ImportError as error:
    print(error)
"""
    environment = {**os.environ, "MUJOCO_GL": renderer}
    environment.pop(backend.SEEN, None)
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 'pip install -e ".[robomimic]"' in result.stdout and result.stdout.count("\n") == 1


def test_a_picture_under_settings_that_robosuite_would_die_of(egl):
    """GPUs that are not there, another platform of PyOpenGL, and no folder for numba's code."""
    program = """
import numba.core.caching, os
numba.core.caching.CacheImpl._locator_classes = []
from envs.robomimic.env import RobosuiteEnv
env = RobosuiteEnv(task="Lift", cameras=("agentview",), image_size=32)
print(env.image("agentview").std() > 10, os.environ["CUDA_VISIBLE_DEVICES"])
env.close()
"""
    settings = {"CUDA_VISIBLE_DEVICES": "GPU-8932f937,1", backend.DEVICE: "0", "PYOPENGL_PLATFORM": "x11"}
    environment = {**os.environ, **settings}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "True GPU-8932f937,1"
    assert all(line.startswith("numba: ") for line in result.stderr.splitlines()), result.stderr
