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
    """{name: height}, moved as little as makes each at least ``gap`` times the next lower one (isotonic regression)."""
    names, blocks = sorted(heights, key=heights.get), []  # names that touch are a block: its heights less their gaps
    for place, name in enumerate(names):
        blocks.append([np.log(heights[name]) - place * np.log(gap)])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    lowered = [np.mean(block) for block in blocks for _ in block]
    return {
        name: float(np.exp(low + n * np.log(gap))) for n, (name, low) in enumerate(zip(names, lowered, strict=True))
    }


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
    while chosen != before:  # each change hides less, so that this ends
        before = dict(chosen)
        for name, size in sizes.items():
            others = {other: box for other, box in chosen.items() if other != name}
            chosen[name] = _best_place(name, size, points, others, axes.bbox.extents)
    to_data = axes.transData.inverted()
    for name, text in texts.items():
        text.set_position(to_data.transform(chosen[name][:2]))
        text.set_in_layout(False)
        line = _line(points[name], chosen[name])
        if np.ptp(line, axis=0).max() > 2 * POINT:
            axes.plot(*to_data.transform(line).T, color=colours[name], linewidth=0.6, zorder=1)


def _boxes_around(point, width, height):
    """Places of a text (left, low, right, high) around ``point`` in px, nearer ones first."""
    for distance in (9, 20, 34, 50, 68, 90, 115):
        for angle in np.arange(16) * np.pi / 8:
            x = point[0] + np.cos(angle) * (width / 2 + distance)
            y = point[1] + np.sin(angle) * (height / 2 + distance)
            yield (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _best_place(name, size, points, others, inside):
    """The nearest place of ``name`` that hides nothing, or the one that hides least."""
    least, found = np.inf, None
    for box in _boxes_around(points[name], size.width, size.height):
        hidden = _hidden(box, name, points, others, inside)
        if hidden < least:
            least, found = hidden, box
        if least == 0:
            break
    return found


def _hidden(box, name, points, others, inside):
    """How much the place ``box`` of ``name`` hides of points and of ``others`` {name: place}, about in square px."""
    line = _line(points[name], box)
    hidden = 20 * (size := (box[2] - box[0]) * (box[3] - box[1])) - 20 * min(_overlap(box, inside), size)
    for other, (x, y) in points.items():
        dot = (x - POINT, y - POINT, x + POINT, y + POINT)
        apart = np.abs(points[other] - points[name]).max() > 2 * POINT  # else its line cannot avoid the dot
        hidden += 10 * _overlap(box, dot) + 100 * (apart and _on(line, dot))
    for other, place in others.items():
        theirs = _line(points[other], place)
        hidden += 10 * _overlap(box, place) + 300 * (_on(line, place) + _on(theirs, box) + _cross(line, theirs))
    return hidden


def _line(point, box):
    """(2, 2) px: from ``point`` to the nearest place of ``box``."""
    return np.array([point, np.clip(point, box[:2], box[2:])])


def _on(line, box):
    """Share of a line that lies in ``box``."""
    along = line[0] + np.linspace(0, 1, 15)[:, None] * (line[1] - line[0])
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
