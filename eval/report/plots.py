"""Pictures of ``python -m eval.report``: results and losses of groups of runs against training steps."""

import math

import numpy as np

from eval.report.groups import estimate
from eval.report.kinds import CURVES, Metric
from eval.shared.intervals import seed_interval
from eval.shared.plots import MARKERS, line_style
from policy.training.pictures import new_panels, png_of, set_scale


def plot_groups(groups):
    """PNG of all ``CURVES`` that the groups have, against steps, or None without any.

    Mean (of a loss the geometric one), interval as a band, every seed thin.
    """
    panels = [key for key in CURVES if any(points(run, key) for group in groups for run in group.runs)]
    if not panels:
        return None
    width = 7 if len(panels) == 1 else 4.6
    (figure, all_axes), lines = new_panels(len(panels), width=width, below=0.22 * len(groups) + 0.2), {}
    for axes, key in zip(all_axes, panels, strict=True):
        label, scale = CURVES[key]
        for number, group in enumerate(groups):
            line = _draw(axes, group, key, line_style(number), MARKERS[number % len(MARKERS)])
            lines |= {} if line is None else {number: line}
        axes.set(xlabel="step", ylabel=label)
        if scale == "log":  # as the seeds are: with two of them a band can be far higher
            values = [value for group in groups for run in group.runs for value in points(run, key).values()]
            axes.set(yscale="log", ylim=(min(values) / 1.2, max(values) * 1.2))
        set_scale(axes, scale)
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    names = [groups[number].label for number in sorted(lines)]
    figure.legend([lines[n] for n in sorted(lines)], names, loc="outside lower center", frameon=False, fontsize=9)
    return png_of(figure, dpi=110, colours=256)


def points(run, key):
    """{step: value} of the lines of metrics.jsonl that have ``key``; of losses those that a logarithm can show."""
    values = {line["step"]: line[key] for line in run.lines if line.get(key) is not None}
    share = CURVES[key][1] == "share"
    return dict(sorted((step, value) for step, value in values.items() if share or 0 < value < math.inf))


def _draw(axes, group, key, style, marker):
    """Mean, interval and seeds of a group; of a single seed the intervals that its results have themselves."""
    seeds = [values for values in (points(run, key) for run in group.runs) if values]
    metric = next((metric for metric in group.runs[0].kind.metrics if metric.key == key), Metric(key, key))
    if len(seeds) == 1:
        lines = next(run.lines for run in group.runs if points(run, key))
        means = {line["step"]: estimate([line], metric) for line in lines if line["step"] in seeds[0] and key in line}
    else:
        for values in seeds:
            axes.plot(list(values), list(values.values()), **style, linewidth=0.8, alpha=0.45)
        mean = _mean if CURVES[key][1] == "share" else _geometric_mean
        means = {step: mean(values, metric) for step, values in side_by_side(seeds).items()}
    return _draw_mean(axes, means, style, marker if len(means) < 30 else "")


def _mean(values, metric):
    return estimate([{metric.key: value} for value in values], metric)


def _geometric_mean(values, _):
    """As ``_mean``, of logarithms, so that no axis cuts the interval off."""
    logarithms = np.log(values)
    return {"mean": np.exp(logarithms.mean()), "interval": np.exp(seed_interval(logarithms))}


def side_by_side(seeds):
    """{step: [value of each seed]} of [{step: value}] where all have begun and none has ended.

    Seeds hold out other episodes, so that their epochs, and rollouts, end at other steps: between two of its steps a
    seed has what a straight line has.
    """
    if not seeds:
        return {}
    low, high = max(min(seed) for seed in seeds), min(max(seed) for seed in seeds)
    steps = sorted({min(max(step, low), high) for step in seeds[0]}) if low <= high else []
    return {step: [float(np.interp(step, list(one), list(one.values()))) for one in seeds] for step in steps}


def _draw_mean(axes, estimates, style, marker):
    """The line of {step: {"mean", "interval" or None}} with its band; a single point has a bar instead."""
    if not estimates:
        return None
    means = {step: one["mean"] for step, one in estimates.items()}
    (line,) = axes.plot(list(means), list(means.values()), **style, linewidth=1.8, marker=marker, markersize=4)
    known = {step: one["interval"] for step, one in estimates.items() if one["interval"] is not None}
    if len(known) > 1:
        axes.fill_between(list(known), *zip(*known.values(), strict=True), color=style["color"], alpha=0.14, lw=0)
    elif known:
        ((step, (low, high)),) = known.items()
        axes.vlines(step, low, high, color=style["color"], linewidth=1.2)
    return line
