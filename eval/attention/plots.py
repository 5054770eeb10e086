"""Pictures of ``python -m eval.attention``, each as the bytes of a PNG."""

from collections import Counter

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator

from eval.attention.error import MAP_SIZE
from eval.attention.measure import BASELINE
from eval.attention.pictures import BLIND_COLOUR, tint
from eval.attention.tables import Results, describe_settings
from eval.attention.train import summarise
from eval.shared.plots import DASHES, MARKERS, mark_sizes, name_line_ends, name_points
from policy.training.pictures import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, new_figure, png_of

GROUPS = {  # mechanisms that are alike share a colour
    BLACK: ("softmax", "ra"),
    RED: ("fibottention",),
    BLUE: ("local", "bigbird", "hybrid"),
    SKY: ("eva", "causal_eva"),
    PINK: ("linformer", "nystromformer"),
    GREEN: ("performer", "scatterbrain", "lara"),
}
OTHER_COLOUR, NEGATIVE_COLOUR = ORANGE, SKY
ACROSS = 4  # mechanisms in a row of the gallery
SMALL = {"colours": 256}  # a page of pictures is a third as large


def line_styles(mechanisms):
    """{name: colour of its group, dash and marker of its place there}; mechanisms as in results.json."""
    colours = {mechanism: colour for colour, group in GROUPS.items() for mechanism in group}
    styles, counts = {}, Counter()
    for name, module in mechanisms.items():
        colour = colours.get(module["options"]["name"], OTHER_COLOUR)
        place = counts[colour]
        dash, marker = DASHES[place % len(DASHES)], MARKERS[place % len(MARKERS)]
        styles[name] = {"color": colour, "linestyle": dash, "marker": marker}
        counts[colour] += 1
    return styles


def _where(results):
    return describe_settings(results).replace(". ", "\n", 1)


# Time ----------------------------------------------------------------------------------------------------------------


def plot_latency(results):
    """Time against patches on logarithmic axes: a panel a direction, a line a mechanism, named at its end."""
    found, directions = Results(results), results["settings"]["directions"]
    figure = new_figure(8.4 * len(directions), 6.8)
    styles = line_styles(results["mechanisms"])
    figure.suptitle(f"Time of one call of attention\n{_where(results)}", fontsize=9)
    for axes, direction in zip(figure.subplots(1, len(directions), squeeze=False)[0], directions, strict=True):
        mark_sizes(axes, found.settings["patches"], "patches N")
        axes.set_title(direction)
        ends, named = {}, {}
        for name in found.names:
            rows = [found.row(name, count, direction) for count in found.settings["patches"]]
            if points := [(row["patches"], row["ms"]) for row in rows if row["ms"]]:
                width, weight = (2.6, "bold") if name == BASELINE else (1.4, "normal")
                axes.plot(*zip(*points, strict=True), **styles[name], linewidth=width, markersize=4)
                ends[name], named[name] = points[-1], {"color": styles[name]["color"], "fontweight": weight}
        name_line_ends(axes, ends, named)
    return png_of(figure, **SMALL)


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
    figure = new_figure(14, 6)
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
        name_points(axes, places, {name: styles[name]["color"] for name in places})
    return png_of(figure, **SMALL)


# Maps ----------------------------------------------------------------------------------------------------------------


def plot_maps(picture, grid, maps, *, layer, head):
    """What each mechanism weighs: its whole map, and beside it that of one query over the ``picture`` (s, s, 3).

    maps: {name: weights (P+N, P+N), or why there are none}.
    """
    rows = -(-len(maps) // ACROSS)
    figure = new_figure(4.2 * ACROSS, 2.5 * rows + 1.1)
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
    bar = figure.colorbar(scale, ax=all_axes, orientation="horizontal", fraction=0.025, aspect=60, pad=0.02)
    bar.ax.xaxis.set_major_formatter("{x:g}")
    bar.set_label("weight, relative to uniform attention")
    return png_of(figure, dpi=90, **SMALL)


def _draw_map(left, right, picture, grid, values, scale):
    """One mechanism: ``values`` (P+N, P+N), 1 for a uniform map."""
    prefix, patch = len(values) - grid[0] * grid[1], MAP_SIZE // grid[0]
    row, column = grid[0] // 2, grid[1] // 2
    query = values[prefix + row * grid[1] + column, prefix:].reshape(grid)
    left.imshow(tint(picture, query, scale, patch))
    corner = (column * patch - 0.5, row * patch - 0.5)
    left.add_patch(Rectangle(corner, patch, patch, fill=False, edgecolor=BLUE, linewidth=2))
    colours = scale.to_rgba(np.maximum(values, 1e-9))[..., :3]
    colours[values == 0], colours[values < 0] = to_rgb(BLIND_COLOUR), to_rgb(NEGATIVE_COLOUR)
    right.imshow(colours, interpolation="nearest")
