"""What a run logged, and its picture: losses, scores and the learning rate over steps and epochs."""

import json
from fnmatch import filter as matching

from policy.training.pictures import PALETTE, new_panels, save_png, set_scale

PANELS = (  # label of the axis, patterns of keys of metrics.jsonl, scale
    ("loss", ("train_loss", "val_loss", "test_loss"), "log"),
    ("parts of the loss, mean squared errors", ("train_diffusion", "train_decode_*"), "log"),
    ("score and success rate, 0 to 1", ("score_mean", "success_rate"), "share"),
    ("expert in the loop, by round, 0 to 1", ("round_score", "round_success"), "share"),
    ("accuracy, share of the samples", ("train_top1", "top1", "top5"), "share"),
    ("keypoint error, px", ("train_px", "val_px"), "log"),
    ("learning rate", ("lr",), "linear"),
)
NAMES = {"train_loss": "training", "val_loss": "held out (EMA)", "test_loss": "test (EMA)", "train_px": "training"}
NAMES |= {"val_px": "held out (EMA)", "score_mean": "score", "success_rate": "success rate", "lr": "learning rate"}
NAMES |= {"round_score": "score", "round_success": "success rate", "train_top1": "top-1, training"}
NAMES |= {"top1": "top-1, test", "top5": "top-5, test", "train_diffusion": "noise"}


def read_metrics(run_dir):
    """Lines of metrics.jsonl as dictionaries."""
    with open(run_dir / "metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def plot_curves(run_dir):
    """Write curves.png of a run folder from its metrics.jsonl; returns the path, or None with nothing to draw."""
    lines = read_metrics(run_dir)
    present = {key: None for line in lines for key in line}  # in order
    panels = []
    for label, patterns, scale in PANELS:
        keys = [key for pattern in patterns for key in matching(present, pattern)]
        if keys and keys != ["train_diffusion"]:  # one part is the whole loss
            panels.append((label, keys, scale))
    if not panels:
        return None
    figure, all_axes = new_panels(len(panels))
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw(axes, lines, *panel)
    return save_png(figure, run_dir / "curves.png")


def _draw(axes, lines, label, keys, scale):
    """One panel; all of them show the whole run."""
    for key, colour in zip(keys, PALETTE * len(keys), strict=False):
        points = [(line["step"], line[key]) for line in lines if key in line]
        name = NAMES.get(key, key.removeprefix("train_").replace("decode_", "decoded "))
        marker = "o" if len(points) < 30 else None
        axes.plot(*zip(*points, strict=True), label=name, color=colour, marker=marker, markersize=3.5, linewidth=1.5)
    last = lines[-1]
    axes.set(xlabel="step", ylabel=label, xlim=(0, 1.02 * last["step"]))
    axes.xaxis.get_major_locator().set_params(integer=True)
    set_scale(axes, scale)
    if last.get("epoch"):
        rate = last["step"] / last["epoch"]
        above = axes.secondary_xaxis("top", functions=(lambda step: step / rate, lambda epoch: epoch * rate))
        above.set_xlabel("epoch")
    axes.grid(alpha=0.3)
    if keys != ["lr"]:
        axes.legend(frameon=False, fontsize=9)
