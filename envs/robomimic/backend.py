"""robosuite, imported once, quietly, and with a way to render without a display that was seen to work.

MuJoCo decides how to render when it is first imported, and PyOpenGL cannot change its mind afterwards: each way is
therefore tried in a process of its own, and the choice is left in MUJOCO_GL for this process and its children.
"""

import os
import subprocess
import sys
import types

RENDERERS = ("egl", "osmesa")
PACKAGES = {"egl": "libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0", "osmesa": "libosmesa6"}
PROBE = "from mujoco import GLContext; context = GLContext(16, 16); context.make_current(); context.free()"
INSTALL = 'pip install -e ".[robomimic]"'


def load_robosuite(*, render=True):
    """The module robosuite. render: also settle how to draw.

    Raises ImportError where it is not installed and OSError where nothing draws without a display.
    """
    if "robosuite" not in sys.modules:
        # robosuite sets its own log level on import, so that only its private settings can keep it quiet.
        macros = types.ModuleType("robosuite.macros_private")
        macros.CONSOLE_LOGGING_LEVEL = "ERROR"
        sys.modules.setdefault("robosuite.macros_private", macros)
    if render:
        choose_renderer()
    try:
        import robosuite
    except ImportError as error:
        raise ImportError(f"robosuite: cannot be imported ({error}); to install it: {INSTALL}") from error
    return robosuite


def rotation_matrix(quaternion):
    """Matrices (..., 3, 3) of quaternions (..., 4), x y z w as in robosuite."""
    from scipy.spatial.transform import Rotation  # robosuite brings it

    return Rotation.from_quat(quaternion).as_matrix()


def choose_renderer():
    """The name of the renderer that MuJoCo uses from now on; one that MUJOCO_GL names already is left alone.

    The first call prints the choice. Raises OSError naming the Debian packages when none works.
    """
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    if chosen:
        return chosen
    reasons = {}
    for name in RENDERERS:
        reasons[name] = _failure(name)
        if reasons[name] is None:
            os.environ["MUJOCO_GL"] = name
            print(f"rendering without a display: {name.upper()} (MUJOCO_GL={name})")
            return name
    if "No module named" in reasons[RENDERERS[0]]:
        raise ImportError(f"robosuite: cannot be imported ({reasons[RENDERERS[0]]}); to install it: {INSTALL}")
    tried = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    needs = " or ".join(f"`apt-get install {PACKAGES[name]}`" for name in RENDERERS)
    raise OSError(f"rendering: got no working OpenGL ({tried}), allowed: EGL or OSMesa; on Debian or Ubuntu {needs}")


def _failure(renderer):
    """Why ``renderer`` does not work here, None when it does."""
    environment = {**os.environ, "MUJOCO_GL": renderer}
    environment.pop("PYOPENGL_PLATFORM", None)
    result = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    lines = [line for line in result.stderr.splitlines() if line and not line[0].isspace()]
    return lines[-1] if lines else f"exit code {result.returncode}"
