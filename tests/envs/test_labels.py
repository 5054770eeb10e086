"""Pictures and clips whose classes the simulator knows: the labels, their cached sets, and the data sets of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr

from envs import make_data
from envs.pusht import scenes as pusht_scenes
from envs.pusht.env import keypoints, render_states
from envs.pusht.labels import MARGIN_DEGREES, MARGIN_PX, OCTANTS, SIDES, TURNS, labels, turns
from envs.pusht.scenes import ensure_images, ensure_scenes, sample_states
from envs.robomimic import clips, demos
from envs.shared import rendered_zarr
from policy.dataset import ReplayBuffer
from policy.dataset.labelled import LabelledClips, LabelledFrames, open_labelled


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Draw in this process, which starts much faster; the list counts the calls."""
    calls = []
    monkeypatch.setattr(rendered_zarr, "in_processes", lambda draw, jobs: (calls.append(len(jobs)), map(draw, jobs))[1])
    return calls


def scene(agent, angle=0.0, block=(256, 256)):
    """State of an agent at ``agent``, px from the T's origin along the T's own axes."""
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.concatenate([np.asarray(block) + turn @ agent, block, [angle]])


# Scenes: orientation -----------------------------------------------------------------------------------------------


def test_octants_are_the_direction_of_the_stem():
    """From the corners of the T, which know nothing of the angle; those near a border are left out."""
    states = sample_states(2000, np.random.default_rng(0))
    found = labels("octant", states)
    corners = keypoints(states)
    stem = corners[:, 5:7].mean(axis=1) - corners[:, 2:4].mean(axis=1)  # from the bar to the foot: down when upright
    clockwise = np.degrees(np.arctan2(-stem[:, 0], stem[:, 1])) % 360  # y points down
    border = np.abs((clockwise + 22.5) % 45 - 22.5)
    np.testing.assert_array_equal(found, np.where(border <= MARGIN_DEGREES, -1, clockwise // 45))
    assert found.dtype == np.int64 and set(found) == {-1, *range(8)} and 0.02 < (found == -1).mean() < 0.15


def test_octants_by_hand():
    angles = np.radians([5, 40, 50, 100, 315 + 20, -20, 44, 46, 359, 1])
    states = np.stack([scene((0, 200), angle) for angle in angles])
    names = [OCTANTS[i] if i >= 0 else None for i in labels("octant", states)]
    assert names == ["0-45", "0-45", "45-90", "90-135", "315-360", "315-360", None, None, None, None]


def test_a_t_turned_clockwise_is_so_in_the_picture():
    """At 90 degrees the foot, below the bar before, is at its left."""
    block_colour = render_states(scene((-150, -150))[None])[0, 50, 48]  # inside the bar
    upright, turned = render_states(np.stack([scene((-150, -150), angle) for angle in (0, np.pi / 2)]))
    rows, columns = np.nonzero((upright == block_colour).all(axis=-1))
    assert rows.max() > 256 / 512 * 96 + 15 and columns.min() > 30  # the stem hangs down
    rows, columns = np.nonzero((turned == block_colour).all(axis=-1))
    assert columns.min() < 256 / 512 * 96 - 15 and rows.max() < 66  # the stem points to the left


# Scenes: the nearest side ------------------------------------------------------------------------------------------


def outline(states, per_edge=400):
    """Dense points (n, 8, per_edge, 2) on the edges of the T in the world, in the order of SIDES."""
    corners = keypoints(states)[:, [3, 2, 1, 7, 6, 5, 4, 0]]  # round the T, from the upper left end of the bar
    share = (np.arange(per_edge) + 0.5)[:, None] / per_edge
    after = np.roll(corners, -1, axis=1)
    return corners[:, :, None] + share * (after - corners)[:, :, None]


def test_sides_are_nearest_on_a_densely_sampled_outline():
    states = sample_states(1500, np.random.default_rng(1))
    found = labels("side", states)
    distance = np.linalg.norm(outline(states) - states[:, None, None, :2], axis=-1).min(axis=2)  # (n, 8)
    best, second = np.sort(distance, axis=1)[:, :2].T
    clear = (second - best > 0.5) & (found >= 0)  # beside a corner both of its edges are as near
    assert 0.3 < clear.mean() < 0.9
    np.testing.assert_array_equal(found[clear], distance.argmin(axis=1)[clear])
    labelled = np.flatnonzero(found >= 0)
    assert (distance[labelled, found[labelled]] < best[labelled] + 0.5).all()
    assert set(found) == {-1, *range(8)} and 0.02 < (found == -1).mean() < 0.15


@pytest.mark.parametrize("angle", [0.0, 0.7, 3.0, 5.5])
def test_sides_by_hand_at_any_place_and_angle(angle):
    places = {
        "bar top": [(0, -40), (55, -40), (-70, -30)],
        "bar right end": [(90, 15), (90, -10), (90, 50)],
        "under the bar right": [(45, 50), (65, 60)],
        "stem right": [(40, 80), (40, 125)],
        "stem bottom": [(0, 150), (20, 150)],
        "stem left": [(-40, 80)],
        "under the bar left": [(-45, 50)],
        "bar left end": [(-90, 15)],
    }
    assert list(places) == SIDES
    for number, agents in enumerate(places.values()):
        for block in ((256, 256), (180.5, 300)):
            states = np.stack([scene(agent, angle, block) for agent in agents])
            assert labels("side", states).tolist() == [number] * len(agents)


def test_sides_near_another_one_are_left_out():
    """The borders: a line at 45 degrees from every outer corner, the bisector of every inner one."""
    across = np.array([1, -1]) / np.sqrt(2)  # of the border from the upper right corner, which runs along (1, -1)
    along = np.array([1, 1]) / np.sqrt(2)
    for corner, out, cross in (((60, 0), across, along), ((15, 30), along, across)):
        for share, left_out in ((0.9, True), (1.1, False)):
            agents = [np.array(corner) + 30 * out + sign * share * MARGIN_PX * cross for sign in (-1, 1)]
            found = labels("side", np.stack([scene(agent, 0.3) for agent in agents]))
            assert (found == -1).all() if left_out else len({-1, *found}) == 3


def test_unknown_task_of_scenes():
    with pytest.raises(ValueError, match="task: got 'touch', allowed: octant, side"):
        labels("touch", np.zeros((1, 5)))


# Clips: turns ------------------------------------------------------------------------------------------------------


def test_turns_frame_by_frame():
    """Against a loop over the clips, with angles that pass 360 degrees."""
    rng = np.random.default_rng(0)
    ends = np.array([30, 33, 80])
    states = np.zeros((80, 5), np.float32)
    speed = rng.choice([-3.0, 0.0, 3.0], 80) * (rng.random(80) < 0.7)
    states[:, 4] = np.radians(np.cumsum(np.convolve(speed, np.ones(4) / 2, "same")) + 355) % (2 * np.pi)
    found = turns(states, ends, span=6, still=2.0, turning=8.0)
    expected = []
    for i in range(80):
        end = ends[ends > i][0]
        path = [0.0]
        for j in range(i, min(i + 5, 79)):
            step = np.degrees(float(states[j + 1, 4]) - float(states[j, 4]))
            path.append(path[-1] + (step + 180) % 360 - 180)
        kind = 1 if path[-1] >= 8 else 0 if path[-1] <= -8 else 2 if max(path) - min(path) <= 2 else -1
        expected.append(kind if i + 6 <= end else -1)
    assert found.tolist() == expected and found.dtype == np.int64
    assert all((found == kind).sum() >= 3 for kind in (-1, 0, 1, 2)) and (found[30:33] == -1).all()
    assert np.ptp(states[:, 4]) > 6  # it did pass 360
    there_and_back = np.zeros((6, 5))
    there_and_back[2:4, 4] = 0.1
    assert set(turns(there_and_back, np.array([6]), span=6, still=2.0, turning=8.0)) == {-1}
    assert set(turns(there_and_back, np.array([6]), span=7, still=20.0, turning=30.0)) == {-1}  # too short


def test_the_picture_turns_as_the_class_says():
    """The foot of the T moves around the bar: counter-clockwise in the picture is to the right, hanging down."""
    states = np.stack([scene((-150, -150), angle) for angle in np.radians([0, -5, -10, -15, -20])])
    assert TURNS[turns(states, np.array([5]), span=5, still=1, turning=10)[0]] == "counter-clockwise"
    colour = render_states(scene((-150, -150))[None])[0, 50, 48]
    first, last = ((picture == colour).all(axis=-1) for picture in render_states(states[[0, -1]]))
    low = slice(62, None)  # rows of the stem
    assert np.nonzero(last[low])[1].mean() > np.nonzero(first[low])[1].mean() + 2


# Cached sets -------------------------------------------------------------------------------------------------------


def read(path):
    """({name: array}, attributes) of a label set."""
    root = zarr.open_group(zarr.storage.ZipStore(str(path), mode="r"), mode="r")
    names = [f"data/{name}" for name in root["data"].array_keys()] + ["meta/episode_ends"]
    return {name: root[name][:] for name in names}, root.attrs.asdict()


def test_scene_sets_hold_the_labels_of_their_pictures(tmp_path, in_this_process):
    path = make_data("pusht_labels", cache_dir=tmp_path, frames=6, seed=3, image_size=32)
    arrays, attributes = read(path)
    scenes = path.parent / attributes["images"]
    assert scenes == ensure_scenes(cache_dir=tmp_path, frames=6, seed=3, image_size=32)
    states = zarr.open_group(str(scenes), mode="r")["data/state"][:]
    assert set(arrays) == {"data/label_octant", "data/label_side", "meta/episode_ends"}
    for task, names in (("octant", OCTANTS), ("side", SIDES)):
        np.testing.assert_array_equal(arrays[f"data/label_{task}"], labels(task, states), strict=True)
        assert attributes["classes"][task] == names
    assert arrays["meta/episode_ends"].tolist() == [1, 2, 3, 4, 5, 6]
    stamp = path.stat().st_mtime_ns
    assert make_data("pusht_labels", cache_dir=tmp_path, frames=6, seed=3, image_size=32) == path
    assert path.stat().st_mtime_ns == stamp and len(in_this_process) == 1
    others = [{"frames": 7, "seed": 3}, {"frames": 6, "seed": 4}, {"frames": 6, "seed": 3, "image_size": 96}]
    assert len({make_data("pusht_labels", cache_dir=tmp_path, **options) for options in others} | {path}) == 4


def test_a_set_of_the_first_class_alone_is_whole(tmp_path):
    """zarr leaves out chunks of zeros, which a replay buffer takes for damage."""
    seed = next(s for s in range(99) if labels("octant", sample_states(1, np.random.default_rng(s))) == [0])
    path = make_data("pusht_labels", cache_dir=tmp_path, frames=1, seed=seed, image_size=8)
    buffer = ReplayBuffer.open(path, {"label": {"source": "label_octant", "type": "low_dim", "shape": ()}})
    assert buffer.arrays["label"].tolist() == [0]


def demonstrations(path, *, images=False, state=True, lengths=(20, 14, 20, 20, 20, 20)):
    """A zarr of episodes in which the block turns one way, then not, then the other way."""
    total = sum(lengths)
    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    degrees = 6 * np.concatenate([np.abs(np.clip(np.arange(n) - n / 2, -n / 4, n / 4)) * (-1) ** n for n in lengths])
    states = np.stack([scene((0, -60), angle) for angle in np.radians(degrees)]).astype(np.float32)
    if state:
        root.create_array("data/state", data=states)
    root.create_array("data/action", data=states[:, :2])
    root.create_array("meta/episode_ends", data=np.cumsum(lengths))
    if images:
        rng = np.random.default_rng(0)
        root.create_array("data/img", data=rng.integers(1, 255, (total, 12, 12, 3), dtype=np.uint8))
    return path


TURN_OPTIONS = {"frames": 3, "stride": 2, "image_size": 16}


def test_turn_sets_hold_the_labels_of_their_clips(tmp_path, in_this_process):
    source = demonstrations(tmp_path / "demos.zarr")
    path = make_data("pusht_turns", source=source, cache_dir=tmp_path / "cache", **TURN_OPTIONS)
    arrays, attributes = read(path)
    drawn = path.parent / attributes["images"]
    assert drawn == ensure_images(source, cache_dir=tmp_path / "cache", image_size=16)
    root = zarr.open_group(str(drawn), mode="r")
    ends = root["meta/episode_ends"][:]
    expected = turns(root["data/state"][:], ends, span=5, still=1.0, turning=10.0)
    np.testing.assert_array_equal(arrays["data/label_turn"], expected, strict=True)
    np.testing.assert_array_equal(arrays["meta/episode_ends"], ends)
    assert attributes["classes"] == {"turn": TURNS} and attributes["span"] == {"turn": 5}
    assert set(expected) == {-1, 0, 1, 2}
    assert make_data("pusht_turns", source=source, cache_dir=tmp_path / "cache", **TURN_OPTIONS) == path
    assert len(in_this_process) == 1


@pytest.mark.parametrize(
    "change", [{"frames": 4}, {"stride": 1}, {"still": 9.0}, {"turning": 20.0}, {"image_size": 24}]
)
def test_every_option_of_turns_makes_another_set(tmp_path, change):
    source = demonstrations(tmp_path / "demos.zarr")
    sets = [
        read(make_data("pusht_turns", source=source, cache_dir=tmp_path, **TURN_OPTIONS | options))
        for options in ({}, change)
    ]
    (first, about), (second, about_second) = sets
    if "image_size" in change:
        assert about["images"] != about_second["images"]
    else:
        assert (first["data/label_turn"] != second["data/label_turn"]).any()


def test_turns_of_a_set_with_images_point_to_it(tmp_path):
    source = demonstrations(tmp_path / "data" / "seen.zarr", images=True)
    path = make_data("pusht_turns", source=source, cache_dir=tmp_path / "cache", **TURN_OPTIONS)
    images = path.parent / read(path)[1]["images"]
    assert images.resolve() == source.resolve() and not list((tmp_path / "cache").glob("*px*"))
    demonstrations(source, images=True, lengths=(20, 20))  # other episodes under the same name
    assert make_data("pusht_turns", source=source, cache_dir=tmp_path / "cache", **TURN_OPTIONS) != path
    demonstrations(source, images=True, state=False)
    with pytest.raises(ValueError, match="seen.zarr: got no data/state to tell turns from"):
        make_data("pusht_turns", source=source, cache_dir=tmp_path / "cache", **TURN_OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 1}, "frames, stride: got 1, 2, allowed: frames >= 2"),
        ({"stride": 0}, "frames, stride: got 3, 0, allowed: .*stride >= 1"),
        ({"still": 5.0, "turning": 5.0}, "still, turning: got 5.0, 5.0 degrees, allowed: 0 <= still < turning"),
        ({"still": -1.0}, "still, turning: got -1.0"),
    ],
)
def test_wrong_options_of_turns(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_data("pusht_turns", source=tmp_path / "none", cache_dir=tmp_path, **TURN_OPTIONS | options)


def test_robomimic_clips_are_lift_and_can(tmp_path, monkeypatch):
    """Two demonstrations each, made without the simulator; their pictures and classes in order."""
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    asked, pictures = [], {}

    def ensure_demos(*, task, **options):
        asked.append((task, options))
        path = tmp_path / f"{task}_2episodes_seed5_v1.hdf5"
        with h5py.File(path, "w") as file:
            for number, length in enumerate((4, 3) if task == "lift" else (5, 2)):
                demo = file.create_group(f"data/demo_{number}")
                demo.attrs["num_samples"] = length
                image = rng.integers(0, 256, (length, 8, 8, 3), dtype=np.uint8)
                demo["obs/agentview_image"] = pictures[task, number] = image
                demo["obs/robot0_eye_in_hand_image"] = 255 - image
        return path

    monkeypatch.setattr(clips, "ensure_demos", ensure_demos)
    path = make_data("robomimic_clips", cache_dir=tmp_path, episodes=2, seed=5, image_size=8)
    arrays, attributes = read(path)
    assert [task for task, _ in asked] == ["lift", "can"] == attributes["classes"]["task"]
    assert asked[0][1] == asked[1][1] == {"cache_dir": tmp_path, "episodes": 2, "seed": 5, "image_size": 8}
    assert arrays["data/label_task"].tolist() == [0] * 7 + [1] * 7
    assert arrays["meta/episode_ends"].tolist() == [4, 7, 12, 14]
    images = zarr.open_group(str(path.parent / attributes["images"]), mode="r")["data/img"][:]
    np.testing.assert_array_equal(images, np.concatenate(list(pictures.values())))
    data = open_labelled(path, "task", split="train", clip={"frames": 2, "stride": 1}, val_ratio=0.5, seed=0)
    assert data.classes == ["lift", "can"] and set(data.labels) == {0, 1}


def test_robomimic_clips_without_robosuite(tmp_path, monkeypatch):
    def missing():
        raise ImportError("robosuite: is not installed")

    monkeypatch.setattr(demos, "installed_version", missing)
    with pytest.raises(ImportError, match="robosuite: is not installed"):
        make_data("robomimic_clips", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


# Data sets ---------------------------------------------------------------------------------------------------------


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
        with pytest.raises(ValueError, match="frames, stride: got .* allowed: >= 1"):
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
        with pytest.raises(ValueError, match="image_size, pad: got"):
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
    for clip, message in (
        (None, "clip: got one of 1 frames from first to last, allowed: 5"),
        ({"frames": 3, "stride": 1}, "clip: got one of 3 frames"),
        ({"frames": 3}, "clip: got frames, allowed: frames, stride and perhaps every"),
        ({"frames": 3, "stride": 2, "pace": 1}, "clip: got frames, stride, pace, allowed"),
        ({"frames": 3, "stride": 2, "every": 0}, "clip.every: got 0, allowed: >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
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
        ({"values": [0, 2] * 6}, "data/label_kind: got 2 in frame 1, allowed: -1 .none. to 1"),
        ({"values": [0, -2] * 6}, "data/label_kind: got -2 in frame 1, allowed"),
        ({"values": [0, 0.5] * 6}, "data/label_kind: got 0.5 in frame 1, allowed"),
        ({"values": [0, 0] * 6}, "got no b of kind in split train, allowed: every class in both"),
        ({"values": [0, 0] * 5 + [1, 1]}, "got no b of kind in split t"),
        ({"values": [0, 1] * 5}, "label: got 10 frames, allowed: 12"),
        ({"attributes": {"classes": None}}, "set.zarr: got no attribute classes, allowed: a label set"),
        ({"attributes": {"classes": {"kinds": ["a", "b"]}}}, "task: got 'kind' .did you mean 'kinds'"),
        ({"size": (6, 4, 3)}, r"data/img: got shape per frame \(6, 4, 3\), allowed: \(s, s, 3\)"),
        ({"size": (6, 6, 1)}, r"data/img: got shape per frame \(6, 6, 1\), allowed"),
        ({"size": ()}, r"data/img: got shape per frame \(\), allowed"),
    ],
)
def test_what_is_no_label_set_is_named(tmp_path, changes, message):
    path = label_set(tmp_path / "set.zarr", **GOOD | changes)
    with pytest.raises(ValueError, match=message):
        open_labelled(path, "kind", split="train", val_ratio=0.5)


def test_missing_pictures_and_splits_are_named(tmp_path):
    path = label_set(tmp_path / "set.zarr", **GOOD, attributes={"images": "nowhere.zarr"})
    with pytest.raises(FileNotFoundError, match="data set: got .*nowhere.zarr, which does not exist"):
        open_labelled(path, "kind", split="train")
    path = label_set(tmp_path / "set.zarr", **GOOD)
    with pytest.raises(ValueError, match="split: got 'valid', allowed: test, train"):
        open_labelled(path, "kind", split="valid")
    with pytest.raises(ValueError, match="got no a, b of kind in split test"):
        open_labelled(path, "kind", split="train", val_ratio=0.0)


def test_embedded_sets_open_from_end_to_end(tmp_path, monkeypatch):
    """As a command would: maker, then data set, both tasks and both splits, clips and pictures."""
    monkeypatch.setattr(pusht_scenes, "CHUNK", 64)
    path = make_data("pusht_labels", cache_dir=tmp_path, frames=150, image_size=16)
    states = zarr.open_group(str(ensure_scenes(cache_dir=tmp_path, frames=150, image_size=16)), mode="r")["data/state"]
    drawn = render_states(states[:], image_size=16)
    for task in ("octant", "side"):
        wanted = labels(task, states[:])
        for split in ("train", "test"):
            data = open_labelled(path, task, split=split, val_ratio=0.4)
            batch = data.batch(np.arange(len(data)))
            np.testing.assert_array_equal(wanted[data.frames], batch["label"])
            np.testing.assert_allclose(batch["image"], drawn[data.frames].transpose(0, 3, 1, 2) / 127.5 - 1, atol=1e-6)
    source = demonstrations(tmp_path / "demos.zarr")
    path = make_data("pusht_turns", source=source, cache_dir=tmp_path, **TURN_OPTIONS)
    data = open_labelled(path, "turn", split="train", clip={"frames": 3, "stride": 2}, val_ratio=0.5)
    assert data.batch([0, 1])["video"].shape == (2, 1, 3, 3, 16, 16) and data.classes == TURNS
