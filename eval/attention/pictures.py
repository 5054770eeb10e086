"""Pictures of attention patterns and weights, for ``python -m eval.attention_map``."""

import math

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.patches import Rectangle
from PIL import Image

from policy.training.pictures import BLUE, RED, new_figure, picture_rows, save_png

MAX_ROWS, MAX_HEADS = 6, 4  # layers, and heads with weights, that a picture shows
BITMAP = 230  # px, largest side of a pattern
MATRIX = 420  # px, the same for the matrices of all heads together
PAPER_COLOUR = "#F3F3F3"
CLASS_COLOUR = RED
UNSEEN_COLOUR = "#F2D7D5"
BLIND_COLOUR = "#BFC5CC"


# Pattern -------------------------------------------------------------------------------------------------------------


def plot_pattern(patterns, prefix_tokens, path):
    """Write the patterns [bool (H, P+N, P+N)] of some layers: a row a layer, a column a head.

    A head has the same colour in every layer, so that the shuffle of the heads shows.
    """
    tokens, rows = patterns[0].shape[-1], []
    step = math.ceil(tokens / BITMAP)
    border, colours = math.ceil(prefix_tokens / step), head_colours(patterns)
    for layer in _spread_over(len(patterns), MAX_ROWS):
        pictures, titles = [], []
        for head, (pattern, colour) in enumerate(zip(patterns[layer], colours[layer], strict=True), start=1):
            dots = _blocks(pattern.numpy(), step).any(axis=(1, 3))  # no thin line is lost
            picture = np.where(dots[..., None], to_rgb(colour), to_rgb(PAPER_COLOUR))
            picture[:border] = picture[:, :border] = to_rgb(CLASS_COLOUR)
            pictures.append((picture * 255).round().astype(np.uint8))
            patches = pattern[prefix_tokens:, prefix_tokens:]
            titles.append(f"head {head} · {'all pairs' if patches.all() else f'{diagonals(patches)} diagonals'}")
        rows.append((f"layer {layer}", pictures, titles))
    shrunk = f" A dot is {step} x {step} pairs." if step > 1 else ""
    caption = f"Pairs of {tokens - prefix_tokens} patches that each head attends to. Row: query, column: key, orange: "
    caption += f"class token. Heads of one colour attend to the same diagonals, yellow to the most pairs.{shrunk}"
    save_png(picture_rows(rows, caption=caption, side=BITMAP), path)


def diagonals(pattern):
    """Number of diagonals, on both sides of the main one, in the pattern (N, N) of a Fibottention head."""
    return int(pattern[0].sum() + pattern[1:, 0].sum())


def head_colours(patterns):
    """For every layer the colours of its heads: heads of equal pattern share one, yellow is the densest."""
    keys = [[np.packbits(pattern.numpy()).tobytes() for pattern in layer] for layer in patterns]
    pairs = {
        key: pattern.sum().item()
        for row, layer in zip(keys, patterns, strict=True)
        for key, pattern in zip(row, layer, strict=True)
    }
    known = sorted(pairs, key=pairs.get)
    colours = dict(zip(known, colormaps["viridis"](np.linspace(0.0, 0.88, len(known))), strict=True))
    return [[colours[key] for key in row] for row in keys]


def _blocks(matrix, step):
    """(N, N) -> (rows, step, columns, step), with the last row and column repeated where ``step`` does not divide N."""
    lacking = -len(matrix) % step
    matrix = np.pad(matrix, [(0, lacking), (0, lacking)], mode="edge")
    side = len(matrix) // step
    return matrix.reshape(side, step, side, step)


