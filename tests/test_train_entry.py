"""Between the configuration and the trainer: which data set a run uses, and what its encoders start from."""

import copy
import json

import h5py
import numpy as np
import pytest
import tiny
import torch
from configs import FOLDERS, composed
from omegaconf import OmegaConf

import train
from eval.shared.command import check_types
from policy.build import build_model
from policy.checkpoint import save_checkpoint
from policy.dataset.replay_buffer import open_zarr

CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")
CONTROLLER = {"type": "OSC_POSE", "input_type": "absolute", "input_ref_frame": "world"}
ENV_ARGS = {
    "env_name": "Lift",
    "env_version": "1.5.1",
    "type": 1,
    "env_kwargs": {"robots": ["Panda"], "controller_configs": {"type": "BASIC", "body_parts": {"right": CONTROLLER}}},
}


def write_hdf5(path):
    """Two demonstrations of four steps with one camera and absolute actions."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs.update({"env_args": json.dumps(ENV_ARGS), "total": 8})
        for name in ("demo_0", "demo_1"):
            demo = data.create_group(name)
            demo.attrs["num_samples"] = 4
            demo["actions"] = rng.uniform(-0.5, 0.5, (4, 7))
            demo["obs/agentview_image"] = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
            demo["obs/robot0_eef_pos"] = rng.uniform(size=(4, 3))
    return path


def task(**datasets):
    return {"name": "lift", "data": "ph", "env": {"actions": "absolute"}, "datasets": datasets}


def test_an_hdf5_is_converted_once_and_tells_of_its_environment(tmp_path, capsys):
    source = write_hdf5(tmp_path / "demos.hdf5")
    options = task(path={"maker": "robomimic_file"}) | {"data": str(source)}
    path = train.locate_data(options, tmp_path / "cache")
    assert path == train.locate_data(options, tmp_path / "cache") and path.suffix == ".zarr"
    assert open_zarr(path).attrs["env_args"] == ENV_ARGS
    assert open_zarr(path)["data/action"].shape == (8, 10)
    assert capsys.readouterr().out.count("converting") == 1
    options["env"]["actions"] = "recorded"
    assert open_zarr(train.locate_data(options, tmp_path / "cache"))["data/action"].shape == (8, 7)


def test_a_missing_file_gives_way_to_the_set_that_its_entry_names(tmp_path, capsys):
    """And the run then says, on the screen and in its configuration, which one it uses."""
    entry = {"maker": "robomimic_file", "source": str(tmp_path / "ph.hdf5"), "hint": "get it", "otherwise": "expert"}
    expert = {"maker": "robomimic_file", "source": str(write_hdf5(tmp_path / "expert.hdf5"))}
    options = task(ph=entry, expert=expert)
    assert "expert" in train.locate_data(options, tmp_path / "cache").name
    assert options["data"] == "expert"
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("task.data=ph: ") and "get it" in line and "using task.data=expert instead" in line
    write_hdf5(tmp_path / "ph.hdf5")  # once it is there it is what is used
    options["data"] = "ph"
    assert "ph" in train.locate_data(options, tmp_path / "cache").name and options["data"] == "ph"
    del entry["otherwise"]
    with pytest.raises(FileNotFoundError, match="task.data: got 'ph'.*which does not exist; .*to get it: get it"):
        train.locate_data(task(ph=entry | {"source": str(tmp_path / "nowhere.hdf5")}), tmp_path / "cache")


def camera_config(cameras):
    config = copy.deepcopy(tiny.policy_config())
    images = {key: {"type": "rgb", "shape": [3, 12, 12]} for key in cameras}
    config["task"]["shape_meta"]["obs"] = {**images, **tiny.LOW_DIM}
    return config


def saved_model(path, cameras):
    """A policy with random weights and its checkpoint at ``path``."""
    config = camera_config(cameras)
    model = build_model(config)
    tensors = {f"ema.{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(path, tensors, config=config, state={"step": 0})
    return model


def started(cameras, init):
    options = camera_config(cameras)
    options["encoder"] |= {"init": str(init), "freeze": True}
    model = build_model(options)
    assert str(init) in train.start_encoder(model, options)
    assert not any(p.requires_grad for p in model.encoder.encoders.parameters())
    return model.encoder.encoders


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_each_camera_starts_from_the_encoder_of_its_name(tmp_path):
    source = saved_model(tmp_path / "two", CAMERAS).encoder.encoders
    encoders = started(CAMERAS[::-1], tmp_path / "two")
    assert not same(source[CAMERAS[0]], source[CAMERAS[1]])
    assert all(same(encoders[key], source[key]) for key in CAMERAS)
    with pytest.raises(ValueError, match="got cameras agentview_image, robot0_eye.*allowed: one, or 'sideview_image'"):
        started(["sideview_image"], tmp_path / "two")


def test_a_single_encoder_starts_all_cameras(tmp_path):
    source = saved_model(tmp_path / "one", ["image"]).encoder.encoders["image"]
    assert all(same(encoder, source) for encoder in started(CAMERAS, tmp_path / "one").values())


def test_a_missing_simulator_is_said_at_once(monkeypatch):
    def missing(**options):
        raise ImportError("robosuite: cannot be imported")

    monkeypatch.setattr(train, "make_env", missing)
    with pytest.raises(ImportError, match="robosuite: cannot be imported; rollout.episodes=0 trains without a sim"):
        train._check_simulator({"task": {"env": {"name": "robosuite"}}})


# Configurations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "small", "cpu", "smoke"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_task_builds_with_every_preset(folder, preset):
    config = composed(folder, "typea", f"preset={preset}")
    check_types(OmegaConf.create(config))
    with torch.device("meta"):
        model = build_model(config)
    obs = config["task"]["shape_meta"]["obs"]
    assert (
        set(model.encoder.shapes) == set(obs) and model.action_dim == config["task"]["shape_meta"]["action"]["shape"][0]
    )
    published = preset == "paper"
    assert model.relative_to == (None if published else config["task"]["position"])
    assert model.encoder.crop == (config["task"]["crop"] if preset in ("paper", "small") else None)
    assert {"num_envs", "workers", "batch"} <= set(config["rollout"])


def test_another_task_of_robosuite_is_configuration_only(tmp_path):
    """Square has neither an expert nor a pre-trained encoder: nothing takes the place of its missing file."""
    (lift,) = [folder for folder in FOLDERS if folder.name == "lift_ph"]
    config = composed(lift, "typea", "task=square", "preset=cpu")
    check_types(OmegaConf.create(config))
    assert config["task"]["env"]["task"] == "NutAssemblySquare"
    assert config["encoder"]["init"] == "none" and not config["encoder"]["freeze"]
    with pytest.raises(
        FileNotFoundError, match="square/ph/demo_v15.hdf5.* python -m policy.dataset.download square_ph"
    ):
        train.locate_data(config["task"], tmp_path)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_is_pretrained_is_what_preset_cpu_starts_from(folder):
    """A pre-training configuration describes the same encoder, and the shipped weights fit it."""
    if not (folder / "pretrain.yaml").exists():
        pytest.skip("this task starts from another one's encoder")
    config, pretraining = composed(folder, "typea", "preset=cpu"), composed(folder, "pretrain")
    loading = ("init", "freeze")
    assert {k: v for k, v in config["encoder"].items() if k not in loading} == {
        k: v for k, v in pretraining["encoder"].items() if k not in loading
    }
    model = build_model(config)
    assert config["encoder"]["init"] in train.start_encoder(model, config) and config["encoder"]["freeze"]


def test_a_run_from_before_an_option_existed_goes_on(tmp_path):
    config = {"training": {"lr": 1.0, "epochs": 2}, "seed": 1}
    save_checkpoint(tmp_path / "checkpoints" / "last.safetensors", {}, config=config, state={"step": 0})
    stored = train.stored_config(tmp_path, ["training.epochs=3"])
    assert (stored.training.lr, stored.training.epochs, stored.training.optimizer) == (1.0, 3, "adamw")
    assert stored.training.compile is False and stored.dagger.rounds == 0
    config["dagger"] = {"rounds": 2}
    save_checkpoint(tmp_path / "checkpoints" / "last.safetensors", {}, config=config, state={"step": 0})
    assert train.stored_config(tmp_path, []).dagger.rounds == 2
