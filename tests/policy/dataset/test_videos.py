"""Videos for classification: crops, batches, and files that cannot be read."""

import random

import numpy as np
import pytest
import torch
from films import broken_files, clip_files, numbers, write_video
from PIL import Image

from policy.dataset.video import dataset as videos
from policy.dataset.video.dataset import VideoDataset, scale_short_side, spatial_crops
from policy.dataset.video.decode import clip_positions, frame_index


def places(_, height=64, width=96):
    """A picture whose red is twice the column and whose green is twice the row."""
    row, column = np.mgrid[:height, :width]
    return np.stack([2 * column, 2 * row, np.zeros_like(row)], axis=-1).astype(np.uint8)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return clip_files(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return broken_files(tmp_path_factory.mktemp("broken"))


def dataset(paths, labels=None, **options):
    labels = np.arange(len(paths)) if labels is None else labels
    defaults = {"classes": [f"class {n}" for n in range(len(paths))], "frames": 4, "image_size": 16, "jitter": (16, 20)}
    return VideoDataset(paths, labels, **{**defaults, **options})


def test_scaling_is_that_of_pillow():
    rng = np.random.default_rng(0)
    for shape, size, expected in (((30, 47), 16, (16, 25)), ((47, 30), 16, (25, 16)), ((9, 12), 30, (30, 40))):
        image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        ours = scale_short_side(torch.from_numpy(image).permute(2, 0, 1)[None], size)[0]
        assert ours.shape == (3, *expected) and ours.dtype == torch.uint8
        theirs = Image.fromarray(image).resize(expected[::-1], Image.Resampling.BILINEAR)
        assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs)).max() <= 1


