"""When things happened in real-time control: ticks, latency, stalls, chunks."""

import numpy as np

LATE = 0.1  # share of a period


def timing(traces, rate):
    """What summary.json tells of the ``traces`` of episodes at ``rate`` Hz: ticks, latency, stalls, chunks.

    The rate held is that of the ticks within an episode; a tick is late by the time from its deadline to its start.
    """
    late = np.concatenate([np.subtract(trace["ticks"], np.arange(len(trace["ticks"])) / rate) for trace in traces])
    lasted = sum(trace["ticks"][-1] - trace["ticks"][0] for trace in traces)
    latency = np.array([end - start for trace in traces for start, end in trace["spans"]]) * 1e3
    replaced = [count for trace in traces for count in trace["executed"][:-1]]  # the last ones were cut by the end
    return {
        "control": {
            "rate": rate,
            "rate_held": (len(late) - len(traces)) / lasted if lasted > 0 else None,
            "ticks": len(late),
            "late_share": float(np.mean(late > LATE / rate)),
            "worst_late_ms": float(late.max() * 1e3),
        },
        "latency_ms": {
            "median": float(np.median(latency)),
            "p95": float(np.quantile(latency, 0.95)),
            "max": float(latency.max()),
            "calls": len(latency),
        },
        "stalls_per_episode": sum(len(trace["holds"]) for trace in traces) / len(traces),
        "too_late": sum(trace["too_late"] for trace in traces),
        "executed_steps": {"mean": float(np.mean(replaced)), "min": min(replaced), "max": max(replaced)}
        if replaced
        else None,
    }


def report_timing(summary):
    """The lines that tell ``timing``."""
    control, latency, executed = summary["control"], summary["latency_ms"], summary["executed_steps"]
    held = "unknown" if control["rate_held"] is None else f"{control['rate_held']:.3f}"
    steps = "no chunk replaced"
    if executed:
        steps = f"{executed['mean']:.1f} steps of a chunk executed ({executed['min']} to {executed['max']})"
    return [
        f"control: {control['rate']:g} Hz asked, {held} held; {control['late_share']:.1%} of {control['ticks']} ticks"
        f" late by more than {LATE:.0%} of a period, worst {control['worst_late_ms']:.1f} ms",
        f"inference: {latency['median']:.0f} ms median, {latency['p95']:.0f} 95 %, {latency['max']:.0f} max"
        f" of {latency['calls']} calls",
        f"stalls: {summary['stalls_per_episode']:.1f} steps an episode; {steps};"
        f" {summary['too_late']} chunks came too late",
    ]
