"""Pictures of ``python -m eval.attention``, each as the bytes of a PNG."""

import io
from collections import Counter

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure  # no pyplot: nothing global, no display
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from eval.attention.error import MAP_SIZE
from eval.attention.measure import BASELINE
from eval.attention.pictures import BLIND_COLOUR, tint
from eval.attention.tables import Results, describe_settings
from eval.attention.train import summarise
from eval.report.plots import DASHES, MARKERS
from eval.speed.attention import spread_labels

GROUPS = {  # mechanisms that are alike share a colour of Okabe and Ito's palette
    "#000000": ("softmax", "ra"),
    "#D55E00": ("fibottention",),
    "#0072B2": ("local", "bigbird", "hybrid"),
    "#56B4E9": ("eva", "causal_eva"),
    "#CC79A7": ("linformer", "nystromformer"),
    "#009E73": ("performer", "scatterbrain", "lara"),
}
OTHER_COLOUR = "#E69F00"
NEGATIVE_COLOUR = "#56B4E9"
ACROSS = 4  # mechanisms in a row of the gallery


def line_styles(mechanisms):
    """{name: colour of its group, dash and marker of its place there}; mechanisms as in results.json."""
    colours = {mechanism: colour for colour, group in GROUPS.items() for mechanism in group}
    styles, counts = {}, Counter()
    for name, module in mechanisms.items():
        colour = colours.get(module["options"]["name"], OTHER_COLOUR)
        place = counts[colour]
        styles[name] = {
            "color": colour,
            "linestyle": DASHES[place % len(DASHES)],
            "marker": MARKERS[place % len(MARKERS)],
        }
        counts[colour] += 1
    return styles


def _png(figure, dpi=100):
    """With 256 colours, which make a page of pictures a third as large."""
    file, small = io.BytesIO(), io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


def _where(results):
    return describe_settings(results).replace(". ", "\n", 1)


# Time ----------------------------------------------------------------------------------------------------------------


def plot_latency(results):
    """Time against patches on logarithmic axes: a panel a direction, a line a mechanism, named at its end."""
    found, directions = Results(results), results["settings"]["directions"]
    figure = Figure(figsize=(8.4 * len(directions), 7.6), layout="constrained")
    styles = line_styles(results["mechanisms"])
    figure.suptitle(f"Time of one call of attention\n{_where(results)}", fontsize=9)
    for axes, direction in zip(figure.subplots(1, len(directions), squeeze=False)[0], directions, strict=True):
        lines = {}
        for name in found.names:
            rows = [found.row(name, count, direction) for count in found.settings["patches"]]
            lines[name] = [(row["patches"], row["ms"]) for row in rows if row["ms"]]
        _draw_lines(axes, {name: line for name, line in lines.items() if line}, found.settings["patches"], styles)
        axes.set_title(direction)
    return _png(figure)