def corners(crop):
    """(top, left, scale, mirrored) of crops (..., 3, s, s) in [-1, 1] of ``places``."""
    crop = (crop.double() + 1) * 127.5 / 2
    across, down = crop[..., 0, :, :].mean(-2), crop[..., 1, :, :].mean(-1)
    slope = (across[..., -2] - across[..., 1]) / (crop.shape[-1] - 3)
    left = torch.minimum(across[..., 1], across[..., -2])
    return down[..., 1], left, 1 / slope.abs(), slope < 0


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (40, 40)])
def test_crops_lie_where_they_should(shape):
    clip = torch.from_numpy(places(0, *shape)).permute(2, 0, 1)[None].expand(2, -1, -1, -1)
    rows, columns = (side - 30 for side in shape)
    (middle,) = spatial_crops(clip, 30, 1)
    assert (middle[:, 0, 0, 0] == columns // 2 * 2).all() and (middle[:, 1, 0, 0] == rows // 2 * 2).all()
    three = spatial_crops(clip, 30, 3)
    assert three.shape == (3, 2, 3, 30, 30) and torch.equal(three[1], middle)
    left, top = three[:, 0, 0, 0, 0] // 2, three[:, 0, 1, 0, 0] // 2
    assert left.tolist() == ([0, columns // 2, columns] if columns >= rows else [columns // 2] * 3)
    assert top.tolist() == ([rows // 2] * 3 if columns >= rows else [0, rows // 2, rows])


@pytest.fixture(scope="module")
def landscape(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("places") / "places.mp4", 6, picture=places)


def train(data, seeds):
    (batch,) = data.stream([[(0, seed) for seed in seeds]])
    return batch


def test_a_training_clip_is_one_crop_for_all_its_frames(landscape):
    data = dataset([landscape], image_size=48, jitter=(64, 64), frames=3)
    batch = train(data, range(60))
    assert batch["video"].shape == (60, 3, 3, 48, 48) and batch["video"].dtype == torch.float32
    assert batch["label"].dtype == torch.int64 and set(batch) == {"video", "label"}
    assert batch["video"].min() >= -1 and batch["video"].is_contiguous()
    top, left, scale, mirrored = corners(batch["video"])
    for values in (top, left):
        assert (values - values[:, :1]).abs().max() < 1
    assert top.min() < 3 and 14 < top.max() < 18.5 and left.min() < 4 and 44 < left.max() < 50
    assert (scale - 1).abs().max() < 0.05
    assert (mirrored == mirrored[:, :1]).all() and 0.3 < mirrored.float().mean() < 0.7


def test_jitter_scales_and_flip_mirrors_training_clips(landscape):
    for flip in (0, 1):
        data = dataset([landscape], image_size=48, jitter=(64, 128), flip=flip)
        _, _, scale, mirrored = corners(train(data, range(40))["video"])
        assert 1.0 <= scale.min() + 0.05 < 1.2 and 1.8 < scale.max() < 2.1
        assert (mirrored == bool(flip)).all()
    scale = corners(train(dataset([landscape], image_size=48, jitter=None, flip=0), range(5))["video"])[2]
    assert (scale - 48 / 64).abs().max() < 0.05  # None: the short side is image_size


def test_evaluation_scales_to_the_smallest_jitter_and_cuts_the_middle(landscape):
    batch = dataset([landscape], image_size=48, jitter=(64, 128), flip=1).batch([0])
    top, left, scale, mirrored = corners(batch["video"])
    assert batch["video"].shape == (1, 1, 4, 3, 48, 48) and not mirrored.any()
    assert (scale - 1).abs().max() < 0.05 and (top - 9).abs().max() < 1 and (left - 25).abs().max() < 1
    scale = corners(dataset([landscape], image_size=48, jitter=None).batch([0])["video"])[2]
    assert (scale - 48 / 64).abs().max() < 0.05


def test_views_are_clips_times_crops(landscape, clips):
    batch = dataset([landscape], image_size=48, jitter=(64, 64), temporal_views=2, spatial_views=3).batch([0])
    assert batch["video"].shape == (1, 6, 4, 3, 48, 48)
    left = corners(batch["video"])[1].mean(-1)[0]
    assert (left - torch.tensor([1.0, 25, 49] * 2)).abs().max() < 1
    options = {"sampling": "strided", "stride": 5, "temporal_views": 3}
    batch = dataset(clips, **options, spatial_views=3).batch([0])
    expected = clip_positions(48, frames=4, sampling="strided", stride=5, views=3)
    assert numbers(batch["video"])[0].tolist() == np.repeat(expected, 3, axis=0).tolist()


# Batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"sampling": "uniform"}, {"sampling": "strided", "stride": 5}])
@pytest.mark.parametrize("frames", [3, 7])
def test_clips_hold_the_sampled_frames(clips, options, frames):
    data = dataset(clips, frames=frames, **options)
    assert (len(data), data.num_classes, data.classes[3], data.labels.tolist()) == (4, 4, "class 3", [0, 1, 2, 3])
    batch = data.batch([2, 0, 3, 1])
    assert batch["label"].tolist() == [2, 0, 3, 1]
    expected = [clip_positions(count, frames=frames, **options)[0].tolist() for count in (5, 48, 1, 20)]
    assert numbers(batch["video"])[:, 0].tolist() == expected
    ((drawn, again),) = [numbers(train(data, [7, 7])["video"])]
    rng = np.random.default_rng([7, 0])
    assert drawn.tolist() == again.tolist() == clip_positions(48, frames=frames, **options, rng=rng)[0].tolist()


REQUESTS = [[(0, 5), (1, 6)], [(2, 7)], [(1, 6), (3, 8), (0, 9)], [(0, 5)], [(1, None), (3, None)]]


def equal(batches, others):
    pairs = zip(batches, others, strict=True)
    return all(set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def test_samples_depend_on_seed_and_index_alone(clips):
    data = dataset(clips, jitter=(16, 32))
    batches = list(data.stream(REQUESTS))
    assert equal(batches, dataset(clips, jitter=(16, 32), workers=2).stream(iter(REQUESTS)))
    assert torch.equal(batches[0]["video"][1], batches[2]["video"][0])
    assert torch.equal(batches[0]["video"][0], batches[3]["video"][0])
    assert not torch.equal(batches[2]["video"][2], batches[3]["video"][0])
    assert equal(batches[-1:], [data.batch([1, 3])])
    first, second = next(dataset(clips[:1] * 2, jitter=(16, 32)).stream([[(0, 5), (1, 5)]]))["video"]
    assert not torch.equal(first, second)  # the same video and seed
    drawn = numbers(next(data.stream([[(0, seed) for seed in range(20)]]))["video"])
    assert len({tuple(clip) for clip in drawn.tolist()}) > 15


def test_nothing_global_is_drawn_from(clips):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    list(dataset(clips).stream(REQUESTS))
    list(dataset(clips, workers=1).stream(REQUESTS[:1]))
    assert states() == before


# What cannot be read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_videos_are_replaced_in_training(clips, broken, workers):
    paths = [clips[0], broken["cut"], clips[1], broken["text"]]
    data = dataset(paths, [0, 1, 2, 3], workers=workers)
    requests = [[(0, 1), (1, 2)], [(3, 3), (2, 4)], [(1, 2), (1, 5)]]
    batches = list(data.stream(requests))
    assert set(data.unreadable) == {broken["cut"], broken["text"]}
    assert torch.equal(batches[0]["video"][1], batches[2]["video"][0])  # although it is known by now
    for batch, request in zip(batches, requests, strict=True):
        assert set(batch) == {"video", "label"}
        assert batch["video"].shape == (2, 4, 3, 16, 16) and set(batch["label"].tolist()) <= {0, 2}
        for clip, label, (_, seed) in zip(batch["video"], batch["label"], request, strict=True):
            (expected,) = dataset(paths).stream([[(int(label), seed)]])
            assert torch.equal(expected["video"][0], clip)
    labels = torch.cat([batch["label"] for batch in dataset(paths).stream([[(1, n) for n in range(20)]])])
    assert set(labels.tolist()) == {0, 2}  # not always the same one


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_videos_are_left_out_of_evaluation(clips, broken, workers):
    paths = [clips[0], *broken.values(), clips[1]]
    data = dataset(paths, workers=workers)
    last = len(paths) - 1
    first, none, second = data.stream([[(0, None), (1, None)], [(2, None)], [(n, None) for n in range(3, last + 1)]])
    assert [batch["label"].tolist() for batch in (first, none, second)] == [[0], [], [last]]
    assert first["video"].shape == (1, 1, 4, 3, 16, 16) and none["video"].shape == (0, 1, 4, 3, 16, 16)
    assert none["video"].dtype == torch.float32
    assert numbers(second["video"]).tolist() == [clip_positions(20, frames=4, sampling="uniform").tolist()]
    assert set(data.unreadable) == set(broken.values())
    report = data.report_unreadable().splitlines()
    assert report[0] == "7 of 9 videos could not be read" and len(report) == 8
    assert f"  {broken['sound']}: got no pictures, allowed: a video" in report
    assert dataset(clips).report_unreadable() == "0 of 4 videos could not be read"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("seed", [None, 3])
def test_nothing_readable_is_an_error(broken, workers, seed):
    data = dataset([broken["text"], broken["sound"]], workers=workers)
    with pytest.raises(ValueError, match="videos"):
        list(data.stream([[(0, seed)], [(1, seed)]]))
    assert len(data.unreadable) == 2


def test_an_unreadable_video_is_tried_once(clips, broken, monkeypatch):
    tried = []
    monkeypatch.setattr(videos, "frame_index", lambda path: tried.append(path) or frame_index(path))
    data = dataset([clips[0], broken["text"]])
    for _ in range(3):
        train(data, [1])
        data.batch([1])
    assert tried.count(broken["text"]) == 1


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, options",
    [("frames", {"frames": 0}), ("stride", {"stride": 0}), ("image_size", {"image_size": 0, "jitter": None}),
     ("temporal_views", {"temporal_views": 0}), ("workers", {"workers": -1}), ("sampling", {"sampling": "random"}),
     ("spatial_views", {"spatial_views": 2}), ("jitter", {"image_size": 17}), ("jitter", {"jitter": (20, 16)}),
     ("frames", {"frames": 10**9}), ("image_size", {"image_size": 10**6, "jitter": None}),
     ("stride", {"stride": 2**70}), ("temporal_views", {"temporal_views": 10**9}), ("workers", {"workers": 10**6}),
     ("jitter", {"jitter": (16,)}), ("jitter", {"jitter": (16, 10**7)}), ("jitter", {"jitter": (16, float("nan"))}),
     ("flip", {"flip": float("nan")}),
     ("flip", {"flip": 1.5}), ("labels", {"labels": [0]}), ("labels", {"labels": [0, 2]}),
     ("labels", {"labels": [0, -1]}), ("labels", {"paths": [], "labels": []})],
)  # fmt: skip
def test_wrong_options_are_named(key, options):
    with pytest.raises(ValueError, match=key):
        dataset(**{"paths": ["a.mp4", "b.mp4"], **options})
