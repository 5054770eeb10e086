"""Resume: a change reaches all that is built from it, or is refused by name; a run keeps its folder."""

import json
import re
import shutil

import pytest
import torch
import zarr
from door import door
from omegaconf import OmegaConf

from eval.shared.compose import compose_task
from eval.shared.run_config import STARTING, stored_config, write_config
from policy.checkpoint import load_checkpoint, save_checkpoint

TASKS = [("pusht", None), ("pusht", "pretrain"), ("lift_ph", None), ("cifar10", None), ("cifar10", "pretrain"),
         ("pusht_turn", None), ("language", None), ("translation", None)]  # fmt: skip


def stored(folder, task, name, *overrides):
    """The folder of a run of ``task`` with nothing but its configuration."""
    config = compose_task(task, list(overrides), name)
    write_config(folder, config, OmegaConf.to_container(config, resolve=True))
    save_checkpoint(folder / "checkpoints" / "last.safetensors", {}, config={}, state={"step": 0})
    return config


def interpolated(config, prefix=""):
    """{dotted key: what it copies} of all values of ``config`` that point at others."""
    found = {}
    for key, value in OmegaConf.to_container(config).items():
        if isinstance(value, str) and "${" in value:
            found[f"{prefix}{key}"] = value
        elif isinstance(value, dict):
            found |= interpolated(OmegaConf.create(value), f"{prefix}{key}.")
    return found


def another(value):
    """A value of the same type, written for a command line, and as it is read."""
    if isinstance(value, bool):
        return str(not value).lower(), not value
    if isinstance(value, int | float):
        return str(value + 1), value + 1
    return ("other", "other") if isinstance(value, str) or value is None else (None, None)


def leaf(config, key):
    """``key``, or the first plain value below it."""
    value = OmegaConf.select(config, key)
    while OmegaConf.is_dict(value):
        name = next((name for name in value if another(value[name])[0] is not None), next(iter(value)))
        key, value = f"{key}.{name}", value[name]
    return key


@pytest.mark.parametrize(("task", "name"), TASKS)
def test_a_change_reaches_every_copy(tmp_path, task, name):
    """For every value that points at another: a change of the source changes the copy, one below a copy is refused."""
    config = stored(tmp_path, task, name)
    tried = 0
    for key, text in interpolated(config).items():
        source = re.fullmatch(r"\$\{([\w.]+)\}", text)
        if source is None:  # it is computed, such as a learning rate
            continue
        if starting := {key, source[1]} & set(STARTING):
            for given in starting:
                with pytest.raises(ValueError, match=given):
                    stored_config(tmp_path, [f"{given}=1"])
            tried += 1
            continue
        changed = leaf(config, source[1])
        given, expected = another(OmegaConf.select(config, changed))
        copy = key + changed.removeprefix(source[1])
        if given is None:
            continue
        resumed = stored_config(tmp_path, [f"{changed}={given}"])
        assert OmegaConf.select(resumed, copy) == expected == OmegaConf.select(resumed, changed), key
        if copy != key:
            with pytest.raises(ValueError, match=copy):
                stored_config(tmp_path, [f"{copy}={given}"])
        else:
            assert OmegaConf.select(stored_config(tmp_path, [f"{key}={given}"]), key) == expected
        tried += 1
    assert tried >= {"cifar10": 1, "pusht_turn": 1}.get(task, 2)


def test_computed_values_follow(tmp_path):
    stored(tmp_path, "cifar10", None)
    before, after = (stored_config(tmp_path, [change]).training.lr for change in ("device=cpu", "base_lr=1.0"))
    assert after != before and stored_config(tmp_path, ["training.batch_size=256", "base_lr=0.5"]).training.lr == 0.5


@pytest.mark.parametrize(
    "change", [*(f"{key}=x" for key in STARTING), "training=3", "modle.horizon=3", "seed", "~seed"]
)
def test_a_change_without_effect_is_refused_by_name(tmp_path, change):
    stored(tmp_path, "pusht", None)
    with pytest.raises(Exception, match=re.escape(change.split("=")[0].lstrip("~"))):
        stored_config(tmp_path, [change])


def test_a_folder_without_both_configurations_takes_no_change(tmp_path):
    save_checkpoint(tmp_path / "checkpoints" / "last.safetensors", {}, config={"seed": 3}, state={"step": 0})
    assert stored_config(tmp_path, [f"resume={tmp_path}"]).seed == 3
    with pytest.raises(ValueError, match="training.lr"):
        stored_config(tmp_path, ["training.lr=1"])


@pytest.fixture(scope="module")
def run(workplace):
    """A run of two steps with a small policy."""
    door("pusht", "preset=smoke", "encoder.init=none", "encoder.dim=16", "encoder.depth=1", "encoder.num_heads=2",
         "denoiser.widths=[16,32,64]", "training.batch_size=8", "training.max_steps=2", "training.log_every=1",
         "rollout.episodes=0", f"task.data={workplace}/demos.zarr", f"cache_dir={workplace}/cache",
         f"output={workplace}/run")  # fmt: skip
    return workplace / "run"


def test_a_resumed_run_trains_with_the_change(run, capsys):
    door("pusht", f"resume={run}", "decoder.weight=0.5", "training.max_steps=3", "training.lr=0.01")
    _, config, state = load_checkpoint(run / "checkpoints" / "last.safetensors", prefix="none")
    assert state["step"] == 3 and config["model"]["decoder"]["weight"] == 0.5 and config["training"]["lr"] == 0.01
    assert OmegaConf.load(run / "config.yaml").model.decoder == OmegaConf.load(run / "config.yaml").decoder
    assert "${decoder}" in (run / "config.yaml").read_text() and "${" not in (run / "resolved.yaml").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    parts = [line["train_decode_image"] for line in lines if "train_decode_image" in line]
    assert parts[2] > 3 * parts[1]  # five times the weight
    printed = capsys.readouterr().out
    assert all(
        word in printed for word in ("parameters", "memory", "results", "2 done", "checkpoint", "python -m eval.")
    )


def test_data_of_another_range_are_refused(run, workplace, capsys):
    """The old normaliser would map them to anywhere, and sampling clips; the run stays as it was."""
    shutil.copytree(workplace / "demos.zarr", workplace / "other.zarr")
    root = zarr.open_group(str(workplace / "other.zarr"), mode="a")
    root["data/action"][:] = 3 * root["data/action"][:]
    before = (run / "config.yaml").read_text()
    with pytest.raises(SystemExit):
        door("pusht", f"resume={run}", f"task.data={workplace}/other.zarr", "training.max_steps=9")
    assert "task.data: got another range of 'action' with resume" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == before


def test_a_mistyped_resume_makes_no_folder(tmp_path, capsys):
    for place in (tmp_path / "typo", tmp_path / "deep" / "typo"):
        with pytest.raises(SystemExit):
            door("pusht", f"resume={place}")
        assert f"got {place}" in capsys.readouterr().err and not place.exists() and not (tmp_path / "deep").exists()


def test_a_folder_that_holds_a_run_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        door("pusht", f"output={run}")
    assert f"resume={run}" in capsys.readouterr().err and (run / "checkpoints" / "last.safetensors").exists()


def test_weights_that_do_not_fit_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        door("pusht", f"resume={run}", "denoiser.widths=[16,32,48]")
    assert "does not fit" in capsys.readouterr().err
    assert torch.is_tensor(next(iter(load_checkpoint(run / "checkpoints" / "last.safetensors")[0].values())))
