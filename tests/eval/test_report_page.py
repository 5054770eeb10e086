"""The page of ``python -m eval.report``: it needs nothing else, and its curves show what they say."""

import base64
import io
import os
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from run_folders import FILM, groups_of, reported, write_files, write_finished, write_run

from eval.report import __main__ as report
from eval.report.groups import estimate
from eval.report.kinds import CURVES, Metric
from eval.report.plots import plot_groups, points, side_by_side
from eval.report.runs import read_runs
from eval.shared.intervals import mean_interval, rate_interval, seed_interval

# The page ------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags of a page, with their attributes; complains about tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def sources(self, tag):
        """Content of the data URLs of ``tag``."""
        urls = [attributes["src"] for name, attributes in self.tags if name == tag]
        assert all(url.startswith("data:") for url in urls)
        return [base64.b64decode(url.split(",", 1)[1], validate=True) for url in urls]


def test_the_page_is_whole_without_anything_else(tmp_path):
    """Curves, the last film of the best run of every group, and its newest reconstruction."""
    for seed, score in ((1, 0.3), (2, 0.8)):
        run = write_run(tmp_path / f"runs/{seed}", seed=seed, scores=[(0.9,), (score,)], film=FILM + bytes([seed]))
        for name, age in (("epoch_10.png", 5), ("epoch_9.png", 50)):
            picture = run / "reconstructions" / name
            picture.parent.mkdir(exist_ok=True)
            Image.new("RGB", (seed, age)).save(picture)
            os.utime(picture, (1e9 - age, 1e9 - age))
    text, _, _ = reported(tmp_path, tmp_path / "runs")
    page = Page(text)
    curves, reconstruction = (Image.open(io.BytesIO(data)) for data in page.sources("img"))
    assert reconstruction.size == (2, 5) and curves.size[0] > 700
    assert page.sources("video") == [FILM + bytes([2])]
    assert not {"script", "link", "iframe", "a"} & {tag for tag, _ in page.tags} and "http" not in text
    assert any("2/rollouts/epoch_0002/rollout.mp4" in part for part in page.text)


def test_pictures_and_texts_of_other_kinds_are_shown(tmp_path):
    folder = write_finished(tmp_path / "runs/0", "image_classifier")
    for side, name in enumerate(("confusion", "examples"), start=1):
        Image.new("RGB", (side, side)).save(folder / f"{name}.png")
    (write_finished(tmp_path / "runs/1", "language") / "sample.txt").write_text("The <b>end</b>.")
    page = Page(reported(tmp_path, tmp_path / "runs")[0])
    sizes = [Image.open(io.BytesIO(data)).size for data in page.sources("img")]
    assert (1, 1) in sizes and (2, 2) in sizes and "The <b>end</b>." in page.text


def test_a_large_film_is_linked_to_instead(tmp_path):
    run = write_run(tmp_path / "runs/my run", film=FILM)
    text, _, _ = reported(tmp_path, run, max_video=len(FILM) - 1)
    page = Page(text)
    assert not page.sources("video")
    (link,) = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert link == "../runs/my run/rollouts/epoch_0002/rollout.mp4" and (tmp_path / "out" / link).exists()
    assert Page(reported(tmp_path, run, max_video=len(FILM))[0]).sources("video") == [FILM]
    report.main([str(run), "--output", str(tmp_path / "r.html"), "--max-video-mb", "0"])
    assert "<video" not in (tmp_path / "r.html").read_text()


def test_relative_and_absolute_paths_give_the_same_report(tmp_path, monkeypatch):
    for seed in (1, 2):
        write_run(tmp_path / "runs" / str(seed), seed=seed, film=FILM)
    absolute = reported(tmp_path, tmp_path / "runs", max_video=0)
    monkeypatch.chdir(tmp_path / "runs")
    assert reported(tmp_path, "1", "../runs/2", max_video=0) == absolute
    assert [run["folder"] for run in absolute[2]["parts"][0]["groups"][0]["runs"]] == ["1", "2"]
    assert str(tmp_path) not in "".join(map(str, absolute))


