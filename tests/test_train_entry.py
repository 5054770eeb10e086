"""Between the configuration and the trainer: which data set a run uses, and what its encoders start from."""

import copy
import itertools
import json

import h5py
import numpy as np
import pytest
import tiny
import torch
from configs import FOLDERS, composed

from eval.benchmark import demonstrations
from eval.shared.compose import compose, locate_data
from eval.shared.overrides import CONFIG
from policy.build import build_model
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
    path = locate_data(options, tmp_path / "cache")
    assert path == locate_data(options, tmp_path / "cache") and path.suffix == ".zarr"
    assert open_zarr(path).attrs["env_args"] == ENV_ARGS
    assert open_zarr(path)["data/action"].shape == (8, 10)
    assert capsys.readouterr().out.count("converting") == 1
    options["env"]["actions"] = "recorded"
    assert open_zarr(locate_data(options, tmp_path / "cache"))["data/action"].shape == (8, 7)


def test_a_missing_file_gives_way_to_the_set_that_its_entry_names(tmp_path, capsys):
    """And the run then says, on the screen and in its configuration, which one it uses."""
    entry = {"maker": "robomimic_file", "source": str(tmp_path / "ph.hdf5"), "hint": "get it", "otherwise": "expert"}
    expert = {"maker": "robomimic_file", "source": str(write_hdf5(tmp_path / "expert.hdf5"))}
    options = task(ph=entry, expert=expert)
    assert "expert" in locate_data(options, tmp_path / "cache").name
    assert options["data"] == "expert"
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("task.data=ph: ") and "get it" in line and "using task.data=expert instead" in line
    write_hdf5(tmp_path / "ph.hdf5")  # once it is there it is what is used
    options["data"] = "ph"
    assert "ph" in locate_data(options, tmp_path / "cache").name and options["data"] == "ph"
    del entry["otherwise"]
    with pytest.raises(FileNotFoundError, match="task.data: got 'ph'.*which does not exist; .*to get it: get it"):
        locate_data(task(ph=entry | {"source": str(tmp_path / "nowhere.hdf5")}), tmp_path / "cache")


def camera_config(cameras):
    config = copy.deepcopy(tiny.policy_config())
    images = {key: {"type": "rgb", "shape": [3, 12, 12]} for key in cameras}
    config["task"]["shape_meta"]["obs"] = {**images, **tiny.LOW_DIM}
    return config


def saved_model(path, cameras):
    """A policy with random weights and its checkpoint at ``path``."""
    config = camera_config(cameras)
    model = build_model(config)
    tiny.save(path, model, config)
    return model


def started(cameras, init):
    config = camera_config(cameras)
    model = build_model(config)
    line = demonstrations.start_encoder(model, init=str(init), freeze=True, attention=config["attention"])
    assert str(init) in line
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

    monkeypatch.setattr(demonstrations, "make_env", missing)
    with pytest.raises(ImportError, match="rollout.episodes=0"):
        demonstrations.check_simulator({"name": "robosuite"})


# Configurations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "small", "fast", "smoke"])
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_task_builds_with_every_preset(folder, preset):
    config = composed(folder, "typea", f"preset={preset}")
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


def test_the_default_is_the_quick_recipe_and_paper_takes_published_data():
    """On every machine, with or without a GPU."""
    config = compose("pusht", [])
    assert (config["preset"], config["task"]["data"]) == ("fast", "embedded")
    assert compose("pusht", ["preset=paper"])["task"]["data"] == "published"
    assert compose("lift_mh", ["preset=paper"])["task"]["data"] == "mh"


def test_published_data_give_way_to_the_embedded_ones_and_human_data_do_not(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = compose("pusht", ["preset=paper", "task.datasets.human.source=nowhere.zarr"])
    datasets = {**config["task"]["datasets"], "embedded": {"maker": "robomimic_file", "source": str(tmp_path / "x")}}
    with pytest.raises(FileNotFoundError, match="task.data: got 'embedded'"):
        locate_data({**config["task"], "datasets": datasets}, tmp_path)
    assert "using task.data=embedded" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="task.data: got 'human'"):
        locate_data({**config["task"], "data": "human"}, tmp_path)


