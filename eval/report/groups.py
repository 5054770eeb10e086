"""Runs that differ in their seed only, and what they reached together, for ``python -m eval.report``."""

import json
import math
from dataclasses import dataclass

import numpy as np

from eval.report.runs import SEEDS, Run
from eval.shared.intervals import rate_interval

METRICS = {"score": ("score_mean", "score_ci95"), "success": ("success_rate", "success_ci95")}


@dataclass
class Group:
    """Runs of one configuration.

    number: from 1 on in its task; keys: those that tell it from the others; repeated: runs that have the seed of one of
    ``runs`` and do not count.
    """

    number: int
    keys: list[str]
    options: dict
    runs: list[Run]
    repeated: list[Run]

    @property
    def name(self):
        return ", ".join(f"{key}={shown(self.options, key)}" for key in self.keys) or "all runs"

    @property
    def best_run(self):
        """The run whose last rollout scored best, or the first one without rollouts."""
        return max(self.runs, key=lambda run: run.last["score_mean"] if run.last else -math.inf)


def group_runs(runs):
    """({task: [Group]}, {task: keys in which they differ}), in the order of ``runs``."""
    tasks, keys = {}, {}
    for run in runs:
        options = {key: value for key, value in run.options.items() if key not in SEEDS}
        identity = json.dumps(options, sort_keys=True, default=str)
        tasks.setdefault(run.task, {}).setdefault(identity, (options, []))[1].append(run)
    for task, groups in tasks.items():
        options = [options for options, _ in groups.values()]
        keys[task] = differing_keys(options)
        names = naming_keys(options, keys[task])
        numbered = enumerate(groups.values(), start=1)
        tasks[task] = [Group(number, names, options, *_one_a_seed(members)) for number, (options, members) in numbered]
    return tasks, keys


def _one_a_seed(runs):
    """(runs of different seeds, the others): of several with one seed the one with most steps counts, then the last."""
    counted = {}
    for run in sorted(runs, key=lambda run: run.steps or 0):
        counted[run.seed] = run
    return [run for run in runs if counted[run.seed] is run], [run for run in runs if counted[run.seed] is not run]


def differing_keys(options):
    """Keys of dictionaries whose values are not the same in all of them, in their order."""
    keys = dict.fromkeys(key for one in options for key in one)
    return [key for key in keys if len({shown(one, key) for one in options}) > 1]


def naming_keys(options, keys):
    """Those of ``keys`` that tell all of ``options`` apart; the preset and the names of parts come first.

    A preset changes twenty keys at once: a key is left out where those before it tell as much.
    """
    ranked = sorted(keys, key=lambda key: (key != "preset", not key.endswith(".name")))
    names, chosen = [()] * len(options), []
    for key in ranked:
        longer = [(*name, shown(one, key)) for name, one in zip(names, options, strict=True)]
        if len(set(longer)) > len(set(names)):
            names = longer
            chosen.append(key)
    return chosen


def shown(options, key):
    """The value of ``key`` as text, – where there is none."""
    if key not in options:
        return "–"
    value = options[key]
    return value if isinstance(value, str) else json.dumps(value, default=str)


# Numbers -------------------------------------------------------------------------------------------------------------


def t_quantile(degrees):
    """97.5 % quantile of Student's t with a whole number of ``degrees`` of freedom >= 1.

    By bisection of the finite sums for P(|T| < t): Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom: got {degrees}, allowed: >= 1")

    def inside(angle):  # t = sqrt(degrees) tan(angle)
        term, total = (math.cos(angle) if degrees % 2 else 1.0), 0.0
        for k in range(2 + degrees % 2, degrees + 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (k - 1) / k
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if degrees % 2 else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def seed_interval(values):
    """95 % t-interval (low, high) of the mean of ``values``, one a seed, two or more."""
    half = t_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return [float(np.mean(values)) - half, float(np.mean(values)) + half]


def estimate(rollouts, metric):
    """{"mean", "interval", "kind"} of "score" or "success" over ``rollouts``, one a seed; None without any.

    kind: "seeds", a t-interval over two or more seeds, that of success cut to [0, 1]; "episodes", the interval of the
    rollout itself, where there is one seed; "none" where its summary.json is gone.
    """
    key, interval_key = METRICS[metric]
    if not rollouts:
        return None
    values = [rollout[key] for rollout in rollouts]
    if len(values) > 1:
        low, high = seed_interval(values)
        interval, kind = ([max(low, 0.0), min(high, 1.0)] if metric == "success" else [low, high]), "seeds"
    else:
        interval = rollouts[0].get(interval_key)
        kind = "none" if interval is None else "episodes"
    return {"mean": float(np.mean(values)), "interval": interval, "kind": kind}


def pooled_success(rollouts):
    """{"successes", "episodes", "rate", "interval"} over all their episodes, with a Wilson interval; or None."""
    episodes = [row for rollout in rollouts for row in rollout.get("episodes", ())]
    if not episodes:
        return None
    successes = sum(bool(row["success"]) for row in episodes)
    interval = rate_interval(successes, len(episodes))
    return {"successes": successes, "episodes": len(episodes), "rate": successes / len(episodes), "interval": interval}


def summarize_group(group):
    """All numbers of a group, as report.json has them."""
    last, best = ([r for r in (getattr(run, which) for run in group.runs) if r] for which in ("last", "best"))
    rates, minutes = ([getattr(run, key) for run in group.runs] for key in ("steps_per_second", "minutes"))
    return {
        "name": group.name,
        "seeds": [run.seed for run in group.runs],
        "rolled_out": len(last),
        "last": {metric: estimate(last, metric) for metric in METRICS},
        "best": {metric: estimate(best, metric) for metric in METRICS},
        "pooled": pooled_success(last),
        "steps": [run.steps for run in group.runs],
        "steps_per_second": _mean(rates),
        "minutes": _mean(minutes),
    }


def _mean(values):
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None
