"""robosuite tasks as robomimic records them: thin, drawn only when asked, seeded episode by episode.

Sources: robosuite 1.5 (arXiv 2009.12293), robomimic (arXiv 2108.03298), whose conventions are kept: pictures the right
way up, object state under "object", sparse reward, states as flattened MuJoCo states.
"""

import contextlib
import io
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from envs.robomimic.backend import load_robosuite
from envs.robomimic.metadata import check_env_args, make_arguments, standard_env_args

CAMERAS = ("agentview", "robot0_eye_in_hand")
MODEL_SEED = 0  # sizes drawn when the model is built, such as that of the cube of Lift, are the same everywhere
ARM_SIZES = {"absolute": 10, "recorded": 7}  # position 3, rotation 6 (first two rows) or 3 (rotation vector), gripper 1


class RobosuiteEnv:
    """One robosuite episode at a time.

    env_args: a data set's (parsed JSON, see envs/robomimic/metadata.py), or None for ``task`` with one Panda;
    actions: "absolute": (10 an arm) position 3 (m, world), 6-D rotation (arXiv 1812.07035, rows), gripper 1;
    "recorded": what the controller of env_args takes, 7 an arm. cameras: what ``observe`` draws, () for nothing;
    reflections: draw the 1 % mirror image in the floor, which doubles the time of every picture; None: as env_args
    say, else True, as in the official files. The robosuite environment itself is at ``robosuite``, its MuJoCo model,
    as data sets keep it beside the states, at ``model_xml``.

    Raises ImportError without robosuite, OSError without OpenGL, ValueError for env_args that are not understood.
    """

    def __init__(
        self,
        *,
        task=None,
        env_args=None,
        actions="absolute",
        cameras=CAMERAS,
        image_size=84,
        max_steps=400,
        reflections=None,
        film_camera="agentview",
    ):
        recorded = None if env_args is None else env_args.get("env_name")
        if (task or recorded) is None or (task and recorded and task != recorded):
            raise ValueError(f"task, env_args: got {task!r} and those of {recorded!r}, allowed: one, or the same twice")
        if max_steps < 1:
            raise ValueError(f"max_steps: got {max_steps}, allowed: >= 1")
        self.robosuite = None
        robosuite = load_robosuite()
        self.version = robosuite.__version__
        if env_args is None:
            env_args = standard_env_args(task, version=self.version, cameras=cameras, image_size=image_size)
        check_env_args(env_args, robosuite.ALL_ENVIRONMENTS)
        self.env_args, self.actions, self.cameras, self.image_size = env_args, actions, tuple(cameras), image_size
        self.max_steps, self.film_camera = max_steps, film_camera
        self.reflections = env_args.get("reflections", True) if reflections is None else reflections
        arguments = make_arguments(env_args, actions=actions)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.robosuite = robosuite.make(
                    env_args["env_name"], **arguments | {"has_offscreen_renderer": True, "seed": MODEL_SEED}
                )
        except (TypeError, AssertionError, KeyError) as error:
            raise ValueError(
                f"env_args: got {env_args['env_name']} of version {env_args.get('env_version')}, which robosuite"
                f" {self.version} does not build ({error})"
            ) from error
        names = dict.fromkeys((*cameras, film_camera))
        unknown = [name for name in names if name not in self.robosuite.sim.model.camera_names]
        if unknown:
            allowed = ", ".join(self.robosuite.sim.model.camera_names)
            self.close()
            raise ValueError(f"cameras: got {unknown}, allowed: {allowed}")
        self.num_arms = len(self.robosuite.robots)
        self.robosuite.reset()  # hides the marks of robosuite's sites, which a first ``reset_to`` would show
        self.model_xml = self._model_xml()
        self.steps = 0

    # Episodes ------------------------------------------------------------------------------------------------

    def reset(self, seed):
        """Start the episode that ``seed`` alone decides on, whatever ran before."""
        # robosuite's samplers hold on to the generator that they were made with, so that its state is what can be set.
        self.robosuite.rng.bit_generator.state = np.random.default_rng(int(seed)).bit_generator.state
        self.robosuite.reset()
        self.steps = 0

    def reset_to(self, state):
        """Put the simulation into a recorded ``state`` (S,), a flattened MuJoCo state; the model stays as it is."""
        state = np.asarray(state, dtype=np.float64)
        size = len(self.state)
        if state.shape != (size,) or not np.isfinite(state).all():
            raise ValueError(f"state: got shape {state.shape} or NaN, allowed: {size} finite numbers")
        self.robosuite.sim.set_state_from_flattened(state)
        self.robosuite.sim.forward()
        self.steps = 0

    def load_model(self, xml):
        """Put a recording's ``model_xml`` in place of the model, until another is loaded; an episode has to follow.

        Raises ValueError for one that the installed robosuite cannot build, after which only ``close`` is left.
        """
        self._make_current()  # what the old model had drawn with is freed in the current OpenGL context
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.robosuite.reset_from_xml_string(xml)
        except (ValueError, KeyError, AttributeError, ElementTree.ParseError) as error:
            raise ValueError(
                f"model_file: got a model that robosuite {self.version} does not build ({error})"
            ) from error
        self.robosuite.sim.reset()
        self.model_xml = xml
        self.steps = 0

    def step(self, action):
        """Carry out ``action`` for one control step (0.05 s at 20 Hz).

        Returns (reward, done, info): reward 1.0 where the task's own check says success; done on success or after
        ``max_steps``; info {"success"}.
        """
        action = np.asarray(action, dtype=np.float64)
        size = ARM_SIZES[self.actions] * self.num_arms
        if action.shape != (size,) or not np.isfinite(action).all():
            raise ValueError(f"action: got shape {action.shape} {action}, allowed: {size} finite numbers")
        if self.actions == "absolute":
            action = np.concatenate([_absolute(arm) for arm in np.split(action, self.num_arms)])
        self.robosuite.step(action)
        self.steps += 1
        success = self.success
        return float(success), success or self.steps >= self.max_steps, {"success": success}

    @property
    def success(self):
        """What robosuite's own check of the task says now."""
        return bool(self.robosuite._check_success())

    @property
    def state(self):
        """Flattened MuJoCo state (S,) float64: time, positions, velocities."""
        return self.robosuite.sim.get_state().flatten()

    # Looking -------------------------------------------------------------------------------------------------

    def observe(self):
        """{camera_image: (3, h, w) uint8, robosuite's low-dim keys and "object": (D,) float32} of the current state."""
        images = {f"{camera}_image": self.image(camera).transpose(2, 0, 1) for camera in self.cameras}
        return images | {key: value.astype(np.float32) for key, value in self.low_dim().items()}

    def low_dim(self):
        """robosuite's low-dimensional observations, float64, with the object state under "object" as in robomimic."""
        self.robosuite.sim.forward()  # without it sites and bodies lag one physics step (2 ms) behind the state
        self.robosuite._update_observables(force=True)  # sensors relative to another one read its value of before
        values = self.robosuite._get_observations(force_update=True)
        low_dim = {k: np.asarray(v, dtype=np.float64) for k, v in values.items() if not k.endswith("-state")}
        if "object-state" in values:
            low_dim["object"] = np.asarray(values["object-state"], dtype=np.float64)
        return low_dim

    def image(self, camera, size=None):
        """What ``camera`` sees: (h, w, 3) uint8, h = w = ``size``, the observations' size by default."""
        import mujoco

        size = size or self.image_size
        context = self._make_current()
        context.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = int(self.reflections)
        return self.robosuite.sim.render(height=size, width=size, camera_name=camera)[::-1].copy()

    def frame(self, size=256):
        """A larger picture (size, size, 3) uint8 for videos."""
        return self.image(self.film_camera, size)

    def close(self):
        """Free the simulator and its OpenGL context."""
        if self.robosuite is not None:
            if getattr(self.robosuite, "sim", None) is not None:
                self._make_current()
            self.robosuite.close()
            self.robosuite = None

    def _model_xml(self):
        """The MuJoCo model, without what differs between installations and processes.

        MuJoCo can save only the model that it compiled last, and marks files that it has read before.
        """
        folder = Path(sys.modules["robosuite"].__file__).parent
        xml = self.robosuite.sim.model.get_xml().replace(f'"{folder}/', '"robosuite/')
        return re.sub(' content_type="[^"]*"', "", xml)

    def _make_current(self):
        """robosuite's render context, made the one that OpenGL works in: robosuite does so only when it is new.

        With two environments the last one made would draw for both, and closing one would free what the other has.
        """
        context = self.robosuite.sim._render_context_offscreen
        context.gl_ctx.make_current()
        return context


def _absolute(arm):
    """(10,) position, 6-D rotation, gripper -> (7,) position, rotation vector, gripper."""
    from scipy.spatial.transform import Rotation  # robosuite brings it

    first, second = arm[3:6], arm[6:9]
    x = first / max(np.linalg.norm(first), 1e-9)
    y = second - (x @ second) * x
    y /= max(np.linalg.norm(y), 1e-9)
    rotation = Rotation.from_matrix(np.stack([x, y, np.cross(x, y)]))
    return np.concatenate([arm[:3], rotation.as_rotvec(), arm[9:]])
