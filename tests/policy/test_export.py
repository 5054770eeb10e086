"""Exported policies give what ``policy.sample`` gives, without this repository; what an export refuses."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import tiny
import torch
from exports import KINDS, exporter, noise_of, observations, write_policy
from paths import ROOT

from policy import load_policy
from policy.checkpoint import load_checkpoint
from policy.denoiser.samplers import sampling_steps
from policy.export import export
from policy.export import main as export_command
from policy.onnx_runtime import OnnxPolicy

SHIPPED = ROOT / "pretrained" / "pusht_policy.safetensors"


class Program:
    """A torch.export program behind the interface of an onnxruntime session."""

    def __init__(self, path, call):
        self.module, self.call = torch.export.load(path).module(), call

    def run(self, _outputs, inputs):
        return (self.call(self.module, {key: torch.from_numpy(array) for key, array in inputs.items()}).numpy(),)


class ProgramPolicy(OnnxPolicy):
    """The loop of the ONNX runtime around the two torch.export programs."""

    def __init__(self, path):
        self.numbers = json.loads(path.with_suffix(".pt2.json").read_text())
        self.encoder = Program(path.with_suffix(".encoder.pt2"), lambda module, inputs: module(inputs))
        self.denoiser = Program(path.with_suffix(".denoiser.pt2"), lambda module, inputs: module(*inputs.values()))


RUNTIMES = {".onnx": OnnxPolicy, ".pt2": ProgramPolicy}


def largest_error(policy, exported, batch):
    """Of a sampled chunk, in normalised units."""
    obs = observations(policy, batch)
    expected = policy.sample(obs, generator=torch.Generator().manual_seed(batch)).numpy()
    got = exported.sample(obs, noise=noise_of(policy, batch, seed=batch))
    assert got.shape == expected.shape and np.ptp(expected) > 1
    return np.abs((got - expected) * policy.normalizer.action_scale.numpy()).max()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> a policy and the folder of its exports policy.onnx and policy.pt2, made once."""
    return exporter(tmp_path_factory, RUNTIMES)


# Parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ending", RUNTIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_exports_sample_as_the_policy(made, kind, ending):
    policy, folder = made(kind)
    runtime = RUNTIMES[ending](folder / f"policy{ending}")
    assert max(largest_error(policy, runtime, batch) for batch in (1, 3)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_are_valid_and_hold_standard_operators_only(made, kind):
    _, folder = made(kind)
    for part in ("encoder", "denoiser"):
        model = onnx.load(folder / f"policy.{part}.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.graph.node} == {""} and not model.functions
        program = torch.export.load(folder / f"policy.{part}.pt2")
        operators = {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")}
        assert operators == {"aten"}
    for file in folder.glob("policy.*.*"):
        content = file.read_bytes()
        assert str(ROOT).encode() not in content and sys.prefix.encode() not in content, f"made where: {file.name}"


@pytest.mark.slow
@pytest.mark.parametrize("ending", RUNTIMES)
def test_the_shipped_policy(tmp_path, capsys, ending):
    """Under another sampler and number of steps than its own, for a fixed number of rows."""
    policy = load_policy(SHIPPED)
    policy.set_sampler("dpmpp_2m", 5)
    output = tmp_path / "made" / f"policy{ending}"
    export_command([str(SHIPPED), str(output), "--sampler", "dpmpp_2m", "--steps", "5", "--batch", "1"])
    names = [f"policy.encoder{ending}", f"policy.denoiser{ending}", f"policy{ending}.json"]
    assert sorted(file.name for file in output.parent.iterdir()) == sorted(names)
    written = capsys.readouterr().out
    assert all(f"wrote {output.parent / name}, " in written for name in names)
    runtime = RUNTIMES[ending](output)
    assert largest_error(policy, runtime, 1) < 1e-4
    with pytest.raises(ValueError, match="obs .*: got shape"):
        runtime.sample(observations(policy, 2))


# The runtime -------------------------------------------------------------------------------------------------------


ALONE = {
    ".onnx": """
sys.modules["torch"] = None  # importing it is an error from here on
from onnx_runtime import OnnxPolicy
out = OnnxPolicy("policy.onnx").sample(obs, noise=noise)
""",
    ".pt2": """
sys.modules["policy"] = None
import torch
obs = {key: torch.from_numpy(array).float() for key, array in obs.items()}
films = torch.export.load("policy.encoder.pt2").module()(obs)
step = torch.tensor([2])
out = torch.export.load("policy.denoiser.pt2").module()(torch.from_numpy(noise[0]), films, step).numpy()
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("ending", RUNTIMES)
def test_nothing_of_this_repository_is_needed(made, tmp_path, ending):
    policy, folder = made("conv-stem")
    for file in folder.glob(f"policy*{ending}*"):
        shutil.copy(file, tmp_path)
    shutil.copy(ROOT / "policy" / "onnx_runtime.py", tmp_path)
    obs, noise = observations(policy, 2), noise_of(policy, 2, seed=1)
    np.savez(tmp_path / "inputs.npz", noise=noise, **obs)
    read = "obs = dict(np.load('inputs.npz')); noise = obs.pop('noise')"
    code = f"import sys\nimport numpy as np\n{read}\n{ALONE[ending]}\nnp.save('out.npy', out)"
    (tmp_path / "robot.py").write_text(code)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "robot.py"], cwd=tmp_path, env=environment, check=True)
    if ending == ".onnx":
        expected = policy.sample(obs, generator=torch.Generator().manual_seed(1))
    else:  # one prediction, at the third step of the loop
        frames = {key: torch.from_numpy(array).flatten(0, 1) for key, array in obs.items()}
        timestep = torch.full((2,), policy.sampling_steps()[2].timestep)
        expected = policy.denoiser(torch.from_numpy(noise[0]), timestep, policy.encoder(frames).reshape(2, -1))
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected.detach(), rtol=1e-4, atol=1e-4)


def test_numbers_of_the_loop(made):
    policy, folder = made("mean-pool")
    numbers = json.loads((folder / "policy.onnx.json").read_text())
    assert numbers == json.loads((folder / "policy.pt2.json").read_text()) == OnnxPolicy(folder / "policy.onnx").numbers
    assert list(numbers["obs"].items()) == [
        ("agent_pos", {"type": "low_dim", "shape": [2], "dtype": "float32"}),
        ("image", {"type": "rgb", "shape": [3, 12, 12], "dtype": "float32"}),
    ]
    sizes = {"obs_steps": 2, "horizon": 8, "action_steps": 4, "action_dim": 3, "relative_columns": 2}
    others = {"relative_to": "agent_pos", "clip": True, "sampler": "ddim", "batch": None}
    assert {key: numbers[key] for key in sizes | others} == sizes | others
    steps = sampling_steps("ddim", policy.noise_scheduler.config, 4)
    assert numbers["steps"] == [step._asdict() for step in steps]
    assert np.array_equal(numbers["action"]["scale"], policy.normalizer.action_scale)


@pytest.mark.slow
def test_bigbird_as_a_graph_for_any_number_of_rows(tmp_path):
    """Every other attention is traced so in test_attention_contract.py."""
    config = tiny.policy_config(images=True)
    config["attention"] = {"name": "bigbird", "window_radius": 1, "random_keys": 2}
    policy = write_policy(tmp_path / "policy.safetensors", config)
    export(tmp_path / "policy.safetensors", tmp_path / "policy.onnx")
    assert max(largest_error(policy, OnnxPolicy(tmp_path / "policy.onnx"), batch) for batch in (1, 3)) < 1e-4


# Weights -----------------------------------------------------------------------------------------------------------


def test_decoder_is_left_out(tmp_path):
    sizes = {"channels": 8, "code_channels": 4, "start_channels": 8, "kernel_size": 3, "groups": 2}
    decoder = {"name": "a", "weight": 0.1, "weights": {}, "image_size": None, "every": 1, **sizes}
    config = tiny.policy_config(images=True, model={**tiny.policy_config()["model"], "decoder": decoder})
    policy = write_policy(tmp_path / "run.safetensors", config)
    assert policy.decoder is not None
    export_command([str(tmp_path / "run.safetensors"), str(tmp_path / "without.safetensors")])
    export_command([str(tmp_path / "run.safetensors"), str(tmp_path / "with.safetensors"), "--keep-decoder"])
    without, kept = load_policy(tmp_path / "without.safetensors"), load_policy(tmp_path / "with.safetensors")
    assert without.decoder is None and without.config["model"]["decoder"] == {"name": "none"}
    assert not any(name.startswith("ema.decoder") for name in load_checkpoint(tmp_path / "without.safetensors")[0])
    assert kept.config == config
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), policy.parameters(), strict=True))
    obs = observations(policy, 2)
    expected = policy.sample(obs, generator=torch.Generator().manual_seed(0))
    assert torch.equal(without.sample(obs, generator=torch.Generator().manual_seed(0)), expected)


# Errors ------------------------------------------------------------------------------------------------------------


LOW_DIM_CONFIG = tiny.policy_config()
LOW_DIM_CONFIG["model"]["denoiser"]["widths"] = [8]


@pytest.fixture
def source(tmp_path):
    write_policy(tmp_path / "x.safetensors", LOW_DIM_CONFIG)
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    ("output", "options", "key"),
    [
        ("y.pth", [], "output"),
        ("y", [], "output"),
        ("y.onnx", ["--half"], "half"),
        ("y.pt2", ["--keep-decoder"], "keep_decoder"),
        ("y.safetensors", ["--steps", "3"], "steps"),
        ("y.onnx", ["--batch", "0"], "batch"),
        ("y.onnx", ["--batch", "1000000000"], "batch"),
        ("y.pt2", ["--sampler", "euler"], "sampler"),
        ("y.pt2", ["--steps", "99"], "num_inference_steps"),
        ("x.safetensors/y.pt2", [], "x.safetensors"),
        ("x.safetensors/y.onnx", [], "x.safetensors"),
        ("x.safetensors/y.safetensors", [], "x.safetensors"),
    ],
)
def test_wrong_outputs_and_options(source, output, options, key):
    with pytest.raises(SystemExit, match=f"^error: .*{key}") as error:
        export_command([str(source), str(source.parent / output), *options])
    assert "\n" not in str(error.value)
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.parametrize("ending", RUNTIMES)
@pytest.mark.parametrize("checkpoint", [ROOT / "pretrained" / "pusht_encoder.safetensors", "missing"])
def test_only_policies_become_graphs(tmp_path, ending, checkpoint):
    with pytest.raises(SystemExit, match="error: .*checkpoint"):
        export_command([str(checkpoint), str(tmp_path / f"y{ending}")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(source, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"{package}.*pip install"):
        export_command([str(source), str(source.with_suffix(".onnx"))])
    assert list(source.parent.iterdir()) == [source]


@pytest.mark.slow
def test_a_failed_export_leaves_the_one_before(source, monkeypatch):
    """A disk that is full at the second graph: the three files stay as they were, and nothing is left over."""
    output = source.parent / "made" / "y.pt2"
    output.parent.mkdir()
    files = [output.parent / name for name in ("y.encoder.pt2", "y.denoiser.pt2", "y.pt2.json")]
    for file in files:
        file.write_text("before")
    save = torch.export.save

    def full_disk(program, path):
        if "denoiser" in path.name:
            raise OSError("No space left on device")
        save(program, path)

    monkeypatch.setattr(torch.export, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export(source, output)
    assert all(file.read_text() == "before" for file in files) and sorted(output.parent.iterdir()) == sorted(files)
    monkeypatch.undo()
    assert export(source, output) == files and all(file.read_bytes() != b"before" for file in files)


@pytest.mark.slow
def test_graphs_of_two_policies_never_look_like_one(source, monkeypatch):
    """Stopped when some of the files are in place: there are no numbers, so nothing loads."""
    export(source, source.with_suffix(".pt2"))
    replace = os.replace

    def interrupted(partial, path):
        if "denoiser" in path.name:
            raise KeyboardInterrupt
        replace(partial, path)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(source, source.with_suffix(".pt2"))
    assert {file.name for file in source.parent.iterdir()} == {source.name, "x.encoder.pt2", "x.denoiser.pt2"}
    with pytest.raises(OSError, match="x.pt2.json"):
        ProgramPolicy(source.with_suffix(".pt2"))
