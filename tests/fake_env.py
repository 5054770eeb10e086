"""A light environment that worker processes can import too, with the troubles that real simulators have."""

import os
import signal
import time
from pathlib import Path

import numpy as np

MADE = []  # environments of this process


class SimulatorError(Exception):
    """Cannot be unpickled: it needs two arguments."""

    def __init__(self, part, number):
        super().__init__(f"{part} {number}")


class FakeEnv:
    """Chaotic in its actions, so that one different bit shows; observations tell (seed, step). Lengths vary by seed.

    log: a file that hears of what happens, one line an event: process, event, seed. trouble: {"kind": "die" | "hang" |
    "exit" | "raise" | "strange", "seed", "step"} happens ``times`` times, over all processes with the same log.
    """

    def __init__(self, *, length=None, images=False, log=None, trouble=None, times=1, pause=0.0):
        self.length, self.images, self.pause = length, images, pause
        self.log_file, self.trouble, self.times = log, trouble, times
        self.observed, self.framed, self.seeds, self.actions = [], 0, [], []
        self.seed = None
        MADE.append(self)
        self.log(f"made with {os.environ.get('OMP_NUM_THREADS')} threads")

    def log(self, event):
        if self.log_file:
            with open(self.log_file, "a") as file:
                file.write(f"{os.getpid()} {event} {self.seed}\n")

    def reset(self, seed):
        self.seed, self.steps = seed, 0
        self.end = self.length or 3 + 7 * seed % 11
        self.x = np.random.default_rng(seed).uniform(0.2, 0.8, 2)
        self.seeds.append(seed)
        self.actions.append([])
        self.log("reset")

    def observe(self):
        self.observed.append((self.seed, self.steps))
        obs = {"agent_pos": np.array([self.seed % 1000, self.steps], np.float32), "unseen": np.zeros(3)}
        if self.images:  # pixel by pixel in memory, like a simulator's
            image = np.random.default_rng([self.seed, self.steps]).integers(0, 256, (12, 12, 3), dtype=np.uint8)
            obs["image"] = image.transpose(2, 0, 1)
        return obs

    def step(self, action):
        assert action.shape == (2,) and np.isfinite(action).all()
        self.actions[-1].append(np.array(action))
        self.steps += 1
        self.x = (3.99 * self.x * (1 - self.x) + 0.1 * np.asarray(action, np.float64)) % 1.0
        if self.trouble and (self.seed, self.steps) == (self.trouble["seed"], self.trouble["step"]):
            self.make_trouble(self.trouble["kind"])
        time.sleep(self.pause)
        return float(self.x[0]), self.steps >= self.end, {"success": self.steps == 2 and self.seed % 3 == 0}

    def make_trouble(self, kind):
        if self.log_file:
            if Path(self.log_file).read_text().count(f" {kind} ") == self.times:
                return
            self.log(kind)
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "hang":
            time.sleep(1000)
        elif kind == "exit":
            os._exit(7)
        elif kind == "raise":
            raise ValueError(f"action: got seed {self.seed}, allowed: others")
        elif kind == "strange":
            raise SimulatorError("joint", 5)

    def frame(self, size=32):
        self.framed += 1
        return np.full((size, size, 3), 20 * self.steps % 256, np.uint8)

    def close(self):
        self.log("close")


class StatefulEnv(FakeEnv):
    """``FakeEnv`` whose state is seed, step and x, in one array that it writes over."""

    def reset(self, seed):
        super().reset(seed)
        self.memory = np.array([seed, 0, *self.x])

    def step(self, action):
        result = super().step(action)
        self.memory[1:] = self.steps, *self.x
        return result

    @property
    def state(self):
        return self.memory
