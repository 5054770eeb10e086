"""Pictures of a run: losses and scores over the steps."""

import json
from fnmatch import filter as matching

GROUPS = (  # title, patterns of keys of metrics.jsonl, logarithmic axis
    ("loss", ("train_loss", "val_loss", "test_loss"), True),
    ("parts of the loss", ("train_diffusion", "train_decode_*"), True),
    ("score and success rate", ("score_mean", "success_rate"), False),
    ("expert in the loop, by round", ("round_score", "round_success"), False),
    ("accuracy", ("train_top1", "top1", "top5"), False),
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
    present = {key: None for line in lines for key in line}  # in order
    groups = []
    for title, patterns, logarithmic in GROUPS:
        keys = [key for pattern in patterns for key in matching(present, pattern)]
        if keys and not (title.startswith("parts") and len(keys) == 1):  # one part is the whole loss
            groups.append((title, keys, logarithmic))
    if not groups:
        return None
    figure = Figure(figsize=(4.6 * len(groups), 3.6), layout="constrained")
    for axes, (title, keys, logarithmic) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if key in line]
            axes.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 30 else None)
        if logarithmic:
            axes.set_yscale("log")
        if "score" in keys[0]:
            axes.set_ylim(0, 1)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=110)
    return path
