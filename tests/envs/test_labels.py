"""Pictures and clips whose classes the simulator knows: the labels, their cached sets, and the data sets of them."""

import numpy as np
import pytest
import zarr

from envs import make_data
from envs.pusht import scenes as pusht_scenes
from envs.pusht.env import keypoints, render_states
from envs.pusht.labels import MARGIN_DEGREES, MARGIN_PX, OCTANTS, SIDES, TURNS, labels, turns
from envs.pusht.scenes import ensure_images, ensure_scenes, sample_states
from envs.robomimic import clips, demos
from envs.shared import rendered_zarr
from policy.dataset import ReplayBuffer
from policy.dataset.labelled import open_labelled


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
    assert OCTANTS[labels("octant", scene((0, 200), np.radians(-20))[None])[0]] == "315-360"
    with pytest.raises(ValueError, match="task"):
        labels("touch", states)


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


def test_every_option_of_turns_makes_another_set(tmp_path):
    source = demonstrations(tmp_path / "demos.zarr")
    sets = set()
    for change in ({}, {"frames": 4}, {"stride": 1}, {"still": 9.0}, {"turning": 20.0}, {"image_size": 24}):
        path = make_data("pusht_turns", source=source, cache_dir=tmp_path, **TURN_OPTIONS | change)
        arrays, attributes = read(path)
        sets.add((path, attributes["images"], arrays["data/label_turn"].tobytes()))
    assert [len(set(column)) for column in zip(*sets, strict=True)] == [6, 2, 5]  # paths, pictures, labels


def test_turns_of_a_set_with_images_point_to_it(tmp_path):
    source = demonstrations(tmp_path / "data" / "seen.zarr", images=True)
    path = make_data("pusht_turns", source=source, cache_dir=tmp_path / "cache", **TURN_OPTIONS)
    images = path.parent / read(path)[1]["images"]
    assert images.resolve() == source.resolve() and not list((tmp_path / "cache").glob("*px*"))
    demonstrations(source, images=True, lengths=(20, 20))  # other episodes under the same name
    assert make_data("pusht_turns", source=source, cache_dir=tmp_path / "cache", **TURN_OPTIONS) != path
    demonstrations(source, images=True, state=False)
    with pytest.raises(ValueError, match="seen.zarr: got no data/state"):
        make_data("pusht_turns", source=source, cache_dir=tmp_path / "cache", **TURN_OPTIONS)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("frames", {"frames": 1}),
        ("stride", {"stride": 0}),
        ("turning", {"still": 5.0, "turning": 5.0}),
        ("still", {"still": -1.0}),
    ],
)
def test_wrong_options_of_turns(tmp_path, key, options):
    with pytest.raises(ValueError, match=key):
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
    with pytest.raises(ImportError, match="robosuite"):
        make_data("robomimic_clips", cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


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
