"""Reading demonstrations: every layout gives the same arrays, and every defect is named."""

import shutil

import numpy as np
import pytest
import zarr

from policy.dataset import ReplayBuffer, replay_buffer

ENDS = [7, 12, 30]
FRAMES = ENDS[-1]
SOURCES = {
    "image": {"source": "img", "shape": [3, 8, 6], "type": "rgb"},
    "agent_pos": {"source": "state", "shape": [2], "type": "low_dim", "columns": [3, 0]},
    "action": {"source": "action", "shape": [2], "type": "low_dim"},
}


def recorded(image_type="float32"):
    """Arrays by their path in the zarr, as the published data have them; chunks do not divide the frames."""
    rng = np.random.default_rng(0)
    return {
        "data/img": rng.integers(0, 256, (FRAMES, 8, 6, 3)).astype(image_type),
        "data/state": rng.normal(size=(FRAMES, 5)).astype(np.float32),
        "data/action": rng.normal(size=(FRAMES, 2)),
        "meta/episode_ends": np.array(ENDS),
    }


def write(path, arrays, zarr_format=2):
    """A zarr folder, or a .zip if ``path`` is called so, with ``arrays`` in chunks of seven frames."""
    store = zarr.storage.ZipStore(str(path), mode="w") if path.suffix == ".zip" else str(path)
    root = zarr.open_group(store, mode="w", zarr_format=zarr_format)
    for name, values in arrays.items():
        root.create_array(name, data=values, chunks=(7, *values.shape[1:]))
    if path.suffix == ".zip":
        store.close()
    return path


@pytest.fixture
def folder(tmp_path):
    """The recorded arrays as a zarr folder of format 2."""
    return write(tmp_path / "demos.zarr", recorded())


def assert_recorded(buffer):
    expected = recorded()
    np.testing.assert_array_equal(buffer.arrays["image"], expected["data/img"].astype(np.uint8), strict=True)
    np.testing.assert_array_equal(buffer.arrays["agent_pos"], expected["data/state"][:, [3, 0]], strict=True)
    np.testing.assert_array_equal(buffer.arrays["action"], expected["data/action"].astype(np.float32), strict=True)
    np.testing.assert_array_equal(buffer.episode_ends, ENDS)
    assert (buffer.num_frames, buffer.num_episodes) == (FRAMES, 3)


