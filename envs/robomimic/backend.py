"""robosuite, imported once, quietly, and with a way to render without a display that was seen to work.

MuJoCo decides how to render when it is first imported, and PyOpenGL cannot change its mind afterwards: each way is
therefore tried in a process of its own, and the choice is left in MUJOCO_GL for this process and its children.
"""

import contextlib
import os
import subprocess
import sys
import types

from envs.shared.checks import check_choice

RENDERERS = ("egl", "osmesa")
PACKAGES = {"egl": "libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0", "osmesa": "libosmesa6"}
DEVICE = "MUJOCO_EGL_DEVICE_ID"
SEEN = "FIBOTTENTION_RENDERER"  # the renderer that this process or one above it saw working
PATIENCE = 60  # s for a try; drivers of eight GPUs take ten
PROBES = {  # print what to leave in MUJOCO_EGL_DEVICE_ID
    "egl": """
import os, sys
from mujoco import egl
count, wanted = len(egl.EGL.eglQueryDevicesEXT()), os.environ.pop("MUJOCO_EGL_DEVICE_ID", "")
if wanted and wanted not in map(str, range(count)):
    sys.exit(f"MUJOCO_EGL_DEVICE_ID: got {wanted!r}, allowed: 0 to {count - 1}, or unset")
# robosuite would take the first GPU that CUDA may see, and the first device, whether or not they draw.
first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
devices = sorted(map(str, range(count)), key=lambda device: device != first)
for device in [wanted] if wanted else devices:
    egl.EGL_DISPLAY, os.environ["MUJOCO_EGL_DEVICE_ID"] = None, device
    try:
        context = egl.GLContext(16, 16)
        context.make_current()
    except (ImportError, RuntimeError, egl.error.Error) as error:
        reason = f"device {device}: {error}"
    else:
        context.free()
        sys.exit(print(device))
sys.exit(reason if count else "no device")
""",
    "osmesa": """
from mujoco.osmesa import GLContext
context = GLContext(16, 16)
context.make_current()
context.free()
""",
}
INSTALL = 'pip install -e ".[robomimic]"'


def load_robosuite(*, render=True):
    """The module robosuite. render: also settle how to draw.

    Raises ImportError where it is not installed and OSError where nothing draws without a display.
    """
    if "robosuite" not in sys.modules:
        # robosuite sets its own log level on import, so that only its private settings can keep it quiet.
        macros = types.ModuleType("robosuite.macros_private")
        macros.CONSOLE_LOGGING_LEVEL = "ERROR"
        macros.CACHE_NUMBA = False  # it would fail where nothing can be kept; ``keep`` does not
        sys.modules.setdefault("robosuite.macros_private", macros)
    if render:
        choose_renderer()
    try:
        with _without("CUDA_VISIBLE_DEVICES"):  # robosuite refuses an EGL device that is not among its numbers
            import robosuite
            from robosuite.utils import control_utils, transform_utils
    except ImportError as error:
        raise ImportError(f"robosuite: cannot be imported ({error}); to install it: {INSTALL}") from error
    from envs.shared.numba_cache import keep  # numba brings scipy, which only simulators need

    for function in (*vars(control_utils).values(), *vars(transform_utils).values()):
        if hasattr(function, "py_func"):
            keep(function)
    return robosuite


@contextlib.contextmanager
def _without(variable):
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value


def rotation_matrix(quaternion):
    """Matrices (..., 3, 3) of quaternions (..., 4), x y z w as in robosuite."""
    from scipy.spatial.transform import Rotation  # robosuite brings it

    return Rotation.from_quat(quaternion).as_matrix()


def choose_renderer():
    """The name of the renderer that MuJoCo uses from now on: that of MUJOCO_GL, or else the first that draws.

    It is tried once, also for the processes that this one starts. An EGL device is MUJOCO_EGL_DEVICE_ID, or else the
    first of CUDA_VISIBLE_DEVICES, or else any. A choice of our own is printed. Raises ValueError for an unknown
    renderer and OSError, naming the variable or the Debian packages, when none works.
    """
    named = os.environ.get("MUJOCO_GL", "").lower().strip()
    if named:
        check_choice("MUJOCO_GL", named, RENDERERS, " or unset")
    if named and named == os.environ.get(SEEN):
        return named
    reasons = {}
    for name in [named] if named else RENDERERS:
        device, reasons[name] = _try(name)
        if reasons[name] is None:
            chosen = {"MUJOCO_GL": name, **({DEVICE: device} if device else {})}
            os.environ.update(chosen, PYOPENGL_PLATFORM=name, **{SEEN: name})
            if not named:
                settings = ", ".join(f"{key}={value}" for key, value in chosen.items())
                print(f"rendering without a display: {name.upper()} ({settings})")
            return name
    if any("No module named" in reason for reason in reasons.values()):
        raise ImportError(f"robosuite: cannot be imported ({reasons[name]}); to install it: {INSTALL}")
    tried = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    needs = " or ".join(f"`apt-get install {PACKAGES[name]}`" for name in RENDERERS)
    source = f"MUJOCO_GL={named}" if named else "rendering"
    allowed = f"{', '.join(RENDERERS)} that work, or MUJOCO_GL unset" if named else "EGL or OSMesa"
    raise OSError(f"{source}: got no working OpenGL ({tried}), allowed: {allowed}; on Debian or Ubuntu {needs}")


def _try(renderer):
    """(EGL device or "", None) of a ``renderer`` that works here, else (None, why not)."""
    environment = {**os.environ, "MUJOCO_GL": renderer}
    environment.pop("PYOPENGL_PLATFORM", None)
    command = [sys.executable, "-c", PROBES[renderer]]
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return None, f"no answer in {PATIENCE} s"
    if result.returncode == 0:
        return (result.stdout.split() or [""])[-1], None  # drivers may talk before
    lines = [line for line in result.stderr.splitlines() if line and not line[0].isspace()]
    return None, lines[-1] if lines else f"exit code {result.returncode}"
