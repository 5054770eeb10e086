"""zarrs that are truncated, damaged, hostile, or of codecs that are not installed, and honest ones that look so."""

import bz2
import gzip
import json
import lzma
import zipfile
import zlib

import numcodecs
import numpy as np
import pytest
import zarr
from robomimic_files import CAMERAS, make_hdf5

from envs.shared.rendered_zarr import write_rendered
from envs.shared.zarr_files import write_zarr
from policy.dataset import ReplayBuffer
from policy.dataset.robomimic import convert

FRAMES, CHUNK = 30, 7
SOURCES = {
    "image": {"source": "img", "shape": [3, 8, 6], "type": "rgb"},
    "action": {"source": "action", "shape": [2], "type": "low_dim"},
}


def recorded():
    rng = np.random.default_rng(0)
    return {
        "data/img": rng.integers(1, 256, (FRAMES, 8, 6, 3), dtype=np.uint8),
        "data/action": rng.normal(size=(FRAMES, 2)),
        "meta/episode_ends": np.array([7, 12, FRAMES]),
    }


def write(path, arrays, zarr_format=2, **options):
    root = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)
    for name, values in arrays.items():
        extra = options if name != "meta/episode_ends" else {}
        root.create_array(name, data=values, chunks=(CHUNK, *values.shape[1:]), **extra)
    return path


def read(path, **specs):
    """The arrays at ``path``; specs: additions to those of SOURCES."""
    sources = {key: {**spec, **specs.get(key, {})} for key, spec in SOURCES.items()}
    return ReplayBuffer.open(path, sources).arrays


def describe(path, name, **changes):
    """Change the description of an array of format 2."""
    file = path / name / ".zarray"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# Chunks that are not stored ------------------------------------------------------------------------------------------


def with_zeros(name, frames=slice(CHUNK, 2 * CHUNK)):
    arrays = recorded()
    arrays[name][frames] = 0
    return arrays


def test_zeros_that_zarr_3_leaves_out_are_read_and_said(tmp_path, capsys):
    arrays = with_zeros("data/action")
    path = write(tmp_path / "demos.zarr", arrays, zarr_format=3)
    assert not (path / "data/action/c/1/0").exists()
    np.testing.assert_array_equal(read(path)["action"], arrays["data/action"].astype(np.float32))
    assert "data/action: 1 of its chunks" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "zarr_format"), [("data/img", 2), ("data/img", 3), ("data/action", 2)])
def test_a_missing_chunk_is_refused_where_damage_is_likelier_until_the_task_says_otherwise(tmp_path, name, zarr_format):
    arrays = with_zeros(name)
    path = write(tmp_path / "demos.zarr", arrays, zarr_format=zarr_format)
    key = "image" if name == "data/img" else "action"
    with pytest.raises(ValueError, match=f"{name}: got 4 of 5 chunks.*{key}: {{missing: fill}}"):
        read(path)
    found = read(path, **{key: {"missing": "fill"}})
    np.testing.assert_array_equal(found[key], arrays[name].astype(found[key].dtype))
    with pytest.raises(ValueError, match=f"{key}.missing"):
        read(path, **{key: {"missing": "zeros"}})


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("name", ["data/img", "data/action", "meta/episode_ends"])
def test_an_array_of_no_chunk_at_all_is_refused(tmp_path, name, zarr_format):
    path = write(tmp_path / "demos.zarr", recorded(), zarr_format=zarr_format)
    for file in (path / name).rglob("*"):
        if file.is_file() and not file.name.startswith((".z", "zarr.json")):
            file.unlink()
    with pytest.raises(ValueError, match=f"{name}: got 0 of"):
        read(path)