@pytest.mark.parametrize("storage", ["ram", "mmap"])
@pytest.mark.parametrize("name", ["demos.zarr", "demos.zarr.zip"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_every_layout_and_storage_gives_the_recorded_arrays(tmp_path, monkeypatch, zarr_format, name, storage):
    path = write(tmp_path / name, recorded(), zarr_format)
    for block_bytes in (64 << 20, 1):  # all frames at once, and one chunk at a time
        monkeypatch.setattr(replay_buffer, "BLOCK_BYTES", block_bytes)
        buffer = ReplayBuffer.open(path, SOURCES, storage=storage, cache_dir=tmp_path / f"cache{block_bytes}")
        assert_recorded(buffer)
    if storage == "mmap":
        assert all(isinstance(array, np.memmap) and not array.flags.writeable for array in buffer.arrays.values())


def test_float_pixels_are_rounded_to_uint8_and_uint8_ones_stay(tmp_path):
    exact = np.array([0, 0.4, 0.6, 254.4, 254.6, 255])
    arrays = {**recorded(), "data/img": np.resize(exact, (FRAMES, 8, 6, 3)).astype(np.float32)}
    image = ReplayBuffer.open(write(tmp_path / "float.zarr", arrays), SOURCES).arrays["image"]
    assert image.dtype == np.uint8 and image.flatten()[:6].tolist() == [0, 0, 1, 254, 255, 255]
    arrays = recorded(image_type="uint8")
    image = ReplayBuffer.open(write(tmp_path / "bytes.zarr", arrays), SOURCES).arrays["image"]
    np.testing.assert_array_equal(image, arrays["data/img"], strict=True)


IN_UNIT_RANGE = {  # images from 0 to 1, of whichever type, would be black or one of 255 levels bright
    "float": np.linspace(0, 1, FRAMES * 144),
    "overshooting": np.linspace(0, 1.04, FRAMES * 144),
    "bool": np.arange(FRAMES * 144) % 2 == 1,
    "integer": np.arange(FRAMES * 144) % 2,
}


@pytest.mark.parametrize("storage", ["ram", "mmap"])
@pytest.mark.parametrize("values", IN_UNIT_RANGE.values(), ids=IN_UNIT_RANGE)
def test_images_from_0_to_1_are_refused(tmp_path, monkeypatch, values, storage):
    monkeypatch.setattr(replay_buffer, "BLOCK_BYTES", 1)
    images = values.reshape(FRAMES, 8, 6, 3)
    path = write(tmp_path / "demos.zarr", {**recorded(), "data/img": images})
    with pytest.raises(ValueError, match=rf"data/img: got images as {images.dtype}.*uint8"):
        ReplayBuffer.open(path, SOURCES, storage=storage, cache_dir=tmp_path / "cache")


def test_dark_images_are_read(tmp_path):
    """uint8 whatever they show; of other types where one pixel of all frames tells their range."""
    black = np.zeros((FRAMES, 8, 6, 3), np.uint8)
    with zarr.config.set({"array.write_empty_chunks": True}):
        image = ReplayBuffer.open(write(tmp_path / "u1.zarr", {**recorded(), "data/img": black}), SOURCES)
        dark = black.astype(np.float32)
        dark[25, 0, 0, 0] = 2
        assert not image.arrays["image"].any()
        image = ReplayBuffer.open(write(tmp_path / "f4.zarr", {**recorded(), "data/img": dark}), SOURCES)
        np.testing.assert_array_equal(image.arrays["image"], dark.astype(np.uint8), strict=True)


@pytest.mark.parametrize("ends", [[7.0, 12, 30], np.array([7, 12, 30], "u1")])
def test_whole_episode_ends_of_any_type_are_read(tmp_path, ends):
    path = write(tmp_path / "demos.zarr", {**recorded(), "meta/episode_ends": np.asarray(ends)})
    assert_recorded(ReplayBuffer.open(path, SOURCES))


@pytest.mark.parametrize("ends", [[7.5, 12, 30], [7, 12, 30.25], [7, np.nan, 30], [7, np.inf], [-1.0, 30]])
def test_episode_ends_that_are_no_whole_numbers_are_refused(tmp_path, ends):
    arrays = {name: values for name, values in recorded().items() if name.startswith("data")}
    path = write(tmp_path / "demos.zarr", {**arrays, "meta/episode_ends": np.asarray(ends, np.float64)})
    with pytest.raises(ValueError, match="episode_ends"):
        ReplayBuffer.open(path, SOURCES)
    with pytest.raises(ValueError, match="episode_ends"):
        ReplayBuffer({"action": np.zeros((30, 2))}, ends)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("name", ["demos.zarr", "demos.zarr.zip"])
def test_a_memory_map_is_decoded_again_only_when_the_source_changed(tmp_path, monkeypatch, zarr_format, name):
    path, cache = write(tmp_path / name, recorded(), zarr_format), tmp_path / "cache"
    decoded = []
    decode_all = replay_buffer._decode_all

    def counting(array, *arguments):
        decoded.append(array.path)
        return decode_all(array, *arguments)

    monkeypatch.setattr(replay_buffer, "_decode_all", counting)

    def action():
        return ReplayBuffer.open(path, SOURCES, storage="mmap", cache_dir=cache).arrays["action"]

    first = action()
    assert sorted(decoded) == ["data/action", "data/img", "data/state"]
    assert_recorded(ReplayBuffer.open(path, SOURCES, storage="mmap", cache_dir=cache))
    assert len(decoded) == 3
    if path.suffix == ".zip":
        write(path, {**recorded(), "data/action": -first.astype(np.float64)}, zarr_format)
    else:
        zarr.open_group(str(path), mode="r+")["data/action"][:] = -first  # no new file, only new chunks
    np.testing.assert_array_equal(action(), -first)
    np.testing.assert_array_equal(action(), -first)
    assert decoded[3:] == (["data/img", "data/state", "data/action"] if path.suffix == ".zip" else ["data/action"])


def test_the_same_array_read_as_image_and_as_numbers_has_two_memory_maps(folder, tmp_path):
    as_numbers = {"x": {"source": "img", "shape": [8, 6, 3], "type": "low_dim"}}
    for sources, kind in ((SOURCES, np.uint8), (as_numbers, np.float32)):
        buffer = ReplayBuffer.open(folder, sources, storage="mmap", cache_dir=tmp_path / "cache")
        assert next(iter(buffer.arrays.values())).dtype == kind


def test_a_failed_decoding_leaves_nothing_in_the_cache(folder, tmp_path):
    zarr.open_group(str(folder), mode="r+")["data/action"][20, 1] = np.nan
    only_action = {"action": SOURCES["action"]}
    with pytest.raises(ValueError, match="NaN"):
        ReplayBuffer.open(folder, only_action, storage="mmap", cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def _set(name, index, value):
    def change(path):
        zarr.open_group(str(path), mode="r+")[name][index] = value

    return change


def _replace(name, values):
    def change(path):
        zarr.open_group(str(path), mode="r+").create_array(name, data=np.asarray(values), overwrite=True)

    return change


def _remove(name):
    return lambda path: shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()


def _overwrite(name, content):
    return lambda path: (path / name).write_bytes(content)


DEFECTS = {  # name: (change, what the error names)
    "pixels above": (_set("data/img", (25, 0, 0, 0), 255.5), "data/img.* frames 21 to 27"),
    "pixels below": (_set("data/img", (0, 0, 0, 0), -1), "data/img"),
    "pixels not finite": (_set("data/img", (0, 0, 0, 0), np.nan), "data/img"),
    "NaN": (_set("data/action", (23, 1), np.nan), "data/action.* frame 23"),
    "inf": (_set("data/state", (8, 0), -np.inf), "data/state.* frame 8"),
    "beyond float32": (_set("data/action", (23, 1), 1e39), "data/action.* frame 23"),
    "ends of bool": (_replace("meta/episode_ends", np.array([True])), "episode_ends"),
    "no frame axis": (_replace("data/action", np.array(1.0)), "data/action"),
    "no episode_ends": (_remove("meta"), "got no meta/episode_ends"),
    "missing key": (_remove("data/state"), "got no data/state for 'agent_pos', allowed: action, img$"),
    "no data": (_remove("data"), "got no data/img for 'image'"),
    "image shape": (_replace("data/img", np.zeros((FRAMES, 9, 6, 3))), r"img.*\(9, 6, 3\).*\(8, 6, 3\)"),
    "action shape": (_replace("data/action", np.ones((FRAMES, 3))), r"action.*\(3,\).*\(2,\)"),
    "too few columns": (_replace("data/state", np.ones((FRAMES, 3))), r"state.*\(3,\).*\[3, 0\]"),
    "no numbers": (_replace("data/action", np.full((FRAMES, 2), "x")), "data/action: got type"),
    "too few frames": (_replace("data/action", np.ones((FRAMES - 1, 2))), "action: got 29 .* 30"),
    "too many frames": (_replace("data/action", np.ones((FRAMES + 1, 2))), "action: got 31 .* 30"),
    "empty episode": (_replace("meta/episode_ends", [7, 7, 30]), "episode_ends: got 7 at position 1"),
    "falling ends": (_replace("meta/episode_ends", [7, 5, 30]), "episode_ends: got 5 at position 1"),
    "zero first": (_replace("meta/episode_ends", [0, 5, 30]), "episode_ends: got 0 at position 0"),
    "no episode": (_replace("meta/episode_ends", np.empty(0, int)), r"episode_ends: got shape \(0,\)"),
    "ends shape": (_replace("meta/episode_ends", [[30]]), r"episode_ends: got shape \(1, 1\)"),
    "ends too large": (_replace("meta/episode_ends", [7, 31]), "got 30 .* 31"),
    "missing chunk": (_remove("data/img/3.0.0.0"), "data/img: got 4 of 5 chunks"),
    "corrupt chunk": (_overwrite("data/action/1.0", b"garbage"), "data/action: got a chunk"),
    "empty chunk": (_overwrite("data/img/1.0.0.0", b""), "data/img: got a chunk"),
    "corrupt ends": (_overwrite("meta/episode_ends/0", b"garbage"), "episode_ends: got a chunk"),
    "corrupt description": (_overwrite("data/img/.zarray", b"{"), "data/img: got a description"),
    "corrupt group": (_overwrite(".zgroup", b"{"), "demos.zarr"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_named(folder, monkeypatch, defect):
    change, message = DEFECTS[defect]
    monkeypatch.setattr(replay_buffer, "BLOCK_BYTES", 1)  # chunk by chunk, as large arrays are read
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        ReplayBuffer.open(folder, SOURCES)
    assert str(folder) in str(caught.value)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.zarr"):
        ReplayBuffer.open(tmp_path / "nowhere.zarr", SOURCES)


@pytest.mark.parametrize("kind", ["empty folder", "text file", "zip without zarr", "truncated zip", "no zip"])
def test_what_is_no_zarr_is_named(folder, tmp_path, kind):
    path = tmp_path / ("other" if kind in ("empty folder", "text file") else "other.zip")
    if kind == "empty folder":
        path.mkdir()
    elif kind == "zip without zarr":
        shutil.make_archive(str(path.with_suffix("")), "zip", tmp_path, "demos.zarr")  # one folder too deep
    elif kind == "truncated zip":
        shutil.make_archive(str(path.with_suffix("")), "zip", folder)
        path.write_bytes(path.read_bytes()[:-200])
    else:
        path.write_text("not a data set")
    with pytest.raises(ValueError, match="other"):
        ReplayBuffer.open(path, SOURCES)


@pytest.mark.parametrize(("storage", "cache_dir"), [("disk", "x"), ("mmap", None)])
def test_storage_is_checked(folder, storage, cache_dir):
    with pytest.raises(ValueError, match="storage"):
        ReplayBuffer.open(folder, SOURCES, storage=storage, cache_dir=cache_dir)
