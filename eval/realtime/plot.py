"""Picture of ``python -m eval.realtime``: the first seconds of an episode, and all latencies."""

import numpy as np

from policy.training.pictures import BLUE, GREY, RED, new_figure, save_png

SECONDS = 5.0


def plot(summary, traces, path):
    """Write a PNG: ticks, stalls and inference of the first episode of ``traces``; a histogram of latencies."""
    figure = new_figure(13, 3.8)
    rate = summary["control"]["rate"]
    figure.suptitle(
        f"{summary['mode']}, {rate:g} Hz, {summary['sampler']} in {summary['steps']} steps, {summary['precision']},"
        f" warm start {summary['warm_start'] or 'none'}; {summary['machine']['name']}",
        fontsize=11,
    )
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    _draw_time_line(left, traces[0], rate)
    _draw_latency(right, traces, rate)
    save_png(figure, path)


def _draw_time_line(axes, trace, rate):
    ticks, spans = np.array(trace["ticks"]), np.array(trace["spans"])
    end = min(SECONDS, ticks[-1] + 1 / rate)
    held = np.isin(np.arange(len(ticks)), trace["holds"])
    axes.eventplot([ticks[~held], ticks[held]], lineoffsets=[2, 1], linelengths=0.6, colors=[BLUE, RED])
    axes.broken_barh(list(zip(spans[:, 0], np.diff(spans)[:, 0], strict=True)), (-0.3, 0.6), color=GREY, edgecolor="k")
    axes.set_yticks([2, 1, 0], ["action", "stall", "inference"])
    axes.set(title=f"seed {trace['seed']}: ticks and inference", xlabel="s since the first tick", ylim=(-0.6, 2.6))
    axes.set_xlim(min(spans[0, 0], 0) - 0.02 * end, end)
    axes.grid(alpha=0.3, axis="x")


def _draw_latency(axes, traces, rate):
    latency = [(end - start) * 1e3 for trace in traces for start, end in trace["spans"]]
    axes.hist(latency, bins=30, color=GREY)
    axes.axvline(1e3 / rate, color=RED, linestyle="--", label="a period")
    axes.set(title="latency of inference", xlabel="ms", ylabel="number of calls")
    axes.set_xlim(left=0)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
