"""Pictures of ``python -m eval.report``: scores and losses of groups of runs against training steps."""

import io
import math

import numpy as np
from matplotlib.figure import Figure  # no pyplot: nothing global, no display

from eval.report.groups import METRICS, estimate, seed_interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's palette
DASHES = ("-", "--", ":", "-.")  # one line shows under another; with the colours different for 28 groups
MARKERS = "osD^vPX"
SCORES = {"score_mean": "score", "success_rate": "success rate"}
LOSSES = {"train_loss": "training loss", "val_loss": "held-out loss", "val_px": "held-out keypoint error, px"}


def plot_scores(groups):
    """PNG of score and success against steps, or None without rollouts: mean, interval as a band, seeds thin."""
    panels = [(key, {"title": name, "ylim": (-0.02, 1.02)}) for key, name in SCORES.items()]
    return _picture(groups, panels, _draw_rollouts)


def plot_losses(groups):
    """PNG of the losses against steps, or None without any: geometric mean, its interval as a band, seeds thin."""
    panels = []
    for key, name in LOSSES.items():
        values = [value for group in groups for run in group.runs for value in points(run, key).values()]
        # Those of the losses: with two seeds a band can be far higher.
        limits = (min(values) / 1.2, max(values) * 1.2) if values else None
        panels.append((key, {"title": name, "yscale": "log", "ylim": limits}))
    return _picture(groups, panels, _draw_losses)


def points(run, key):
    """{step: value} of the lines of metrics.jsonl that have ``key``; of losses those that a logarithm can show."""
    values = {line["step"]: line[key] for line in run.lines if key in line}
    return {step: value for step, value in values.items() if key in SCORES or 0 < value < math.inf}


def _picture(groups, panels, draw):
    panels = [panel for panel in panels if any(points(run, panel[0]) for group in groups for run in group.runs)]
    if not panels:
        return None
    figure = Figure(figsize=(max(5.2 * len(panels), 7), 3.9 + 0.22 * len(groups)), layout="constrained")
    lines = {}
    for axes, (key, options) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, group in enumerate(groups):
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
            line = draw(axes, group, key, style, MARKERS[number % len(MARKERS)])
            lines |= {} if line is None else {number: line}
        axes.set(xlabel="step", **options)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    numbers = sorted(lines)
    names = [f"{groups[number].number}: {groups[number].name}" for number in numbers]
    figure.legend([lines[n] for n in numbers], names, loc="outside lower center", frameon=False, fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _draw_rollouts(axes, group, key, style, marker):
    """Mean, interval and seeds of a group's rollouts; of a single seed the intervals of its rollouts."""
    metric = next(name for name, (value, _) in METRICS.items() if value == key)
    seeds = [values for values in (points(run, key) for run in group.runs) if values]
    if len(seeds) == 1:
        rollouts = next(run.rollouts for run in group.runs if points(run, key))
        return _draw_mean(axes, {r["step"]: estimate([r], metric) for r in rollouts}, style, marker)
    _draw_seeds(axes, seeds, style)
    means = {
        step: estimate([{key: value} for value in values], metric) for step, values in _side_by_side(seeds).items()
    }
    return _draw_mean(axes, means, style, marker)


def _draw_losses(axes, group, key, style, _marker):
    """Geometric mean, interval (of the logarithm, which no axis cuts off) and seeds of a group's losses."""
    seeds = [values for values in (points(run, key) for run in group.runs) if values]
    _draw_seeds(axes, seeds, style)
    means = {}
    for step, values in _side_by_side(seeds).items():
        logarithms = np.log(values)
        interval = np.exp(seed_interval(logarithms)) if len(values) > 1 else None
        means[step] = {"mean": np.exp(logarithms.mean()), "interval": interval}
    return _draw_mean(axes, means, style, "." if len(means) == 1 else "")


def _side_by_side(seeds):
    """{step: [value of each seed]} of [{step: value}] where all have begun and none has ended.

    Seeds hold out other episodes, so that their epochs, and rollouts, end at other steps: between two of its steps a
    seed has what a straight line has.
    """
    if not seeds:
        return {}
    low, high = max(min(seed) for seed in seeds), min(max(seed) for seed in seeds)
    steps = sorted({min(max(step, low), high) for step in seeds[0]}) if low <= high else []
    return {step: [float(np.interp(step, *zip(*sorted(one.items()), strict=True))) for one in seeds] for step in steps}


def _draw_seeds(axes, seeds, style):
    for values in seeds:
        axes.plot(*zip(*sorted(values.items()), strict=True), **style, linewidth=0.8, alpha=0.45)


def _draw_mean(axes, estimates, style, marker):
    """The line of {step: {"mean", "interval" or None}} with its band; a single point has a bar instead."""
    if not estimates:
        return None
    means = {step: one["mean"] for step, one in estimates.items()}
    (line,) = axes.plot(list(means), list(means.values()), **style, linewidth=2, marker=marker, markersize=5)
    known = {step: one["interval"] for step, one in estimates.items() if one["interval"] is not None}
    if len(known) > 1:
        axes.fill_between(list(known), *zip(*known.values(), strict=True), color=style["color"], alpha=0.14, lw=0)
    elif known:
        ((step, (low, high)),) = known.items()
        axes.vlines(step, low, high, color=style["color"], linewidth=1.2)
    return line