def _spread_over(count, most):
    """At most ``most`` of ``count`` numbers, evenly, with the first and the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


# Coverage ------------------------------------------------------------------------------------------------------------


def reach(patterns, prefix_tokens):
    """After how many layers each patch depends on each other one, (N, N): 1, 2, ... or 0 for not after the last.

    Some head of every layer must see the next link of the chain; a patch keeps itself, through the residual
    connection. Without the class token, through which two layers join everything.
    """
    links = [layer.any(dim=0)[prefix_tokens:, prefix_tokens:] for layer in patterns]
    reached = torch.eye(len(links[0]), dtype=torch.bool)
    layers = torch.where(reached, 1, 0)
    for number, link in enumerate(links, start=1):
        reached = reached | (link.float() @ reached.float() > 0)
        layers[reached & (layers == 0)] = number
    return layers


def plot_coverage(patterns, prefix_tokens, path):
    """Write what all heads together see: heads a pair, density a head, and the layers that join two patches."""
    first = patterns[0][:, prefix_tokens:, prefix_tokens:]
    figure = new_figure(13, 10.6)
    (seen_axes, density_axes), (reach_axes, curve_axes) = figure.subplots(2, 2)

    step = math.ceil(first.shape[-1] / MATRIX)
    shrunk = f" (a dot: {step} x {step} pairs)" if step > 1 else ""
    seen = first.sum(dim=0)
    unseen = (seen == 0).float().mean().item()
    most = _blocks(seen.numpy(), step).max(axis=(1, 3))
    _discrete(seen_axes, most, step, "viridis", [str(i) for i in range(seen.max() + 1)], zero="unseen")
    seen_axes.set_title(f"Heads of a layer that see a pair{shrunk}, {unseen:.0%} seen by none")

    density = first.float().mean(dim=(1, 2)).tolist()
    names = [str(head + 1) for head in range(len(density))]
    bars = density_axes.bar(names, [100 * share for share in density], color=head_colours(patterns)[0])
    mean = sum(density) / len(density)
    labels = density_axes.bar_label(bars, [f"{share:.1%}" for share in density], fontsize=8, padding=2)
    for label in labels:
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})  # the line of the mean passes behind
    density_axes.axhline(100 * mean, color="black", linewidth=1, linestyle="--", zorder=0)
    density_axes.set_title(f"Pairs that each head of layer 0 sees: {mean:.1%} on average (dashed)")
    density_axes.set(xlabel="head", ylabel="% of the pairs", ylim=(0, 112 * max(density)))

    layers = reach(patterns, prefix_tokens)
    last = int(layers.max())  # later layers join no further pair
    names = [f"{i} layer{'s' * (i > 1)}" for i in range(last + 1)]
    earliest = _blocks(torch.where(layers == 0, last + 1, layers).numpy(), step).min(axis=(1, 3)) % (last + 1)
    _discrete(reach_axes, earliest, step, "viridis_r", names, zero=f"not in {len(patterns)}")
    reach_axes.set_title("Layers until a patch depends on another one, without the class token")
    numbers = list(range(1, last + 1))
    shares = [((layers > 0) & (layers <= number)).float().mean().item() for number in numbers]
    curve_axes.plot(numbers, [100 * share for share in shares], marker="o", linewidth=2.4, color=RED)
    for number, share in zip(numbers, shares, strict=True):
        label = f"{share:.1%}" if share < 1 else "all"
        curve_axes.annotate(label, (number, 100 * share), (-8, 5), textcoords="offset points", ha="right")
    curve_axes.set(xticks=numbers, xlabel="layers", ylabel="% of the pairs", ylim=(0, 112))
    curve_axes.set_xlim(1 - max(0.5, 0.15 * last), last + 0.5)
    curve_axes.set_title("Pairs joined within so many layers, without the class token")
    curve_axes.grid(alpha=0.3)
    for axes in (seen_axes, reach_axes):
        axes.set(xlabel="key patch", ylabel="query patch")
    save_png(figure, path, dpi=100, colours=256)


def _discrete(axes, numbers, step, colours, names, *, zero):
    """Draw a matrix of small integers, each with a named colour, on axes in patches of which a dot is ``step`` wide.

    0 has UNSEEN_COLOUR and the name ``zero``.
    """
    steps = colormaps[colours](np.linspace(0.1, 1, len(names) - 1))
    colours = ListedColormap([UNSEEN_COLOUR, *map(tuple, steps)])
    size = step * len(numbers)
    drawing = {"extent": (0, size, size, 0), "interpolation": "nearest"}
    image = axes.imshow(numbers, cmap=colours, vmin=-0.5, vmax=len(names) - 0.5, **drawing)
    bar = axes.figure.colorbar(image, ax=axes, ticks=range(len(names)), fraction=0.046)
    bar.ax.set_yticklabels([zero, *names[1:]])


# Attention -----------------------------------------------------------------------------------------------------------


def plot_attention(weights, picture, *, grid, patch, prefix_tokens, query, title, path):
    """Write what an encoder looks at in ``picture`` (s, s, 3), uint8: a row a layer.

    weights: [(H, P+N, P+N)] of the layers; patch: side of a patch in px; query: (row, column) of a patch.
    """
    layers, heads = _spread_over(len(weights), MAX_ROWS), _spread_over(len(weights[0]), MAX_HEADS)
    names = [
        "image, query marked",
        "received from all",
        *(f"query, {name}" for name in ["all heads", *(f"head {h + 1}" for h in heads)]),
    ]
    figure = new_figure(2.1 * len(names), 2.0 * len(layers) + 0.8)
    tokens = weights[0].shape[-1]
    figure.suptitle(
        f"{title}\nAttention over the patches, 1 = as much as if each of the {tokens} tokens got the same; "
        "grey: none at all",
        fontsize=11,
    )
    all_axes = figure.subplots(len(layers), len(names), squeeze=False)
    for axes, name in zip(all_axes[0], names, strict=True):
        axes.set_title(name, fontsize=10)
    place = prefix_tokens + query[0] * grid[1] + query[1]
    for row, layer in zip(all_axes, layers, strict=True):
        mine = weights[layer][:, place]  # (H, P+N)
        maps = [weights[layer][:, prefix_tokens:].mean(dim=(0, 1)), mine.mean(dim=0), *mine[heads]]
        row[0].imshow(picture)
        row[0].set_ylabel(f"layer {layer}", fontsize=11)
        for axes, one in zip(row[1:], maps, strict=True):
            # Never less than 2 at the end of the scale: a map without any preference is then pale.
            values = (one[prefix_tokens:] * tokens).unflatten(0, grid).numpy()
            scale = ScalarMappable(Normalize(0, max(values.max(), 2)), "YlOrRd")
            axes.imshow(tint(picture, values, scale, patch))
            figure.colorbar(scale, ax=axes, fraction=0.046, pad=0.02).ax.tick_params(labelsize=7)
            if prefix_tokens:
                axes.set_xlabel(f"class token: {one[:prefix_tokens].sum():.0%}", fontsize=8, labelpad=2)
        for axes in row:
            axes.set(xticks=[], yticks=[])
        for axes in (row[0], *row[2:]):
            corner = (query[1] * patch - 0.5, query[0] * patch - 0.5)
            axes.add_patch(Rectangle(corner, patch, patch, fill=False, edgecolor=BLUE, linewidth=2))
    save_png(figure, path, dpi=110)


def tint(picture, values, scale, patch):
    """The grey ``picture`` (s, s, 3) multiplied by the colours of ``values`` a patch, so that it stays visible."""
    colours = np.where(values[..., None] > 0, scale.to_rgba(values)[..., :3], to_rgb(BLIND_COLOUR))
    colours = colours.repeat(patch, axis=0).repeat(patch, axis=1)
    tinted = np.asarray(Image.fromarray(picture).convert("L"))[..., None] / 255 * np.ones(3)
    tinted[: len(colours), : colours.shape[1]] *= colours  # what the patches do not cover keeps its grey
    return tinted