def _draw_lines(axes, lines, patches, styles):
    axes.set(xlabel="patches N", ylabel="ms", xscale="log", yscale="log")
    axes.set_xticks(patches, [str(count) for count in patches])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    for name, line in lines.items():
        width = 2.6 if name == BASELINE else 1.4
        axes.plot(*zip(*line, strict=True), **styles[name], linewidth=width, markersize=4)
    times = [time for line in lines.values() for _, time in line]
    heights = spread_labels({name: line[-1][1] for name, line in lines.items()}, (max(times) / min(times)) ** 0.034)
    right = patches[-1] * max(patches[-1] / patches[0], 1.5) ** 0.06
    for name, height in heights.items():
        axes.annotate(
            name,
            lines[name][-1],
            (right, height),
            color=styles[name]["color"],
            va="center",
            fontsize=9,
            fontweight="bold" if name == BASELINE else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": styles[name]["color"],
                "linewidth": 0.6,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


# Trade-offs ----------------------------------------------------------------------------------------------------------


def plot_tradeoff(results):
    """Error to softmax attention against time and against FLOPs of one call, a point a mechanism."""
    found = Results(results)
    patches = min(found.error_patches, key=lambda count: abs(count - found.small))
    points = {name: (found.row(name, found.small), found.errors[name, patches]["error"]) for name in found.names}
    highest = max(height for _, height in points.values())
    # An error of 4 would press all others together; one of 0 has no logarithm. symlog is linear up to 2.
    ticks = [tick for tick in (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 4, 8, 16) if tick < highest + 0.5]
    scale = {"yscale": "symlog", "ylim": (-0.06, 1.25 * max(highest, 1)), "yticks": ticks}
    return _plot_costs(found, points, f"error to softmax attention, N={patches} (logarithmic above 2)", **scale)


def plot_training(results):
    """Accuracy of trained classifiers against time and FLOPs of one call, or None where none was trained."""
    found, summaries = Results(results), summarise(results["training"])
    if not summaries:
        return None
    points = {name: (found.row(name, found.small), summary["top1"]) for name, summary in summaries.items()}
    return _plot_costs(found, points, "top-1 accuracy on held-out images")


def _plot_costs(found, points, label, **scale):
    """A panel for time and one for FLOPs; points {name: (row of the measurement, height)}."""
    figure = Figure(figsize=(14, 6), layout="constrained")
    figure.suptitle(f"Cost of one call at N={found.small}\n{_where(found.all)}", fontsize=9)
    styles = line_styles(found.all["mechanisms"])
    costs = {"ms": lambda row: row["ms"], "GFLOP": lambda row: row["flops"] / 1e9}
    for axes, (unit, cost) in zip(figure.subplots(1, 2, sharey=True), costs.items(), strict=True):
        places = {name: (cost(row), height) for name, (row, height) in points.items() if row["ms"]}
        axes.set(xscale="log", xlabel=f"{unit}, forward", ylabel=label, **scale)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.margins(0.1)
        axes.grid(alpha=0.3)
        for name, place in places.items():
            axes.plot(*place, **{**styles[name], "linestyle": ""}, markersize=8)
        _name_points(axes, places, styles)
    return _png(figure)


def _name_points(axes, places, styles):
    """Write the name of each point where it covers no other name and no point, as far as there is such a place."""
    axes.figure.draw_without_rendering()  # decides where points lie
    pixels = {name: axes.transData.transform(place) for name, place in places.items()}
    taken = {name: (x - 7, y - 7, x + 7, y + 7) for name, (x, y) in pixels.items()}
    inside = axes.bbox.extents
    for name in sorted(places, key=lambda name: places[name][1]):
        x, y = pixels[name]
        width, height = 7.6 * len(name), 14
        lefts, rises = (x + 9, x - 9 - width, x - width / 2), (0, 16, -16, 30, -30, 44, -44, 58, -58)
        lows = [y + rise - height / 2 for rise in rises]
        boxes = [(left, low, left + width, low + height) for low in lows for left in lefts]

        def covered(box, width=width, height=height):
            outside = width * height - _overlap(box, inside)
            return outside + sum(_overlap(box, other) for other in taken.values())

        box = min(boxes, key=covered)
        taken[f"name of {name}"] = box
        colour = styles[name]["color"]
        far = abs(box[1] + height / 2 - y) > 1
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0} if far else None
        corner = axes.transData.inverted().transform((box[0], box[1] + 3))
        axes.annotate(name, places[name], corner, color=colour, fontsize=9, arrowprops=line)


def _overlap(one, other):
    """Area, in square pixels, that two boxes (left, low, right, high) share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


# Maps ----------------------------------------------------------------------------------------------------------------


def plot_maps(picture, grid, maps, *, layer, head):
    """What each mechanism weighs: its whole map, and beside it that of one query over the ``picture`` (s, s, 3).

    maps: {name: weights (P+N, P+N), or why there are none}.
    """
    rows = -(-len(maps) // ACROSS)
    figure = Figure(figsize=(4.2 * ACROSS, 2.5 * rows + 1.1), layout="constrained")
    figure.suptitle(
        f"Head {head} of layer {layer} (from 0) of the shipped encoder under each mechanism, class token and "
        f"{grid[0]} x {grid[1]} patches. Left: weights of the marked query; right: of all queries (rows) on all keys\n"
        "1 = as much as if all keys got the same; grey: none at all; blue: negative",
        fontsize=11,
    )
    scale = ScalarMappable(LogNorm(0.1, 100), "YlOrRd")
    pair = [1, 1, 0.06]  # the third column is a gap
    all_axes = figure.subplots(rows, 3 * ACROSS, squeeze=False, width_ratios=pair * ACROSS).reshape(-1, 3)
    for axes in all_axes.flat:
        axes.axis("off")
    for (left, right, _), (name, weights) in zip(all_axes, maps.items(), strict=False):
        left.set_title(name, fontsize=11, loc="left", fontweight="bold")
        if isinstance(weights, str):
            left.text(0, 0.5, f"no map:\n{weights}", wrap=True, fontsize=9)
            continue
        _draw_map(left, right, picture, grid, (weights * len(weights)).numpy(), scale)
    figure.colorbar(scale, ax=all_axes, orientation="horizontal", fraction=0.025, aspect=60, format="{x:g}", pad=0.02)
    return _png(figure, dpi=90)


def _draw_map(left, right, picture, grid, values, scale):
    """One mechanism: ``values`` (P+N, P+N), 1 for a uniform map."""
    prefix, patch = len(values) - grid[0] * grid[1], MAP_SIZE // grid[0]
    row, column = grid[0] // 2, grid[1] // 2
    query = values[prefix + row * grid[1] + column, prefix:].reshape(grid)
    left.imshow(tint(picture, query, scale, patch))
    corner = (column * patch - 0.5, row * patch - 0.5)
    left.add_patch(Rectangle(corner, patch, patch, fill=False, edgecolor="#0072B2", linewidth=2))
    colours = scale.to_rgba(np.maximum(values, 1e-9))[..., :3]
    colours[values == 0], colours[values < 0] = to_rgb(BLIND_COLOUR), to_rgb(NEGATIVE_COLOUR)
    right.imshow(colours, interpolation="nearest")