def test_every_classifier_builds_with_every_preset_of_its_kind():
    """On the meta device, so that large ones cost nothing; the options are those that the model takes."""
    size = {"image": "cifar10", "video": "pusht_turn"}
    for kind, task in size.items():
        names = [path.stem for path in (CONFIG / task).glob("*.yaml")]
        for preset, name in itertools.product(sorted((CONFIG / "preset").glob(f"{kind}_*.yaml")), names):
            config = compose(task, [f"preset={preset.stem}"], name)
            assert config["mode"] == name
            side = config["image_size"]
            config |= {
                "crop": None,
                "task": {"shape_meta": {"obs": {"image": {"type": "rgb", "shape": [3, side, side]}}}},
            }
            if name != "pretrain":
                config["model"]["num_classes"] = 3
            with torch.device("meta"):
                model = build_model(config)
            assert sum(p.numel() for p in model.parameters()) > 1e5


@pytest.mark.parametrize("task", ["language", "translation"])
@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_every_sequence_preset_builds(task, preset):
    config = compose(task, [f"preset={task}_{preset}"])
    config["model"]["vocabulary"] = config["vocabulary"]
    with torch.device("meta"):
        model = build_model(config)
    assert config["preset"] == f"{task}_{preset}" and sum(p.numel() for p in model.parameters()) > 1e5


@pytest.mark.parametrize("preset", ["fast", "small", "paper"])
@pytest.mark.parametrize("lines", ["crop: null\nposition: null\n", "", "crop: null\n", "position: null\n"])
def test_a_task_may_leave_out_crop_and_position_or_say_null(tmp_path, preset, lines):
    """Then whole images are seen and actions are relative to nothing."""
    text = (CONFIG / "task/pusht.yaml").read_text()
    kept = [line for line in text.splitlines() if not line.startswith(("crop:", "position:"))]
    (tmp_path / "task").mkdir()
    (tmp_path / "task/mine.yaml").write_text("\n".join(kept) + f"\n{lines}")
    chosen = (CONFIG / "pusht/typea.yaml").read_text().replace("/task: pusht", "/task: mine")
    (tmp_path / "typea.yaml").write_text(chosen)
    config = composed(tmp_path, "typea", f"preset={preset}")
    assert config["crop"] is None and config["task"]["shape_meta"]["action"]["relative_to"] is None
    with torch.device("meta"):
        model = build_model(config)
    assert model.encoder.crop is None and model.relative_to is None


@pytest.mark.parametrize("task", ["pusht", "lift_ph"])
def test_crop_and_position_may_be_null_on_the_command_line(task):
    config = compose(task, ["task.crop=null", "task.position=null"])
    assert config["crop"] is None and config["task"]["shape_meta"]["action"]["relative_to"] is None


def test_another_task_of_robosuite_is_configuration_only(tmp_path):
    """Square has neither an expert nor a pre-trained encoder: nothing takes the place of its missing file."""
    config = compose("square_ph", [])
    assert config["task"]["env"]["task"] == "NutAssemblySquare"
    assert config["encoder"]["init"] == "none" and not config["encoder"]["freeze"]
    with pytest.raises(FileNotFoundError, match="policy.dataset.download square_ph"):
        locate_data(config["task"], tmp_path)
    with pytest.raises(
        FileNotFoundError, match="got 'expert'.*allowed: mh, ph or a path"
    ):  # advice that would not help
        locate_data({**config["task"], "data": "expert"}, tmp_path)


@pytest.mark.parametrize("task", ["pusht", "lift_ph", "can_ph"])
def test_the_shipped_encoder_is_the_pretrained_one(task):
    """A pre-training configuration describes the same encoder, and the shipped weights fit it."""
    config, pretraining = compose(task, []), compose(task, [], "pretrain")
    loading = ("init", "freeze")
    assert {k: v for k, v in config["encoder"].items() if k not in loading} == {
        k: v for k, v in pretraining["encoder"].items() if k not in loading
    }
    start = {key: config["encoder"][key] for key in loading}
    assert start["freeze"] and start["init"] in demonstrations.start_encoder(
        build_model(config), attention=config["attention"], **start
    )
