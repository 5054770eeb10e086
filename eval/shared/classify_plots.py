"""Pictures of classification results: confusion matrix, examples, encoders beside each other."""

import numpy as np

MOST_NAMED = 24  # classes beyond which a matrix carries no names


def _figure(**options):
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    return Figure(layout="constrained", **options)


def plot_confusion(path, confusion, classes):
    """A PNG of ``confusion`` (K, K) counts, rows the true classes, coloured by their share of the row."""
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    named = len(classes) <= MOST_NAMED
    side = 2.5 + 0.45 * len(classes) if named else 8
    figure = _figure(figsize=(side + 1, side))
    axes = figure.subplots()
    image = axes.imshow(share, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true")
    if named:
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
        axes.set_yticks(range(len(classes)), classes)
        for row, column in np.argwhere(confusion > 0):
            colour = "white" if share[row, column] > 0.6 else "black"
            axes.text(column, row, confusion[row, column], ha="center", va="center", fontsize=7, color=colour)
    figure.savefig(path, dpi=110)


def plot_comparison(path, summaries):
    """A PNG with top-1 accuracy and its 95 % interval of each {name: summary}, and chance as a line."""
    names = list(summaries)
    top1 = np.array([summaries[name]["top1"] for name in names])
    bounds = np.array([summaries[name]["top1_ci95"] for name in names]).T
    figure = _figure(figsize=(7, 1.2 + 0.5 * len(names)))
    axes = figure.subplots()
    axes.barh(range(len(names)), top1, xerr=np.abs(bounds - top1), color="tab:blue", capsize=4)
    chance = summaries[names[0]]["chance"]
    axes.axvline(chance, color="gray", linestyle="--", label=f"chance {chance:.0%}")
    axes.set(xlim=(0, 1), xlabel="top-1 accuracy on held-out samples (95 % interval)")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def plot_examples(path, images, labels, predicted, classes):
    """A PNG of ``images`` (n, 3, h, w) in [-1, 1] with predicted and, where it differs, true class."""
    columns = min(len(images), 8)
    rows = -(-len(images) // columns)
    figure = _figure(figsize=(1.5 * columns, 1.75 * rows))
    for axes, *_ in (panels := figure.subplots(rows, columns, squeeze=False)).reshape(-1, 1):
        axes.axis("off")
    for axes, image, label, guess in zip(panels.flat, images, labels, predicted, strict=False):
        axes.imshow(np.clip((image.transpose(1, 2, 0) + 1) / 2, 0, 1))
        title = classes[guess] if guess == label else f"{classes[guess]}\n({classes[label]})"
        axes.set_title(title, fontsize=7, color="black" if guess == label else "tab:red")
    figure.savefig(path, dpi=110)
