"""Simulated rollouts of a policy: score, success rate, 95 % intervals, per-episode rows and a video.

    python -m eval.rollout --checkpoint RUN_OR_CHECKPOINT --episodes 50 --seed 100000 --output DIR

Protocol of Diffusion Policy (arXiv 2303.04137): test seeds from 100000; an episode's score is its largest reward.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from envs import make_env
from eval.command import command
from eval.intervals import mean_interval, rate_interval
from eval.video import write_grid
from policy.checkpoint import load_policy

# Kernels round differently for different batch sizes, and for rows at the end of a batch, and contacts amplify that.
# Every policy call therefore has this many rows (free ones repeat another), and an episode always has the same one.
POLICY_BATCH = 25
NUM_ENVS = 50


class Episode:
    """One running episode: environment, the last To observations, and a noise generator of its own."""

    def __init__(self, env, seed, obs_steps, film):
        self.env, self.seed, self.obs_steps = env, seed, obs_steps
        self.generator = torch.Generator().manual_seed(seed)
        env.reset(seed)
        self.history = [env.observe()] * obs_steps
        self.rewards, self.success, self.done = [], False, False
        self.info = {}
        self.frames = [env.frame()] if film else None
        self.running = [0.0]

    def execute(self, actions):
        """Carry out ``actions`` (Ta, Da), observing only the steps that the next policy call sees."""
        for number, action in enumerate(actions):
            reward, self.done, self.info = self.env.step(action)
            self.rewards.append(reward)
            self.running.append(max(self.rewards))
            self.success |= self.info["success"]
            if self.frames is not None:
                self.frames.append(self.env.frame())
            if self.done:
                return
            if number >= len(actions) - self.obs_steps:
                self.history = [*self.history[1:], self.env.observe()]

    def row(self):
        """What summary.json tells of this episode."""
        return {
            "seed": self.seed,
            "score": max(self.rewards),
            "success": bool(self.success),
            "steps": len(self.rewards),
        }


def _act(policy, episodes, num_inference_steps):
    """Action chunks (Ta, Da) for each of ``episodes``, in calls of POLICY_BATCH rows; the seed decides on the row."""
    calls = []  # {row: episode}
    for episode in episodes:
        row = episode.seed % POLICY_BATCH
        free = next((call for call in calls if row not in call), None)
        if free is None:
            calls.append(free := {})
        free[row] = episode
    chunks = {}
    for call in calls:
        filler = next(iter(call.values()))
        rows = [call.get(row, filler) for row in range(POLICY_BATCH)]
        generators = [call[row].generator if row in call else torch.Generator() for row in range(POLICY_BATCH)]
        obs = {key: np.stack([np.stack([o[key] for o in e.history]) for e in rows]) for key in filler.history[0]}
        obs = {key: torch.from_numpy(value) for key, value in obs.items()}
        actions = policy.act(obs, generator=generators, num_inference_steps=num_inference_steps).cpu().numpy()
        chunks |= {episode.seed: actions[row] for row, episode in call.items()}
    return [chunks[episode.seed] for episode in episodes]


def rollout(policy, env_options, *, episodes, seed, num_envs=NUM_ENVS, videos=0, num_inference_steps=None):
    """Run ``episodes`` episodes with seeds from ``seed`` on, ``num_envs`` at a time; the result does not depend on it.

    env_options: {"name": ..., options} for ``envs.make_env``; videos: how many episodes are filmed.
    Returns (summary as in summary.json, filmed episodes for ``eval.video.write_grid``).
    """
    if episodes < 1 or num_envs < 1:
        raise ValueError(f"episodes, num_envs: got {episodes}, {num_envs}, allowed: both >= 1")
    waiting = list(range(seed, seed + episodes))
    idle = [make_env(**env_options) for _ in range(min(num_envs, episodes))]
    running, finished = [], []
    with tqdm(total=episodes, desc="rollouts", unit="episode", leave=False, dynamic_ncols=True) as bar:
        while waiting or running:
            while waiting and idle:
                number = waiting.pop(0)
                running.append(Episode(idle.pop(), number, policy.obs_steps, film=number - seed < videos))
            for episode, actions in zip(running, _act(policy, running, num_inference_steps), strict=True):
                episode.execute(actions)
            for episode in [e for e in running if e.done]:
                running.remove(episode)
                idle.append(episode.env)
                finished.append(episode)
                bar.update()
    finished.sort(key=lambda e: e.seed)
    return summarize([e.row() for e in finished]), [_film(e) for e in finished if e.frames]


def _film(episode):
    return {"frames": episode.frames, "score": episode.running, "seed": episode.seed, "success": episode.success}


def summarize(rows):
    """{"score_mean", "score_ci95", "success_rate", "success_ci95", "episodes"} of per-episode rows."""
    scores, successes = [row["score"] for row in rows], sum(row["success"] for row in rows)
    return {
        "score_mean": float(np.mean(scores)),
        "score_ci95": mean_interval(scores),
        "success_rate": successes / len(rows),
        "success_ci95": rate_interval(successes, len(rows)),
        "episodes": rows,
    }


def write_results(output, summary, films, name="rollout"):
    """Write summary.json and, when episodes were filmed, an mp4 into the folder ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "summary.json").write_text(json.dumps(summary, indent=1))
    if films:
        write_grid(output / f"{name}.mp4", films)


@command
def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m eval.rollout", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="run folder or .safetensors file")
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=100_000, help="first of consecutive test seeds")
    parser.add_argument("--num-envs", type=int, default=NUM_ENVS, help="environments at a time")
    parser.add_argument("--videos", type=int, default=9, help="episodes to film")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps, default as trained")
    parser.add_argument("--action-steps", type=int, default=None, help="executed steps of a chunk, default as trained")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=None, help="default: rollouts/NAME")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device: got {args.device!r}, but torch sees no CUDA device; allowed here: cpu")
    policy = load_policy(args.checkpoint, args.device)
    if args.action_steps is not None:
        policy.set_action_steps(args.action_steps)
    summary, films = rollout(
        policy,
        policy.config["task"]["env"],
        episodes=args.episodes,
        seed=args.seed,
        num_envs=args.num_envs,
        videos=args.videos,
        num_inference_steps=args.steps,
    )
    output = args.output or Path("rollouts") / Path(args.checkpoint).stem
    write_results(output, {"checkpoint": str(args.checkpoint), **summary}, films)
    print(describe(summary))
    print(f"wrote {output}/summary.json" + (f" and {output}/rollout.mp4" if films else ""))


def describe(summary):
    """One line with score and success rate and their intervals."""
    (low, high), (worst, best) = summary["score_ci95"], summary["success_ci95"]
    return (
        f"score {summary['score_mean']:.3f} [{low:.3f}, {high:.3f}], success {summary['success_rate']:.0%}"
        f" [{worst:.0%}, {best:.0%}] over {len(summary['episodes'])} episodes"
    )


if __name__ == "__main__":
    main()
