"""One episode of an environment as a policy lives it: chunks of actions in, the last observations out."""

from typing import NamedTuple

import numpy as np


class Report(NamedTuple):
    """Where an episode stands: what the policy sees next or, when it is over, its row, its film and its states."""

    observation: dict | None  # {key: (To, ...)}
    row: dict | None = None  # what summary.json tells of it
    film: dict | None = None  # an episode for ``eval.rollout.video.write_grid``
    states: np.ndarray | None = None  # (steps + 1, S) float64 from the start to the end, for ``env.reset_to``


class Episode:
    """A running episode: environment, the last To observations of ``keys``, rewards, and what is to be recorded.

    film: keep the frames; states: keep the states, for which the environment needs a property ``state``.
    """

    def __init__(self, env, seed, *, obs_steps, keys, film=False, states=False):
        self.env, self.seed, self.obs_steps, self.keys = env, seed, obs_steps, list(keys)
        env.reset(seed)
        if states and not hasattr(env, "state"):
            raise ValueError(f"states: got {type(env).__name__}, allowed: an environment with a property state")
        self.history = [self._observe()] * obs_steps
        self.rewards, self.success, self.done = [], False, False
        self.frames = [env.frame()] if film else None
        self.states = [np.array(env.state, np.float64)] if states else None
        self.running = [0.0]

    def _observe(self):
        obs = self.env.observe()
        missing = [key for key in self.keys if key not in obs]
        if missing:
            raise ValueError(f"task.shape_meta.obs: got {', '.join(missing)}, allowed here: {', '.join(sorted(obs))}")
        return {key: obs[key] for key in self.keys}

    def execute(self, actions):
        """Carry out ``actions`` (Ta, Da), observing only the steps that the next policy call sees."""
        for number, action in enumerate(actions):
            reward, self.done, info = self.env.step(action)
            self.rewards.append(reward)
            self.running.append(max(self.rewards))
            self.success |= info["success"]
            if self.frames is not None:
                self.frames.append(self.env.frame())
            if self.states is not None:
                self.states.append(np.array(self.env.state, np.float64))
            if self.done:
                return
            if number >= len(actions) - self.obs_steps:
                self.history = [*self.history[1:], self._observe()]

    def report(self):
        """The ``Report`` of this moment."""
        if not self.done:
            return Report({key: np.stack([obs[key] for obs in self.history]) for key in self.keys})
        success = bool(self.success)
        row = {"seed": self.seed, "score": max(self.rewards), "success": success, "steps": len(self.rewards)}
        film = {"frames": self.frames, "score": self.running, "seed": self.seed, "success": success}
        return Report(None, row, film if self.frames else None, np.stack(self.states) if self.states else None)
