"""How lines of many groups are told apart, and where their names stand."""

import numpy as np

from policy.training.pictures import PALETTE

DASHES = ("-", "--", ":", "-.")  # one line shows under another; with the colours different for 28 groups
MARKERS = "osD^vPX"
POINT = 7  # px around the middle of a point that no name should cover


def line_style(number):
    """Colour and dashes of the group ``number``, from 0 on."""
    return {"color": PALETTE[number % len(PALETTE)], "linestyle": DASHES[number % len(DASHES)]}


def mark_sizes(axes, sizes, label):
    """A logarithmic axis of time against ``sizes``, named by ``label``, with a tick at each of them."""
    axes.set(xlabel=label, ylabel="ms", xscale="log", yscale="log")
    axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45 if len(sizes) > 5 else 0)
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)


# Names at the ends of lines ------------------------------------------------------------------------------------------


def name_line_ends(axes, ends, styles):
    """Write beside the axes the name of each line at its end {name: (x, y)}; styles: {name: options of the text}.

    Both axes are logarithmic, and the limits are final.
    """
    low, high = axes.get_ylim()
    pixels = axes.figure.get_size_inches()[1] * 72 * 0.75  # of the axis, in points, roughly
    heights = spread_labels({name: y for name, (_, y) in ends.items()}, (high / low) ** (13 / pixels))
    for name, height in heights.items():
        style = {"fontsize": 9, **styles[name]}
        line = {"arrowstyle": "-", "color": style["color"], "linewidth": 0.6, "shrinkB": 4, "relpos": (0, 0.5)}
        place = (1.03, axes.transAxes.inverted().transform(axes.transData.transform((1, height)))[1])
        axes.annotate(
            style.pop("text", name),
            ends[name],
            place,
            textcoords="axes fraction",
            va="center",
            arrowprops=line,
            annotation_clip=False,
            **style,
        )


def spread_labels(heights, gap):
    """Heights of labels on a logarithmic axis, moved until each is ``gap`` times the next lower one."""
    names = sorted(heights, key=heights.get)
    placed = dict(heights)
    for _ in range(100):
        for low, high in zip(names, names[1:], strict=False):
            lacking = (gap * placed[low] / placed[high]) ** 0.5
            if lacking > 1:
                placed[low], placed[high] = placed[low] / lacking, placed[high] * lacking
    return placed


# Names of points -----------------------------------------------------------------------------------------------------


def name_points(axes, places, colours):
    """Write the name of each point {name: (x, y)} where it covers no other name, no point and no line to a name.

    The limits of the axes are final. A name that does not fit beside its point has a line to it. All names take turns
    to find the best place, until none moves any more.
    """
    axes.figure.draw_without_rendering()  # decides where points lie
    points = {name: axes.transData.transform(place) for name, place in places.items()}
    texts = {name: axes.text(0, 0, name, fontsize=9, color=colours[name], va="bottom") for name in places}
    sizes = {name: text.get_window_extent() for name, text in texts.items()}
    chosen, before = {}, None
    for _ in range(8):
        if chosen == before:
            break
        before = dict(chosen)
        for name in places:
            others = {other: box for other, box in chosen.items() if other != name}
            boxes = _boxes_around(points[name], sizes[name].width, sizes[name].height)
            chosen[name] = min(boxes, key=lambda box: _cost(box, name, points, others, axes.bbox.extents))  # noqa: B023
    to_data = axes.transData.inverted()
    for name, text in texts.items():
        text.set_position(to_data.transform(chosen[name][:2]))
        text.set_in_layout(False)
        line = _line(points[name], chosen[name])
        if np.ptp(line, axis=0).max() > 2 * POINT:
            axes.plot(*to_data.transform(line).T, color=colours[name], linewidth=0.6, zorder=1)


def _boxes_around(point, width, height):
    """Places of a text (left, low, right, high) around ``point`` in px, nearer ones first."""
    for distance in (9, 20, 34, 50, 68):
        for angle in np.arange(16) * np.pi / 8:
            x = point[0] + np.cos(angle) * (width / 2 + distance)
            y = point[1] + np.sin(angle) * (height / 2 + distance)
            yield (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _cost(box, name, points, others, inside):
    """What the place ``box`` of ``name`` hides, in square px, and a little for its distance from the point."""
    line = _line(points[name], box)
    width, height = box[2] - box[0], box[3] - box[1]
    cost = 2 * np.hypot(*(line[1] - line[0])) + 20 * (width * height - _overlap(box, inside))
    for x, y in points.values():
        dot = (x - POINT, y - POINT, x + POINT, y + POINT)
        cost += 4 * _overlap(box, dot) + 100 * (_on(line, dot) if (x, y) != tuple(points[name]) else 0)
    for other, place in others.items():
        theirs = _line(points[other], place)
        cost += 10 * _overlap(box, place) + 300 * (_on(line, place) + _on(theirs, box) + _cross(line, theirs))
    return cost


def _line(point, box):
    """(2, 2) px: from ``point`` to the nearest place of ``box``."""
    return np.array([point, np.clip(point, box[:2], box[2:])])


def _on(line, box):
    """Share of a line that lies in ``box``."""
    along = line[0] + np.linspace(0, 1, 25)[:, None] * (line[1] - line[0])
    return ((along >= box[:2]) & (along <= box[2:])).all(axis=1).mean()


def _cross(one, other):
    """Whether two lines cross."""

    def sides(line, ends):
        (x, y), direction = line[0], line[1] - line[0]
        first, second = (direction[0] * (end[1] - y) - direction[1] * (end[0] - x) for end in ends)
        return first * second < 0

    return sides(one, other) and sides(other, one)


def _overlap(one, other):
    """Area that two boxes (left, low, right, high) share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)
