"""Pictures of a run: curves with everything that was logged, and rows of images that are the images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from policy.training.curves import plot_curves, read_metrics
from policy.training.pictures import GAP, PALETTE, picture_rows, write_reconstructions


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The function ``plot_curves`` of lines of metrics.jsonl, but for the axes: {label of the y axis: axes}."""
    figures = []
    monkeypatch.setattr("policy.training.curves.save_png", lambda figure, path: figures.append(figure) or path)

    def draw(*lines):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert read_metrics(tmp_path) == list(lines) and plot_curves(tmp_path) == tmp_path / "curves.png"
        return {axes.get_ylabel(): axes for axes in figures[-1].axes if axes.lines}

    return draw


def shown(axes):
    """{name in the legend: values}."""
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def test_curves_have_a_panel_for_each_group_of_metrics(drawn):
    first = {"step": 1, "epoch": 0.5, "train_loss": 1.0, "lr": 1e-4}
    axes = drawn(first, {"step": 2, "epoch": 1.0, "train_loss": 0.5, "val_loss": 0.6})
    loss, rate = axes.values()
    assert shown(loss) == {"training": [1.0, 0.5], "held out (EMA)": [0.6]} and loss.get_yscale() == "log"
    assert list(shown(rate).values()) == [[1e-4]] and rate.get_xlim() == loss.get_xlim()  # all of the run
    above = loss.child_axes[0]
    above.figure.draw_without_rendering()
    assert above.get_xlabel() == "epoch" and above.get_xlim()[1] == pytest.approx(loss.get_xlim()[1] / 2)
    accuracy, px = list(drawn({**first, "train_px": 3.0, "top1": 0.4, "top5": 1.0}).values())[1:3]
    assert shown(accuracy) == {"top-1, test": [0.4], "top-5, test": [1.0]} and "px" in px.get_ylabel()


def test_a_score_of_one_is_not_cut(drawn):
    (axes,) = drawn({"step": 5, "score_mean": 1.0, "success_rate": 0.0}).values()
    assert axes.get_ylim()[0] < 0 and axes.get_ylim()[1] > 1 and len(axes.get_legend().get_texts()) == 2


def test_the_parts_of_the_loss_show_when_there_are_several(drawn):
    line = {"step": 1, "train_loss": 0.5, "train_diffusion": 0.4}
    assert len(drawn(line)) == 1
    parts = list(drawn({**line, "train_decode_image": 0.1, "train_decode_pose": 0.2}).values())[1]
    assert shown(parts) == {"noise": [0.4], "decoded image": [0.1], "decoded pose": [0.2]}
    assert len({line.get_color() for line in parts.lines} & set(PALETTE)) == 3


def test_nothing_to_draw_is_no_picture(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "accuracy": 0.5}\n')
    assert plot_curves(tmp_path) is None and not list(tmp_path.glob("*.png"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1.0, "train_loss": 0.5}\n')
    with Image.open(plot_curves(tmp_path)) as image:
        assert image.format == "PNG" and np.asarray(image).std() > 10


def find(image, picture):
    """Top left corners (row, column) at which ``picture`` (H, W, 3) shows ``image`` (h, w, 3)."""
    height, width = image.shape[:2]
    starts = np.argwhere((picture[: -height or None, : -width or None] == image[0, 0]).all(axis=2))
    return [(r, c) for r, c in starts if np.array_equal(picture[r : r + height, c : c + width], image)]


def test_rows_show_their_images_enlarged_in_order():
    """Any sizes and numbers of images; a title that is too wide is cut, and a caption breaks into lines."""
    rng = np.random.default_rng(0)
    wide = [rng.integers(0, 256, (6, 9, 3), dtype=np.uint8) for _ in range(3)]
    large = rng.integers(0, 256, (70, 70, 3), dtype=np.uint8)
    rows = [("first", wide, ["a", ("b\nc", "red"), "d" * 99]), ("second\nline", [large], None)]
    plain = picture_rows(rows, side=30)
    picture = np.asarray(picture_rows(rows, caption="word " * 60, side=30))
    assert picture.shape[0] > plain.height + 15 and picture.shape[1] == plain.width
    (places,) = zip(*(find(image.repeat(5, axis=0).repeat(5, axis=1), picture) for image in wide), strict=True)
    assert [column for _, column in places] == [places[0][1] + number * (45 + GAP) for number in range(3)]
    below = np.asarray(Image.fromarray(large).resize((30, 30), Image.Resampling.BOX))
    ((row, column),) = find(below, picture)
    assert row > places[0][0] + 30 and column == places[0][1]


def test_reconstructions_are_below_what_was_observed(tmp_path):
    """The last step of the first eight windows, camera by camera."""
    torch.manual_seed(0)
    pairs = {name: torch.rand(2, 10, 2, 3, size, size) * 2.4 - 1.2 for size, name in ((6, "one"), (4, "two"))}
    path = tmp_path / "deeper" / "picture.png"
    write_reconstructions(path, pairs)
    picture, last = np.asarray(Image.open(path)), 0
    for images in (images for pair in pairs.values() for images in pair):
        scale = 144 // images.shape[-1]
        for number, image in enumerate(images[:, -1]):
            pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            found = find(pixels.repeat(scale, axis=0).repeat(scale, axis=1), picture)
            assert len(found) == (number < 8) and all(row > last for row, _ in found)
        last += 100
