"""Push-T: a thin layer over gym-pusht that renders only when asked and restores recorded states exactly.

Source: Chi et al., Diffusion Policy (arXiv 2303.04137), environment of huggingface/gym-pusht.
Lengths are in px of the 512 x 512 world, angles in rad; one step is 0.1 s.
"""

import os
import warnings

import numpy as np

WORLD_SIZE = 512.0
LIBRARIES = "apt-get install libgl1 libglib2.0-0"  # of Debian and Ubuntu; OpenCV loads them, even without a display


def push_t_environment():
    """gym-pusht's environment class, imported quietly and drawing without a display.

    Raises ImportError with the line that installs OpenCV's libraries, which a bare Debian or Ubuntu lacks.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from gym_pusht.envs.pusht import PushTEnv
    except ImportError as error:
        if "cannot open shared object file" not in str(error):
            raise
        raise ImportError(f"gym-pusht: cannot load OpenCV ({error}); on Debian or Ubuntu: {LIBRARIES}") from error
    return PushTEnv


def keypoints(states):
    """Corners of the T and the agent in the world, the true state behind an image.

    states (..., 5) [agent x, agent y, block x, block y, block angle] -> (..., 9, 2) px: the eight corners in the
    order of gym-pusht's ``add_tee``, then the agent.
    """
    states = np.asarray(states, dtype=np.float64)
    # Corners of the two rectangles of the T in the block frame: bar, then stem (gym-pusht ``add_tee``, scale 30).
    corners = np.array(
        [[-60, 30], [60, 30], [60, 0], [-60, 0], [-15, 30], [-15, 120], [15, 120], [15, 30]], dtype=np.float64
    )
    cos, sin = np.cos(states[..., 4]), np.sin(states[..., 4])
    rotation = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)  # (..., 2, 2)
    world = np.einsum("...ij,kj->...ki", rotation, corners) + states[..., None, 2:4]
    return np.concatenate([world, states[..., None, :2]], axis=-2)


class PushT:
    """One Push-T episode at a time; observations are rendered only when ``observe`` asks for them.

    ``step`` costs about 0.35 ms and ``observe`` with an image 1.8 ms, so a policy that looks at two of every
    eight steps runs several times faster than the gymnasium environment, which renders every step.
    """

    def __init__(self, *, max_steps=300, image_size=96):
        if max_steps < 1:
            raise ValueError(f"max_steps: got {max_steps}, allowed: >= 1")
        self.max_steps = max_steps
        self.image_size = image_size
        size = {"observation_width": image_size, "observation_height": image_size}
        self._env = push_t_environment()(obs_type="state", **size)
        self.steps = 0

    def reset(self, seed):
        """Start from gym-pusht's initial state for ``seed``."""
        self._env.reset(seed=int(seed))
        self._env._last_action = None  # gym-pusht keeps it, and draws it into the next episode's first frame
        self.steps = 0

    def reset_to(self, state):
        """Start at rest from ``state`` (5,) [agent x, y, block x, y, angle].

        gym-pusht sets the position before the angle and then runs a physics step, which moves the block because
        it turns about its centre of mass; recorded data need the angle first and no extra step.
        """
        state = np.asarray(state, dtype=np.float64)
        if state.shape != (5,) or not np.isfinite(state).all():
            raise ValueError(f"state: got shape {state.shape} {state}, allowed: 5 finite numbers")
        env = self._env
        env._setup()
        env._last_action = None
        env.agent.position = tuple(state[:2])
        env.block.angle = float(state[4])
        env.block.position = tuple(state[2:4])
        env.space.reindex_shapes_for_body(env.agent)
        env.space.reindex_shapes_for_body(env.block)
        self.steps = 0

    def step(self, action):
        """Move the agent's target to ``action`` (2,) px for one step.

        Returns (reward, done, info): reward = min(coverage / 0.95, 1); done on success or after ``max_steps``;
        info {"coverage", "success"}.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (2,) or not np.isfinite(action).all():
            raise ValueError(f"action: got shape {action.shape} {action}, allowed: 2 finite numbers in px")
        _, reward, success, _, info = self._env.step(np.clip(action, 0.0, WORLD_SIZE))
        self.steps += 1
        done = bool(success) or self.steps >= self.max_steps
        return float(reward), done, {"coverage": float(info["coverage"]), "success": bool(success)}

    @property
    def state(self):
        """State (5,) float64 [agent x, y, block x, y, angle in [0, 2 pi)]."""
        block, agent = self._env.block, self._env.agent
        return np.array([*agent.position, *block.position, block.angle % (2 * np.pi)])

    def observe(self):
        """{"image": (3, h, w) uint8, "agent_pos": (2,) float32 px} of the current state."""
        return {"image": self.image().transpose(2, 0, 1), "agent_pos": self.state[:2].astype(np.float32)}

    def image(self):
        """The policy's view (h, w, 3) uint8, as gym-pusht renders observations."""
        return self._env._render()

    def frame(self, size=256):
        """A larger picture (size, size, 3) uint8 for videos, with the target of the last action marked."""
        env = self._env
        return env._get_img(env._draw(), width=size, height=size, render_action=True)


def render_states(states, *, image_size=96):
    """Images (F, h, w, 3) uint8 of ``states`` (F, 5), without any physics."""
    env = PushT(image_size=image_size)
    images = np.empty((len(states), image_size, image_size, 3), np.uint8)
    for i, state in enumerate(states):
        env.reset_to(state)
        images[i] = env.image()
    return images
