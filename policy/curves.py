"""Pictures of a run: losses and scores over the steps."""

import json

GROUPS = (  # title, keys of metrics.jsonl, logarithmic axis
    ("loss", ("train_loss", "val_loss"), True),
    ("score and success rate", ("score_mean", "success_rate"), False),
    ("keypoint error (px)", ("train_px", "val_px"), True),
    ("learning rate", ("lr",), False),
)


def read_metrics(run_dir):
    """Lines of metrics.jsonl as dictionaries."""
    with open(run_dir / "metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def plot_curves(run_dir):
    """Write curves.png of a run folder from its metrics.jsonl; returns the path, or None with nothing to draw."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    lines = read_metrics(run_dir)
    groups = [group for group in GROUPS if any(key in line for key in group[1] for line in lines)]
    if not groups:
        return None
    figure = Figure(figsize=(4.6 * len(groups), 3.6), layout="constrained")
    for axes, (title, keys, logarithmic) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 30 else None)
        if logarithmic:
            axes.set_yscale("log")
        if title.startswith("score"):
            axes.set_ylim(0, 1)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=110)
    return path
