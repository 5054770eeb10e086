"""The loop around exported graphs: what it draws, and the files and observations that it refuses, each in a line."""

import shutil

import numpy as np
import pytest
from exports import exporter, noise_of, observations

from policy.onnx_runtime import OnnxPolicy


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The policy "conv-stem" and the folder of its export policy.onnx."""
    return exporter(tmp_path_factory, [".onnx"])("conv-stem")


def test_runtime_draws_and_acts(made):
    policy, folder = made
    runtime, obs = OnnxPolicy(folder / "policy.onnx", providers=["CPUExecutionProvider"]), observations(policy, 2)
    first, again, other = (runtime.sample(obs, rng=np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.allclose(first, other)
    noise = np.random.default_rng(0).standard_normal((4, 2, 8, 2), np.float32)  # the start, three draws of four steps
    assert np.array_equal(runtime.sample(obs, noise=noise), first)
    assert np.array_equal(runtime.act(obs, noise=noise), first[:, 1:5])
    assert not np.array_equal(runtime.sample(obs), runtime.sample(obs))


@pytest.mark.parametrize(
    ("file", "content", "error", "words"),
    [
        ("policy.onnx.json", None, OSError, "policy.onnx.json"),
        ("policy.onnx.json", b'{"format": "other"}', ValueError, "format"),
        ("policy.onnx.json", b"[]", ValueError, "format"),
        ("policy.onnx.json", b"", ValueError, "policy.onnx.json"),
        ("policy.onnx.json", b"\xff\xfe", ValueError, "policy.onnx.json"),
        ("policy.encoder.onnx", None, OSError, "policy.encoder.onnx"),
        ("policy.encoder.onnx", b"", ValueError, "policy.encoder.onnx"),
        ("policy.denoiser.onnx", b"garbage", ValueError, "policy.denoiser.onnx"),
    ],
)
def test_files_that_the_runtime_refuses(made, tmp_path, file, content, error, words):
    _, folder = made
    for source in folder.glob("policy*onnx*"):
        shutil.copy(source, tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        OnnxPolicy(tmp_path / "policy.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("agent_pos", lambda x: np.where(x == x.max(), np.nan, x), "NaN"),
        ("agent_pos", lambda x: np.where(x == x.max(), np.inf, x), "inf"),
        ("agent_pos", lambda x: x.astype(np.float64) * 1e300, "inf"),
        ("agent_pos", lambda x: x.astype(str), "agent_pos.*numbers"),
        ("agent_pos", lambda x: x.astype(complex), "agent_pos.*numbers"),
        ("agent_pos", lambda x: [[1], [1, 2]], "agent_pos.*numbers"),
        ("agent_pos", lambda x: x[..., :1], "agent_pos.*shape"),
        ("agent_pos", lambda x: x[:, :1], "agent_pos.*shape"),
        ("agent_pos", lambda x: x[0], "agent_pos.*shape"),
        ("agent_pos", lambda x: x[:0], "agent_pos.*shape"),
        ("image", lambda x: x[:1], "shape"),  # fewer rows than the other key
        ("image", lambda x: x.transpose(0, 1, 3, 4, 2), "image.*shape"),
        ("image", lambda x: x / np.float32(255), "image.*255"),
        ("image", lambda x: x.astype(np.int64) * 256, "image.*255"),
        ("image", lambda x: x > 127, "image.*bool"),
    ],
)
def test_observations_that_the_runtime_refuses(made, key, change, words):
    policy, folder = made
    runtime, obs = OnnxPolicy(folder / "policy.onnx"), observations(policy, 2)
    with pytest.raises(ValueError, match=words) as caught:
        runtime.sample({**obs, key: change(obs[key])})
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"missing.*{key}"):
        runtime.sample({name: values for name, values in obs.items() if name != key})


def test_what_the_runtime_takes_beside_float32(made):
    policy, folder = made
    runtime, obs = OnnxPolicy(folder / "policy.onnx"), observations(policy, 2)
    noise = noise_of(policy, 2, seed=0)
    expected = runtime.sample(obs, noise=noise)
    other = {"agent_pos": obs["agent_pos"].astype(np.float64), "image": obs["image"].astype(np.float16)}
    assert np.array_equal(runtime.sample(other, noise=noise.astype(np.float64)), expected)
    for wrong in (noise[:-1], noise[:, :1], noise * np.nan, noise.astype(int)):
        with pytest.raises(ValueError, match="noise"):
            runtime.sample(obs, noise=wrong)
