"""Speed of rollouts beside the usual loop, one environment that draws at every step; python -m eval.speed rollout."""

import time

from envs import close_env, make_env
from eval.rollout.loop import rollout


class DrawEveryStep:
    """The environment of ``inner``, but drawn after every step, as gymnasium's and robosuite's own ones are."""

    def __init__(self, inner):
        self.env = make_env(**inner)
        self.seen = None

    def reset(self, seed):
        self.env.reset(seed)
        self.seen = self.env.observe()

    def step(self, action):
        result = self.env.step(action)
        self.seen = self.env.observe()
        return result

    def observe(self):
        return self.seen

    def frame(self, size=256):
        return self.env.frame(size)

    def close(self):
        close_env(self.env)


def measure_rollout(policy, env_options, *, episodes, seed, num_envs=50, workers=0, batch=25):
    """A dictionary for each of the two loops, as in rollout.json; both run the same episodes of ``policy``.

    Times are those of a whole ``rollout``: the start of environments and processes and the policy's calls included. One
    environment asks for one row a policy call, so that episodes may differ by what rounding makes of them.
    """
    drawn = {"name": f"{__name__}:{DrawEveryStep.__name__}", "inner": env_options}
    methods = {
        "one after another, drawn at every step": (drawn, {"num_envs": 1, "workers": 0, "batch": 1}),
        "side by side, drawn when the policy looks": (
            env_options,
            {"num_envs": num_envs, "workers": workers, "batch": batch},
        ),
    }
    rows = []
    for method, (environment, options) in methods.items():
        start = time.perf_counter()
        summary, _ = rollout(policy, environment, episodes=episodes, seed=seed, **options)
        seconds = time.perf_counter() - start
        steps = sum(row["steps"] for row in summary["episodes"])
        rate = {"steps": steps, "seconds": seconds, "steps_per_second": steps / seconds}
        rows.append({"method": method, **options, **rate, "success_rate": summary["success_rate"]})
    for row in rows:
        row["ratio"] = row["steps_per_second"] / rows[0]["steps_per_second"]
    return rows


def cells(rows):
    """Cells of the Markdown table, a row a loop."""
    lines = [["loop", "environments", "workers", "steps", "seconds", "steps/s", "success", "times faster"]]
    for row in rows:
        numbers = [str(row[key]) for key in ("num_envs", "workers", "steps")]
        speed = [f"{row['seconds']:.1f}", f"{row['steps_per_second']:.1f}"]
        lines.append([row["method"], *numbers, *speed, f"{row['success_rate']:.0%}", f"{row['ratio']:.2f}"])
    return lines
