"""Runs that differ in their seed only, and what they reached together, for ``python -m eval.report``."""

import json
import math
from dataclasses import dataclass

import numpy as np

from eval.report.kinds import Kind
from eval.report.runs import OF_ONE_RUN, Run
from eval.shared.intervals import rate_interval, seed_interval
from eval.shared.tables import NONE


@dataclass
class Group:
    """Runs of one configuration.

    number: from 1 on in its part; keys: those that tell it from the others; repeated: runs that have the seed of one of
    ``runs`` and do not count.
    """

    number: int
    keys: list[str]
    options: dict
    runs: list[Run]
    repeated: list[Run]

    @property
    def name(self):
        return ", ".join(f"{key.removesuffix('.name')}={shown(self.options, key)}" for key in self.keys) or "all runs"

    @property
    def label(self):
        return f"{self.number}: {self.name}"

    @property
    def best_run(self):
        """The run whose first number is best at the end, or the first run where none has it."""
        metric = self.runs[0].kind.metrics[0]
        sign = -1 if metric.smaller else 1
        return max(self.runs, key=lambda run: sign * run.last[metric.key] if metric.key in run.last else -math.inf)


@dataclass
class Part:
    """Groups of one kind and task; keys: those in which they differ."""

    kind: Kind
    task: str
    groups: list[Group]
    keys: list[str]


def group_runs(runs):
    """[Part], in the order of ``runs``."""
    parts = {}
    for run in runs:
        options = {k: v for k, v in run.options.items() if k not in OF_ONE_RUN and k.split(".")[0] not in OF_ONE_RUN}
        identity = json.dumps(options, sort_keys=True, default=str)
        groups = parts.setdefault((run.kind, run.task), {})
        groups.setdefault(identity, (options, []))[1].append(run)
    return [_part(*key, list(groups.values())) for key, groups in parts.items()]


def _part(kind, task, found):
    options = [options for options, _ in found]
    keys = differing_keys(options)
    names = naming_keys(options, keys)
    numbered = enumerate(found, start=1)
    return Part(kind, task, [Group(number, names, one, *_one_a_seed(runs)) for number, (one, runs) in numbered], keys)


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
        return NONE
    value = options[key]
    return value if isinstance(value, str) else json.dumps(value, default=str)


# Numbers -------------------------------------------------------------------------------------------------------------


def estimate(results, metric):
    """{"mean", "interval", "kind"} of a ``Metric`` over ``results``, dictionaries, one a seed; None without any.

    kind: "seeds", a t-interval over two or more seeds; "run", the interval of the one run itself; "none" where there is
    one run without an interval.
    """
    results = [result for result in results if result and result.get(metric.key) is not None]
    if not results:
        return None
    values = [result[metric.key] for result in results]
    if len(values) > 1:
        interval, kind = seed_interval(values, metric.limits), "seeds"
    else:
        interval = results[0].get(metric.interval)
        kind = "none" if interval is None else "run"
    return {"mean": float(np.mean(values)), "interval": interval, "kind": kind}


def pooled_success(results):
    """{"successes", "episodes", "rate", "interval"} over all their episodes, with a Wilson interval; or None."""
    episodes = [row for result in results for row in result.get("episodes") or ()]
    if not episodes:
        return None
    successes = sum(bool(row["success"]) for row in episodes)
    interval = rate_interval(successes, len(episodes))
    return {"successes": successes, "episodes": len(episodes), "rate": successes / len(episodes), "interval": interval}


def summarize_group(group):
    """All numbers of a group, as report.json has them."""
    kind, last = group.runs[0].kind, [run.last for run in group.runs]
    best = [run.best for run in group.runs] if kind.chosen else []
    return {
        "name": group.name,
        "seeds": [run.seed for run in group.runs],
        "evaluated": sum(kind.metrics[0].key in one for one in last),
        "last": {metric.key: estimate(last, metric) for metric in kind.metrics},
        "best": {metric.key: estimate(best, metric) for metric in kind.metrics},
        "pooled": pooled_success(last),
        "parameters": _mean([run.parameters for run in group.runs]),
        "steps": [run.steps for run in group.runs],
        "steps_per_second": _mean([one.get("steps_per_second") for one in last]),
        "minutes": _mean([run.minutes for run in group.runs]),
    }


def _mean(values):
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None