def test_names_cannot_break_page_or_table(tmp_path):
    name = "<script>alert('1')</script>|"
    for number in range(2):
        write_run(tmp_path / "runs" / f"{number}<b>|", film=FILM, note=f"{name}{number}")
    text, tables, _ = reported(tmp_path, tmp_path / "runs")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags} and f"1: note={name}0" in page.text
    lengths = {len(re.findall(r"(?<!\\)\|", line)) for line in tables.split("###")[0].splitlines() if line[:1] == "|"}
    assert len(lengths) == 1


# Curves --------------------------------------------------------------------------------------------------------------


def test_seeds_whose_epochs_end_at_other_steps_are_compared_where_all_have_values():
    seeds = [{10: 1.0, 20: 3.0, 30: 5.0}, {12: 0.0, 22: 10.0}]
    assert side_by_side(seeds) == {
        12: pytest.approx([1.4, 0.0]),
        20: pytest.approx([3.0, 8.0]),
        22: pytest.approx([3.4, 10.0]),
    }
    assert side_by_side([{5: 1.0}, {7: 2.0}]) == {} and side_by_side([]) == {}


@pytest.fixture
def drawn(monkeypatch):
    """The function ``plot_groups(groups)``, but for the figure's {label of the y axis: axes}."""
    figures = []
    save = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(save, lambda figure, file, **options: figures.append(figure) or Image.new("P", (1, 1)).save(file, "png"))  # fmt: skip  # noqa: E501

    def draw(groups):
        plot_groups(groups)
        return {axes.get_ylabel(): axes for axes in figures[-1].axes}

    return draw


def test_curves_show_mean_seeds_and_band(tmp_path, drawn):
    for seed, last in ((1, 0.2), (2, 0.6)):
        write_run(tmp_path / str(seed), seed=seed, scores=[(0.1,), (last,), (1.0,)])
    axes = drawn(groups_of(tmp_path))
    score = axes[CURVES["score_mean"][0]]
    *seeds, mean = [list(line.get_ydata()) for line in score.lines]
    assert seeds == [[0.1, 0.2, 1.0], [0.1, 0.6, 1.0]] and mean == pytest.approx([0.1, 0.4, 1.0])
    assert score.get_ylim()[0] < 0 and score.get_ylim()[1] > 1  # a score of 1 is seen
    (band,) = score.collections
    at_20 = [y for x, y in band.get_paths()[0].vertices if x == 20]
    assert sorted(set(at_20)) == pytest.approx(seed_interval([0.2, 0.6]))
    held_out, train = (axes[CURVES[key][0]] for key in ("val_loss", "train_loss"))
    assert list(held_out.lines[-1].get_ydata()) == pytest.approx([0.2, 0.1, 0.2 / 3])
    assert train.get_yscale() == "log" and train.get_ylim() == pytest.approx((0.1 / 3 / 1.2, 0.1 * 1.2))


def test_one_seed_is_drawn_with_the_intervals_of_its_rollouts(tmp_path, drawn):
    axes = drawn(groups_of(write_run(tmp_path / "0", scores=[(0.1, 0.3), (0.2, 1.0)])))
    for key, expected in (("score_mean", mean_interval([0.2, 1.0])), ("success_rate", rate_interval(1, 2))):
        (band,) = axes[CURVES[key][0]].collections
        at_20 = [y for x, y in band.get_paths()[0].vertices if x == 20]
        assert sorted(set(at_20)) == pytest.approx(expected)


def test_a_single_rollout_has_a_bar(tmp_path, drawn):
    axes = drawn(groups_of(write_run(tmp_path / "0", scores=[(0.1, 0.3)])))
    (segment,) = axes[CURVES["score_mean"][0]].collections[0].get_segments()
    assert segment.tolist() == [[10, pytest.approx(0.1)], [10, pytest.approx(0.3)]]


def test_curves_of_any_number_of_groups_can_be_told_apart(tmp_path, drawn):
    for number in range(9):
        write_finished(tmp_path / str(number), "image_classifier", **{"attention.name": str(number)})
    lines = drawn(groups_of(tmp_path))[CURVES["top1"][0]].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 9


def test_nothing_to_draw_is_no_picture(tmp_path):
    folder = write_files(tmp_path / "0", [{"step": 1, "epoch": 1.0, "lr": 0.1, "train_loss": -1.0}], model="mae")
    assert plot_groups(groups_of(folder)) is None and plot_groups([]) is None
    (run,) = read_runs([folder])[0]
    assert points(run, "train_loss") == {} and estimate([run.last], Metric("lr", "")) is not None
