"""Pictures and clips with the classes that a simulator gave them: samples, shifts, splits and what is no label set."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr

from policy.dataset import ReplayBuffer
from policy.dataset.labelled import LabelledClips, LabelledFrames, open_labelled


def buffer_of(count=12, size=8, classes=3):
    rng = np.random.default_rng(4)
    images = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    label = (np.arange(count) % classes).astype(np.float32)
    return ReplayBuffer({"image": images, "label": label}, np.array([count]))


def expected_pictures(buffer, frames):
    """(..., 3, h, w) float64 in [-1, 1]."""
    return np.moveaxis(buffer.arrays["image"][frames] / 127.5 - 1, -1, -3)


FRAMES = {"frames": [1, 2, 4, 5, 9], "classes": ["a", "b", "c"]}
CLIPS = {"starts": [0, 1, 4], "frames": 3, "stride": 2, "classes": ["a", "b", "c"]}


@pytest.mark.parametrize("moved", [False, True])
def test_frames(moved):
    buffer = buffer_of()
    expected = expected_pictures(buffer, [9, 1])
    if moved:
        buffer.to("cpu")
    data = LabelledFrames(buffer, **FRAMES)
    batch = data.batch(np.array([4, 0]))
    assert len(data) == 5 and data.num_classes == 3 and data.labels.tolist() == [1, 2, 1, 2, 0]
    assert batch["image"].dtype == torch.float32 and batch["label"].dtype == torch.int64
    np.testing.assert_allclose(batch["image"], expected, atol=1e-6)
    assert batch["label"].tolist() == [0, 1]
    again = LabelledFrames(buffer, **FRAMES, image_size=8, pad=2).batch([4, 0])  # batches are never shifted
    assert torch.equal(again["image"], batch["image"])


def test_clips():
    buffer = buffer_of()
    data = LabelledClips(buffer, **CLIPS)
    batch = data.batch([2, 0])
    assert len(data) == 3 and data.labels.tolist() == [0, 1, 1]
    assert batch["video"].shape == (2, 1, 3, 3, 8, 8) and batch["label"].tolist() == [1, 0]
    np.testing.assert_allclose(batch["video"][:, 0], expected_pictures(buffer, [[4, 6, 8], [0, 2, 4]]), atol=1e-6)
    (trained,) = data.stream([[(2, 7), (0, 7)]])
    assert torch.equal(trained["video"], batch["video"][:, 0]) and trained["label"].tolist() == [1, 0]
    for wrong in ({"frames": 0}, {"stride": 0}):
        with pytest.raises(ValueError, match="frames, stride"):
            LabelledClips(buffer, **CLIPS | wrong)


def test_another_image_size_is_an_antialiased_resize():
    buffer = buffer_of(size=12)
    data = LabelledClips(buffer, **CLIPS, image_size=6)
    video = data.batch([1])["video"]
    assert video.shape == (1, 1, 3, 3, 6, 6)
    pictures = torch.from_numpy(expected_pictures(buffer, [1, 3, 5]))
    np.testing.assert_allclose(
        video[0, 0], F.interpolate(pictures, size=(6, 6), mode="bilinear", antialias=True), atol=1e-5
    )
    # Halving with antialiasing weighs four pixels a side 1 3 3 1: a flat mean of the middle, unlike every other pixel.
    weights = np.array([1, 3, 3, 1]) / 8
    middle = np.einsum("cij,i,j->c", pictures[0, :, 3:7, 3:7], weights, weights)
    np.testing.assert_allclose(video[0, 0, 0, :, 2, 2], middle, atol=1e-5)
    for wrong in ({"image_size": 0}, {"pad": -1}):
        with pytest.raises(ValueError, match="image_size, pad"):
            LabelledFrames(buffer, **FRAMES, **wrong)


def shifts_of(pictures, originals, pad):
    """The one shift (dy, dx) of each picture (C, h, w) that gives it from its original, edges repeated."""
    found = []
    for picture, original in zip(pictures, originals, strict=True):
        padded = np.pad(original, ((0, 0), (pad, pad), (pad, pad)), mode="edge")
        side = original.shape[-1]
        (match,) = [
            (dy - pad, dx - pad)
            for dy in range(2 * pad + 1)
            for dx in range(2 * pad + 1)
            if np.allclose(padded[:, dy : dy + side, dx : dx + side], picture, atol=1e-6)
        ]
        found.append(match)
    return found


def test_streams_shift_by_seed_and_index():
    buffer = buffer_of(count=60)
    data = LabelledFrames(buffer, frames=np.arange(60), classes="abc", pad=1)
    request = [(index, 11) for index in range(60)]
    first, other_seed, order, plain = data.stream(
        [request, [(i, 12) for i, _ in request], request[::-1][:5], [(i, None) for i, _ in request]]
    )
    originals = expected_pictures(buffer, np.arange(60))
    shifts = shifts_of(first["image"].numpy(), originals, pad=1)
    assert set(shifts) == {(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}  # every one, none more often than 15
    assert max(shifts.count(shift) for shift in shifts) <= 15
    assert shifts_of(other_seed["image"].numpy(), originals, pad=1) != shifts
    assert torch.equal(order["image"], first["image"].flip(0)[:5])  # whatever else is in the batch
    assert torch.equal(plain["image"], data.batch(np.arange(60))["image"])
    (mixed,) = data.stream([[(3, 11), (4, None)]])
    assert torch.equal(mixed["image"][0], first["image"][3]) and torch.equal(mixed["image"][1], plain["image"][4])
    assert first["label"].tolist() == plain["label"].tolist() == data.labels.tolist()


def test_all_frames_of_a_clip_are_shifted_alike():
    buffer = buffer_of(count=40)
    data = LabelledClips(buffer, starts=np.arange(30), frames=3, stride=2, classes="abc", pad=2)
    (batch,) = data.stream([[(index, 5) for index in range(30)]])
    (evaluation,) = data.stream([[(index, None) for index in range(30)]])
    assert batch["video"].shape == (30, 3, 3, 8, 8) and evaluation["video"].shape == (30, 1, 3, 3, 8, 8)
    clips = expected_pictures(buffer, np.arange(30)[:, None] + [0, 2, 4])
    shifts = [shifts_of(batch["video"][:, k].numpy(), clips[:, k], pad=2) for k in range(3)]
    assert shifts[0] == shifts[1] == shifts[2] and len(set(shifts[0])) > 8
    (smaller,) = LabelledClips(
        buffer, starts=np.arange(30), frames=3, stride=2, classes="abc", pad=2, image_size=4
    ).stream([[(0, 5)]])
    assert smaller["video"].shape == (1, 3, 3, 4, 4)


# Opening -----------------------------------------------------------------------------------------------------------


def label_set(path, *, values, ends, classes=("a", "b"), images=None, attributes=None, size=(6, 6, 3)):
    """A label set of task "kind" at ``path``, pictures whose pixels tell the frame."""
    total = ends[-1]
    pictures = np.broadcast_to(np.arange(1, total + 1, dtype=np.uint8).reshape(-1, *[1] * len(size)), (total, *size))
    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    with zarr.config.set({"array.write_empty_chunks": True}):
        root.create_array("data/label_kind", data=np.asarray(values))
        root.create_array("meta/episode_ends", data=np.asarray(ends))
        target = root if images is None else zarr.open_group(str(path.parent / images), mode="w", zarr_format=2)
        target.create_array("data/img", data=np.ascontiguousarray(pictures))
        if images is not None:
            target.create_array("meta/episode_ends", data=np.asarray(ends))
    about = {"classes": {"kind": list(classes)}} | ({} if images is None else {"images": images})
    root.attrs.update(about | (attributes or {}))
    return path


def frames_of(batch, key="image"):
    """Numbers of the frames, from the pixels of ``label_set``."""
    return ((batch[key][..., 0, 0, 0] + 1) * 127.5).round().int() - 1


@pytest.mark.parametrize("images", [None, "pictures.zarr", "below/pictures.zarr"])
@pytest.mark.parametrize("storage", ["ram", "mmap"])
def test_splits_share_no_episode_and_leave_out_frames_without_a_label(tmp_path, images, storage):
    values = np.tile([0, 1, -1, 1], 10)
    ends = np.arange(4, 41, 4)
    path = label_set(tmp_path / "set.zarr", values=values, ends=ends, images=images)
    options = {"val_ratio": 0.3, "seed": 5, "storage": storage, "cache_dir": tmp_path / "maps"}
    parts = {split: open_labelled(path, "kind", split=split, **options) for split in ("train", "test")}
    episodes = {}
    for split, data in parts.items():
        batch = data.batch(np.arange(len(data)))
        frames = frames_of(batch).numpy()
        np.testing.assert_array_equal(batch["label"], values[frames])
        np.testing.assert_array_equal(data.labels, values[frames])
        episodes[split] = set(frames // 4)
        assert len(data) == 3 * len(episodes[split]) and data.classes == ["a", "b"] and data.num_classes == 2
    assert len(episodes["train"]) == 7 and len(episodes["test"]) == 3
    assert episodes["train"] | episodes["test"] == set(range(10))
    assert (tmp_path / "maps").exists() == (storage == "mmap")
    other = open_labelled(path, "kind", split="test", **options | {"seed": 6})
    assert set(frames_of(other.batch(np.arange(len(other)))).numpy() // 4) != episodes["test"]
    assert len(open_labelled(path, "kind", split="test", **options | {"val_ratio": 0.5})) == 15
    resized = open_labelled(path, "kind", split="train", image_size=4, pad=3, **options)
    assert resized.batch([0])["image"].shape == (1, 3, 4, 4) and resized.pad == 3


def test_clips_end_with_their_episode(tmp_path):
    ends = np.array([6, 9, 20, 26, 40])
    values = np.arange(40) % 2
    values[[11, 12]] = -1
    path = label_set(tmp_path / "set.zarr", values=values, ends=ends, attributes={"span": {"kind": 5}})
    options = {"val_ratio": 0.4, "seed": 5}
    for split in ("train", "test"):
        data = open_labelled(path, "kind", split=split, clip={"frames": 3, "stride": 2}, **options)
        frames = frames_of(data.batch(np.arange(len(data))), "video")[:, 0].numpy()
        np.testing.assert_array_equal(np.diff(frames, axis=1), 2)
        np.testing.assert_array_equal(data.labels, values[frames[:, 0]])
        if split == "train":
            train = frames
        every = open_labelled(path, "kind", split=split, clip={"frames": 3, "stride": 2, "every": 3}, **options)
        np.testing.assert_array_equal(frames_of(every.batch(np.arange(len(every))), "video")[:, 0], frames[::3])
    starts = np.concatenate([train[:, 0], frames[:, 0]])
    assert sorted(starts) == [0, 1, 9, 10, 13, 14, 15, 20, 21, *range(26, 36)]
    good = {"frames": 3, "stride": 2}
    for clip in (None, good | {"stride": 1}, {"frames": 3}, good | {"pace": 1}, good | {"every": 0}):
        with pytest.raises(ValueError, match="clip"):
            open_labelled(path, "kind", split="train", clip=clip, **options)
    assert len(open_labelled(path, "kind", split="train", clip={"frames": 5, "stride": 1}, **options)) == len(train)


def test_balanced_takes_as_many_of_each_class(tmp_path):
    values = np.tile([0, 1, 1, 1, 1, -1], 12)
    path = label_set(tmp_path / "set.zarr", values=values, ends=np.arange(6, 73, 6))
    plain = open_labelled(path, "kind", split="train", val_ratio=0.25)
    data = open_labelled(path, "kind", split="train", val_ratio=0.25, balanced=True)
    assert np.bincount(plain.labels).tolist() == [9, 36] and np.bincount(data.labels).tolist() == [9, 9]
    frames = frames_of(data.batch(np.arange(18))).numpy()
    assert set(frames) < set(plain.frames) and (np.diff(frames) > 0).all()
    assert len(set(frames[data.labels == 1] // 6)) == 9  # from every episode


GOOD = {"values": [0, 1] * 6, "ends": [2, 4, 6, 8, 10, 12]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": [0, 2] * 6}, "data/label_kind: got 2 in frame 1"),
        ({"values": [0, -2] * 6}, "data/label_kind: got -2 in frame 1"),
        ({"values": [0, 0.5] * 6}, "data/label_kind: got 0.5 in frame 1"),
        ({"values": [0, 0] * 6}, "got no b of kind in split train"),
        ({"values": [0, 0] * 5 + [1, 1]}, "got no b of kind in split t"),
        ({"values": [0, 1] * 5}, "label: got 10 .* 12"),
        ({"attributes": {"classes": None}}, "set.zarr: got no attribute classes"),
        ({"attributes": {"classes": {"kinds": ["a", "b"]}}}, "task: got 'kind'"),
        ({"size": (6, 4, 3)}, r"data/img.* \(6, 4, 3\)"),
        ({"size": (6, 6, 1)}, r"data/img.* \(6, 6, 1\)"),
        ({"size": ()}, r"data/img.* \(\)"),
    ],
)
def test_what_is_no_label_set_is_named(tmp_path, changes, message):
    path = label_set(tmp_path / "set.zarr", **GOOD | changes)
    with pytest.raises(ValueError, match=message):
        open_labelled(path, "kind", split="train", val_ratio=0.5)


def test_missing_pictures_and_splits_are_named(tmp_path):
    path = label_set(tmp_path / "set.zarr", **GOOD, attributes={"images": "nowhere.zarr"})
    with pytest.raises(FileNotFoundError, match="nowhere.zarr"):
        open_labelled(path, "kind", split="train")
    path = label_set(tmp_path / "set.zarr", **GOOD)
    with pytest.raises(ValueError, match="split"):
        open_labelled(path, "kind", split="valid")
    with pytest.raises(ValueError, match="got no a, b of kind in split test"):
        open_labelled(path, "kind", split="train", val_ratio=0.0)
