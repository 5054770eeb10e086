"""Pictures of classification results: confusion matrix, examples, encoders beside each other."""

import numpy as np

from policy.training.pictures import BLACK, BLUE, GREY, RED, new_figure, picture_rows, save_png

MOST_NAMED = 40  # classes beyond which a matrix carries no names
LONGEST = 40  # characters of a name that are shown
ACROSS = 8  # examples in a row


def plot_confusion(path, confusion, classes):
    """A PNG of ``confusion`` (K, K) counts, rows the true classes, coloured by their share of the row."""
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    named = len(classes) <= MOST_NAMED
    classes = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in classes]
    side = 2 + 0.42 * len(classes) if named else 7
    margin = 0.085 * max(map(len, classes)) if named else 0.5  # of the names, which stand on two sides
    figure = new_figure(max(side + margin + 1.2, 4.5), max(side + 0.75 * margin, 3))
    axes = figure.subplots()
    image = axes.imshow(share, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(image, label="share of the true class", fraction=0.046, pad=0.02)
    right = share.diagonal()[confusion.sum(axis=1) > 0].mean()
    figure.suptitle(f"{confusion.sum():,} test samples\non average {right:.1%} of a class are right", fontsize=10)
    axes.set(xlabel="predicted class", ylabel="true class")
    if named:
        axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(classes)), classes)
        for row, column in np.argwhere(confusion > 0):
            colour = "white" if share[row, column] > 0.6 else BLACK
            axes.text(column, row, confusion[row, column], ha="center", va="center", fontsize=7, color=colour)
    save_png(figure, path)


def plot_comparison(path, summaries):
    """A PNG with top-1 accuracy and its 95 % interval of each {name: summary}, and chance as a line."""
    names = list(summaries)
    top1 = np.array([summaries[name]["top1"] for name in names])
    bounds = np.array([summaries[name]["top1_ci95"] for name in names]).T
    figure = new_figure(7, 1.3 + 0.4 * len(names))
    axes = figure.subplots()
    chance = summaries[names[0]]["chance"]
    axes.axvline(chance, color=GREY, linestyle="--", label=f"chance, {chance:.0%}")
    axes.errorbar(top1, range(len(names)), xerr=np.abs(bounds - top1), color=BLUE, fmt="o", capsize=4)
    for place, (value, high) in enumerate(zip(top1, bounds[1], strict=True)):
        axes.annotate(f"{value:.1%}", (high, place), (6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set(xlim=(0, 1.18), xticks=np.arange(0, 1.1, 0.2), ylim=(len(names) - 0.4, -0.6))
    axes.set_xlabel("top-1 accuracy on held-out samples, 95 % interval")
    ends = [name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}" for name in names]  # of paths
    axes.set_yticks(range(len(names)), ends)
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside upper right", frameon=False, fontsize=9)
    save_png(figure, path)


def plot_examples(path, images, labels, predicted, classes):
    """A PNG of ``images`` (n, 3, h, w) in [-1, 1] with predicted and, where it differs, true class."""
    pixels = np.clip((images.transpose(0, 2, 3, 1) + 1) * 127.5, 0, 255).round().astype(np.uint8)
    rows = []
    for start in range(0, len(pixels), ACROSS):
        pairs = list(zip(labels[start : start + ACROSS], predicted[start : start + ACROSS], strict=True))
        line = "\n" if any(label != guess for label, guess in pairs) else ""  # below the others, where one is wrong
        titles = [
            (f"{classes[guess]}{line}", BLACK) if label == guess else (f"{classes[guess]}\nnot {classes[label]}", RED)
            for label, guess in pairs
        ]
        rows.append(("", list(pixels[start : start + ACROSS]), titles))
    right = int((np.asarray(labels) == np.asarray(predicted)).sum())
    caption = f"What the model says of {len(pixels)} test samples: {right} are right; orange is wrong, the truth below."
    save_png(picture_rows(rows, caption=caption), path)