def test_shards_may_lack_chunks_of_zeros(tmp_path):
    """A shard is written whole, with a list of what it holds."""
    arrays = with_zeros("data/img")
    path = write(tmp_path / "demos.zarr", arrays, zarr_format=3)
    root = zarr.open_group(str(path), mode="r+")
    options = {"chunks": (CHUNK, 8, 6, 3), "shards": (2 * CHUNK, 8, 6, 3), "overwrite": True}
    root.create_array("data/img", data=arrays["data/img"], **options)
    np.testing.assert_array_equal(read(path)["image"], arrays["data/img"], strict=True)
    (path / "data/img/c/1/0/0/0").unlink()
    with pytest.raises(ValueError, match="data/img: got 2 of 3 chunks"):
        read(path)


def test_a_folder_in_the_place_of_a_chunk_is_a_missing_chunk(tmp_path):
    path = write(tmp_path / "demos.zarr", recorded())
    (path / "data/img/1.0.0.0").unlink()
    (path / "data/img/1.0.0.0").mkdir()
    with pytest.raises(ValueError, match="data/img: got 4 of 5 chunks"):
        read(path)


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data/img", "data/action", "meta/episode_ends"])
@pytest.mark.parametrize("frames", [0, 10**6, 10**12])
def test_shapes_beyond_the_chunks_are_refused(tmp_path, name, frames):
    path = write(tmp_path / "demos.zarr", recorded())
    describe(path, name, shape=[frames, *recorded()[name].shape[1:]])
    with pytest.raises(ValueError, match=r"image|action|episode_ends"):
        read(path)


@pytest.mark.parametrize("frames", [10**9, 10**12])
def test_shapes_and_ends_that_agree_are_compared_with_what_is_stored(tmp_path, frames):
    """As missing chunks may be meant, in format 3: by their number, and by bytes."""
    arrays = {"data/action": recorded()["data/action"], "meta/episode_ends": np.array([7, frames])}
    path = write(tmp_path / "demos.zarr", arrays, zarr_format=3)
    file = path / "data/action/zarr.json"
    for chunk in (CHUNK, frames // 1000):
        text = json.loads(file.read_text()) | {"shape": [frames, 2]}
        text["chunk_grid"]["configuration"]["chunk_shape"] = [chunk, 2]
        file.write_text(json.dumps(text))
        with pytest.raises(ValueError, match="data/action"):
            ReplayBuffer.open(path, {"action": SOURCES["action"]})


@pytest.mark.parametrize("chunks", [[0, 8, 6, 3], [-7, 8, 6, 3], [10**10, 8, 6, 3]])
def test_impossible_chunks_are_refused(tmp_path, chunks):
    path = write(tmp_path / "demos.zarr", recorded())
    describe(path, "data/img", chunks=chunks)
    with pytest.raises(ValueError, match="data/img"):
        read(path)


BOMBS = {
    "zlib": (numcodecs.Zlib(), zlib.compress),
    "gzip": (numcodecs.GZip(), gzip.compress),
    "bz2": (numcodecs.BZ2(), bz2.compress),
    "lzma": (numcodecs.LZMA(), lambda data: lzma.compress(data, preset=0)),
    "zstd": (numcodecs.Zstd(), numcodecs.Zstd().encode),
    "lz4": (numcodecs.LZ4(), numcodecs.LZ4().encode),
    "blosc": (numcodecs.Blosc(), numcodecs.Blosc("zstd").encode),
}


@pytest.mark.parametrize("codec", BOMBS)
def test_a_chunk_that_decompresses_to_far_more_than_it_may_is_refused(tmp_path, codec):
    """And honest chunks of the same codec are read."""
    compressor, compress = BOMBS[codec]
    path = write(tmp_path / "demos.zarr", recorded(), compressors=compressor)
    np.testing.assert_array_equal(read(path)["image"], recorded()["data/img"], strict=True)
    (path / "data/img/1.0.0.0").write_bytes(compress(bytes(40 << 20)))
    with pytest.raises(ValueError, match="data/img.* bytes when decompressed"):
        read(path)


def test_a_member_of_a_zip_that_is_a_bomb_is_refused(tmp_path):
    path = tmp_path / "demos.zarr.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in write(tmp_path / "demos.zarr", recorded()).rglob("*"):
            if name.is_file():
                file.write(name, name.relative_to(tmp_path / "demos.zarr"))
        file.writestr("data/img/9.0.0.0", bytes(80 << 20))
    with pytest.raises(ValueError, match=r"demos.zarr.zip.*data/img/9.0.0.0"):
        read(path)


def test_what_memory_cannot_hold_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "demos.zarr", recorded())
    monkeypatch.setattr("policy.dataset.replay_buffer.free_memory", lambda: 1000)
    with pytest.raises(ValueError, match="data/img.*storage=mmap"):
        read(path)


