"""Simulated rollouts of a policy: the loop, its summary, its files.

Protocol of Diffusion Policy (arXiv 2303.04137): test seeds from 100000; an episode's score is its largest reward.
"""

import json
import sys

import numpy as np
import torch
from tqdm import tqdm

from envs.shared.workers import open_slots
from eval.rollout.video import write_grid
from eval.shared.intervals import mean_interval, rate_interval
from policy.files import whole, write_whole
from policy.registry import at_least, within

MOST_AT_ONCE = 10_000  # environments, processes and rows that a checkpoint may ask for


class Running:
    """A running episode as the policy needs it: what it sees, and a noise generator of its own."""

    def __init__(self, seed):
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.observation = None  # {key: (To, ...)}


def stack(values):
    """Tensor (B, To, ...) of B arrays (To, ...), the channels of an image's pixel side by side in memory.

    Simulators draw them so, but a pipe between processes does not keep the order, on which rounding depends.
    """
    stacked = np.stack(values)
    if stacked.ndim == 5:  # (B, To, C, h, w)
        stacked = np.ascontiguousarray(stacked.transpose(0, 1, 3, 4, 2)).transpose(0, 1, 4, 2, 3)
    return torch.from_numpy(stacked)


def _act_together(policy, episodes, batch, num_inference_steps):
    """Action chunks (Ta, Da) for each of ``episodes``, in calls of ``batch`` rows; the seed decides on the row."""
    calls = []  # {row: episode}
    for episode in episodes:
        row = episode.seed % batch
        free = next((call for call in calls if row not in call), None)
        if free is None:
            calls.append(free := {})
        free[row] = episode
    chunks = {}
    for call in calls:
        filler = next(iter(call.values()))
        rows = [call.get(row, filler).observation for row in range(batch)]
        generators = [call[row].generator if row in call else torch.Generator() for row in range(batch)]
        obs = {key: stack([row[key] for row in rows]) for key in filler.observation}
        actions = policy.act(obs, generator=generators, num_inference_steps=num_inference_steps).cpu().numpy()
        chunks |= {episode.seed: actions[row] for row, episode in call.items()}
    return [chunks[episode.seed] for episode in episodes]


def rollout(
    policy,
    env_options,
    *,
    episodes,
    seed,
    num_envs=50,
    workers=0,
    videos=0,
    num_inference_steps=None,
    batch=25,
    states=False,
):
    """Run ``episodes`` episodes with seeds from ``seed`` on, ``num_envs`` at a time, in ``workers`` processes.

    The result depends on neither number, nor on workers that die. It does on ``batch``, the rows of a policy call:
    kernels round differently for different batch sizes, and for rows at the end of a batch, and contacts amplify that.
    Every call therefore has as many rows (free ones repeat another), and an episode always has the same one.
    env_options: {"name": ..., options} for ``envs.make_env``; videos: how many episodes are filmed.
    Returns (summary as in summary.json, filmed episodes for ``video.write_grid``) and, with ``states``, a third
    value: a row per episode as in the summary, with its visited "states" (steps + 1, S) float64. Raises ValueError for
    states of an environment that has none.
    """
    if min(episodes, num_envs, batch) < 1:
        raise ValueError(f"episodes, num_envs, batch: got {episodes}, {num_envs}, {batch}, allowed: all >= 1")
    waiting, idle = list(range(seed, seed + episodes)), list(range(min(num_envs, episodes)))
    running, finished = {}, []  # {slot: Running}; reports
    slots = open_slots(
        env_options, slots=len(idle), workers=workers, obs_steps=policy.obs_steps, keys=policy.encoder.shapes
    )
    with slots, tqdm(total=episodes, desc="rollouts", unit="episode", leave=False, dynamic_ncols=True) as bar:
        while waiting or running:
            chunks = _act_together(policy, running.values(), batch, num_inference_steps)
            commands = {slot: ("execute", chunk) for slot, chunk in zip(running, chunks, strict=True)}
            while waiting and idle:  # in the same round, so that a slow reset holds nobody up
                slot, number = idle.pop(), waiting.pop(0)
                running[slot] = Running(number)
                commands[slot] = ("reset", number, number - seed < videos, states)
            for slot, report in slots.run(commands).items():
                if report is None:  # its worker died: the episode starts again, with its noise
                    waiting.insert(0, running.pop(slot).seed)
                    idle.append(slot)
                elif report.row is None:
                    running[slot].observation = report.observation
                else:
                    finished.append(report)
                    del running[slot]
                    idle.append(slot)
                    bar.update()
    finished.sort(key=lambda report: report.row["seed"])
    results = summarize([report.row for report in finished]), [report.film for report in finished if report.film]
    return (*results, [{**report.row, "states": report.states} for report in finished]) if states else results


def check_rollout(options):
    """Raise ValueError for options of ``rollout`` that cannot be meant; 0 episodes are none at all."""
    at_least(0, **{f"rollout.{key}": options[key] for key in ("episodes", "seed", "workers", "videos")})
    at_least(1, **{f"rollout.{key}": options[key] for key in ("num_envs", "batch")})


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
    """Write summary.json and, when episodes were filmed, an mp4 into the folder ``output``; returns their paths.

    A film that fails is a warning: it would cost the score that took longer.
    """
    output.mkdir(parents=True, exist_ok=True)
    written = [output / "summary.json"]
    write_whole(written[0], json.dumps(summary, indent=1))
    if films:
        try:
            with whole(output / f"{name}.mp4") as place:
                write_grid(place, films)
            written.append(output / f"{name}.mp4")
        except Exception as error:  # whatever the encoder of films runs into
            print(f"warning: film: not written to {output} ({type(error).__name__}: {error})", file=sys.stderr)
    return written


def loop_options(policy, **given):
    """Options of ``rollout``: those ``given`` that are not None, then those that the policy's own rollouts had.

    Raises ValueError for numbers that cannot be meant.
    """
    trained = policy.config.get("rollout", {})
    options = {key: trained[key] for key in given if key in trained}
    options |= {key: value for key, value in given.items() if value is not None}
    for key, value in options.items():
        within(0 if key == "workers" else 1, MOST_AT_ONCE, **{key: value})
    return options


def describe(summary):
    """One line with score and success rate and their intervals."""
    (low, high), (worst, best) = summary["score_ci95"], summary["success_ci95"]
    return (
        f"score {summary['score_mean']:.3f} [{low:.3f}, {high:.3f}], success {summary['success_rate']:.0%}"
        f" [{worst:.0%}, {best:.0%}] over {len(summary['episodes'])} episodes"
    )
