"""robomimic's HDF5 as we write and open it: checksums, and damage on which the HDF5 library itself would hang."""

import time

import h5py
import numpy as np
import pytest

from envs.robomimic.hdf5 import new_file, open_file, write_part


def test_every_flipped_bit_of_the_data_that_we_write_is_found(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "part.hdf5"
    datasets = {
        "actions": rng.normal(size=(5, 7)),
        "obs/agentview_image": rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8),
    }
    write_part(path, datasets)
    with h5py.File(path) as file:
        spans = [file[f"demo/{name}"].id.get_chunk_info(0) for name in datasets]
        assert all((file[f"demo/{name}"][()] == values).all() for name, values in datasets.items())
    content = path.read_bytes()
    for name, span in zip(datasets, spans, strict=True):
        for position in span.byte_offset + rng.integers(span.size, size=4):
            damaged = bytearray(content)
            damaged[position] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="part.hdf5"), open_file(path) as file:
                file[f"demo/{name}"][()]


@pytest.mark.slow
def test_a_file_on_which_the_library_never_ends_is_refused(tmp_path):
    """Free space of no size in the heap of the attributes' words: the library looks behind it for ever."""
    path = tmp_path / "in.hdf5"
    with new_file(path, env_args={"words": "x" * 100}, arguments={}):
        pass
    content = bytearray(path.read_bytes())
    first = content.index(b"GCOL") + 16
    second = first + 16 + -(-int.from_bytes(content[first + 8 : first + 16], "little") // 8) * 8
    content[second : second + 16] = bytes(16)
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(ValueError, match="in.hdf5.*never ends"), open_file(path):
        pass
    assert time.monotonic() - start < 20