# Codecs and checksums ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["imagecodecs_jpegxl", "imagecodecs_jpeg", "jpegs"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_codec_that_is_not_installed_names_its_package(tmp_path, codec, zarr_format):
    """Other arrays are read all the same."""
    path = write(tmp_path / "demos.zarr", recorded(), zarr_format=zarr_format)
    if zarr_format == 2:
        describe(path, "data/img", compressor={"id": codec})
    else:
        file = path / "data/img/zarr.json"
        text = json.loads(file.read_text())
        text["codecs"][-1] = {"name": codec, "configuration": {}}
        file.write_text(json.dumps(text))
    package = "pip install imagecodecs" if codec.startswith("imagecodecs") else "package"
    with pytest.raises(ValueError, match=f"data/img.*{codec}.*{package}"):
        read(path)
    ReplayBuffer.open(path, {"action": SOURCES["action"]})
    with pytest.raises(ValueError, match="no data/nothing.*allowed: action, img"):
        ReplayBuffer.open(path, {"x": {**SOURCES["action"], "source": "nothing"}})


@pytest.mark.parametrize("description", ["[" * 100_000, "{", "null", "[]", "\xff"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_descriptions_that_are_none_are_named(tmp_path, description, zarr_format):
    path = write(tmp_path / "demos.zarr", recorded(), zarr_format=zarr_format)
    file = path / "data/img" / (".zarray" if zarr_format == 2 else "zarr.json")
    file.write_bytes(description.encode("latin1"))
    with pytest.raises(ValueError, match="data/img"):
        read(path)


def draw(job):
    return {"img": recorded()["data/img"]}


def test_every_flipped_bit_of_what_we_write_is_found(tmp_path, monkeypatch):
    """Pictures that were drawn, arrays in general, and what was converted."""
    monkeypatch.setattr("envs.shared.rendered_zarr.in_processes", lambda draw, jobs: map(draw, jobs))
    arrays = recorded()
    others = {"action": arrays["data/action"]}
    ends = arrays["meta/episode_ends"]
    options = {"frames": FRAMES, "arrays": others, "episode_ends": ends, "description": None}
    write_rendered(tmp_path / "drawn.zarr", draw, [None], **options)
    write_zarr(tmp_path / "written.zarr", arrays, {})
    convert(make_hdf5(tmp_path / "in.hdf5", lengths=(FRAMES,)), tmp_path / "converted.zarr")
    converted = {
        "image": {"source": CAMERAS[0], "shape": [3, 8, 8], "type": "rgb"},
        "action": {**SOURCES["action"], "shape": [10]},
    }
    rng = np.random.default_rng(0)
    for path, sources in {"drawn.zarr": SOURCES, "written.zarr": SOURCES, "converted.zarr": converted}.items():
        path = tmp_path / path
        ReplayBuffer.open(path, sources)
        names = ["meta/episode_ends", *(f"data/{spec['source']}" for spec in sources.values())]
        folders = [path / name for name in names]
        chunks = [file for folder in folders for file in folder.iterdir() if not file.name.startswith(".z")]
        assert len(chunks) == 3
        for chunk in chunks:
            content = chunk.read_bytes()
            for position in rng.integers(len(content), size=8):
                damaged = bytearray(content)
                damaged[position] ^= 1 << rng.integers(8)
                chunk.write_bytes(damaged)
                with pytest.raises(ValueError, match="cannot be decoded"):
                    ReplayBuffer.open(path, sources)
            chunk.write_bytes(content)
