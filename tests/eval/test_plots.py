"""What pictures and tables share: labels that do not cover each other, tables as Markdown and HTML."""

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image
from run_folders import groups_of, write_run

from eval.report.plots import plot_groups
from eval.shared.classify_plots import plot_comparison, plot_confusion, plot_examples
from eval.shared.pages import Section, html_page, markdown_page
from eval.shared.plots import name_line_ends, name_points, spread_labels
from eval.shared.tables import html_table, markdown_table, short, show_interval
from policy.training.pictures import new_figure, png_of


def test_labels_are_moved_apart_and_keep_their_order():
    heights = {"a": 100.0, "b": 101.0, "c": 99.0, "d": 10.0}
    placed = spread_labels(heights, 1.3)
    assert placed["d"] == pytest.approx(10) and sorted(placed, key=placed.get) == ["d", "c", "a", "b"]
    values = sorted(placed.values())
    assert all(high / low > 1.29 for low, high in zip(values, values[1:], strict=False))
    assert (placed["c"] * placed["a"] * placed["b"]) ** (1 / 3) == pytest.approx(100, rel=0.01)  # around their middle


def boxes_of(axes, names):
    """{name: box in px} of texts on ``axes``, without the lines that lead to them."""
    axes.figure.draw_without_rendering()
    return {one.get_text(): Text.get_window_extent(one) for one in axes.findobj(Text) if one.get_text() in names}


def assert_apart(boxes):
    boxes = list(boxes)
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])


def test_names_of_crowded_points_cover_nothing():
    """Ten points, of which two coincide nearly."""
    places = {f"mechanism_{n}": (1 + 0.02 * n, 1 + (n * 7 % 5) * 0.01) for n in range(9)} | {"far": (3, 2)}
    places["near"] = (1.001, 1.0005)
    axes = new_figure(7, 5).subplots()
    for place in places.values():
        axes.plot(*place, marker="o")
    name_points(axes, places, dict.fromkeys(places, "black"))
    boxes = boxes_of(axes, places)
    assert_apart(boxes.values())
    for point in (axes.transData.transform(place) for place in places.values()):
        assert not any(box.contains(*point) for box in boxes.values())
    x, y = axes.transData.transform(places["far"])
    assert abs(boxes["far"].x0 - x) < 25 and abs(boxes["far"].y0 - y) < 25  # beside its point


def test_names_at_the_ends_of_lines_cover_nothing():
    ends = {f"line {n}": (100, 10 + 0.01 * n) for n in range(8)}
    axes = new_figure(7, 5).subplots()
    axes.set(xscale="log", yscale="log", xlim=(1, 100), ylim=(1, 1000))
    name_line_ends(axes, ends, {name: {"color": "black"} for name in ends})
    boxes = boxes_of(axes, ends)
    assert len(boxes) == 8 and all(box.x0 > axes.bbox.x1 for box in boxes.values())
    assert_apart(boxes.values())


NAMES = (r"$\frac$", "$x$", r"a\$b", "$", "{x} %s", "a\nb", "n" * 300)


def draw_confusion(path, names):
    plot_confusion(path, np.eye(len(names), dtype=int), names)


def draw_comparison(path, names):
    plot_comparison(path, {name: {"top1": 0.5, "top1_ci95": [0.4, 0.6], "chance": 0.1} for name in names})


def draw_examples(path, names):
    images = np.zeros((len(names), 3, 8, 8))
    plot_examples(path, images, range(len(names)), range(len(names))[::-1], names)


def draw_groups(path, names):
    for number, name in enumerate(names):
        write_run(path.parent / str(number), **{"training.schedule": name})
    path.write_bytes(plot_groups(groups_of(path.parent)))


@pytest.mark.parametrize("draw", [draw_confusion, draw_comparison, draw_examples, draw_groups])
def test_names_of_users_are_no_formulas(tmp_path, draw):
    draw(tmp_path / "picture.png", list(NAMES))
    with Image.open(tmp_path / "picture.png") as picture:
        assert min(picture.size) > 50 and max(picture.size) < 8000


def test_dollars_are_drawn():
    def png(text, **options):
        figure = new_figure(3, 1)
        figure.text(0.1, 0.5, text, **options)
        return png_of(figure)

    assert png("$x$") == png("$x$", parse_math=False) != png("x")


def test_tables_are_escaped_and_keep_intervals_together():
    rows = [["a|b", "<i>"], ["x", "0.5 [0.4, 0.6]"]]
    head, _, body = markdown_table(rows)
    assert head.count("|") - head.count("\\|") == body.count("|") == 3
    assert "&lt;i&gt;" in html_table(rows) and "0.5 [0.4,\u00a00.6]" in html_table(rows)


def test_numbers_are_short():
    assert [short(value) for value in (None, 1234.5, 12.345, 0.00123)] == ["–", "1,234", "12.3", "0.0012"]
    assert show_interval(0.5, [0.4, 0.61], ".0f", 100) == "50 [40, 61]" and show_interval(None, None, ".2f") == "–"


def test_a_section_is_the_same_in_page_and_markdown():
    sections = [Section("Sizes", "Of <all>.", [["a"], ["1"]], ["a fact"]), Section("More", level=3)]
    told = {"intro": ["First."], "command": "run --x"}
    page, text = html_page("Title", sections, **told), markdown_page("Title", sections, **told)
    for tag, line in (("<h2>Sizes</h2>", "## Sizes"), ("<li>a fact</li>", "* a fact"), ("<h3>More</h3>", "### More")):
        assert tag in page and f"\n{line}\n" in f"{text}\n"
    assert "Of &lt;all&gt;." in page and "Of <all>." in text and "`run --x`" in text and "<code>run --x</code>" in page
