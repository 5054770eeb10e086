"""Runs and checkpoints of others: what they say imports no module and reads nothing of this machine."""

import sys

import pytest
import tiny
from commands import call
from omegaconf import OmegaConf
from run_folders import write_finished

from eval import attention_map
from eval.benchmark.classification import adopt_encoder
from eval.realtime import __main__ as realtime
from eval.report.runs import read_runs
from eval.rollout import __main__ as rollout
from eval.rollout.loop import loop_options
from eval.shared.compose import compose_task
from eval.shared.run_config import check_references, stored_config, write_config
from eval.speed import __main__ as speed
from policy import load_encoder, load_policy
from policy.checkpoint import save_checkpoint

FOREIGN = "foreign_helpers"


@pytest.fixture
def helpers(tmp_path, monkeypatch):
    """The file that a module of a foreign checkpoint writes when it is imported; the module lies in this folder."""
    text = f"""
from pathlib import Path
import fake_env
Path({str(tmp_path / "executed")!r}).touch()
class Env(fake_env.FakeEnv): pass
"""
    (tmp_path / f"{FOREIGN}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, FOREIGN, raising=False)
    return tmp_path / "executed"


def checkpoint(path, **changes):
    """A policy with a camera whose environment is a module beside it."""
    config = tiny.policy_config(images=True)
    config["task"]["env"] = {"name": f"{FOREIGN}:Env"}
    config |= {key: {**config[key], **value} for key, value in changes.items()}
    return tiny.save(path, tiny.policy(images=True), config)


COMMANDS = {
    "rollout": (rollout.main, ["--episodes", "1", "--videos", "0"]),
    "realtime": (realtime.main, ["--episodes", "1"]),
    "attention_map": (attention_map.main, []),
    "speed": (speed.main, ["--episodes", "1"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_imports_nothing_unless_it_is_allowed(helpers, tmp_path, capsys, command):
    path = checkpoint(tmp_path / "x.safetensors")
    load_policy(path), load_encoder(path)  # neither needs an environment
    main, options = COMMANDS[command]
    arguments = [*(["rollout"] if command == "speed" else []), "--checkpoint", path, *options]
    code, _, (line,) = call(main, capsys, *arguments)
    assert code == 1 and not helpers.exists()
    assert f"task.env.name: got '{FOREIGN}:Env', allowed: pusht" in line and "--allow-import" in line


def test_an_import_may_be_allowed(helpers, tmp_path, capsys):
    config = tiny.policy_config()
    config["task"]["env"] = {"name": f"{FOREIGN}:Env", "length": 4}
    path = tiny.save(tmp_path / "x.safetensors", tiny.policy(), config)
    arguments = ["--checkpoint", path, "--episodes", "1", "--videos", "0", "--output", tmp_path / "out"]
    assert call(rollout.main, capsys, *arguments, "--allow-import")[0] == 0
    assert helpers.exists() and (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize("env", [None, 3, [], {}, {"name": None}, {"name": ["x"]}, {"name": "pusht", "x": 1}], ids=str)
def test_environments_that_are_none(tmp_path, capsys, env):
    config = tiny.policy_config()
    config["task"]["env"] = env
    path = tiny.save(tmp_path / "x.safetensors", tiny.policy(), config)
    code, _, (line,) = call(rollout.main, capsys, "--checkpoint", path, "--output", tmp_path / "out")
    assert code == 1 and "task.env" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"batch": 10**9}, {"workers": -1}, {"num_envs": "many"}, {"batch": 0.5}], ids=str)
def test_a_checkpoint_cannot_ask_for_any_number_of_processes_or_rows(options):
    policy = tiny.policy()
    policy.config = {"rollout": options}
    (key,) = options
    with pytest.raises(ValueError, match=key):
        loop_options(policy, num_envs=None, workers=None, batch=None)


# Resuming ------------------------------------------------------------------------------------------------------------


def stored(folder, change):
    """The folder of a run whose composed configuration somebody edited with ``change``."""
    config = compose_task("pusht", [])
    write_config(folder, config, OmegaConf.to_container(config, resolve=True))
    plain = OmegaConf.to_container(config)
    change(plain)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))
    save_checkpoint(folder / "checkpoints" / "last.safetensors", {}, config={}, state={"step": 0})


def test_a_run_of_others_imports_nothing(tmp_path):
    stored(tmp_path, lambda config: config["task"]["env"].update(name=f"{FOREIGN}:Env"))
    with pytest.raises(ValueError, match=f"task.env.name: got '{FOREIGN}:Env', allowed: pusht"):
        stored_config(tmp_path, [])
    typed = f"task.env.name={FOREIGN}:Env"
    assert stored_config(tmp_path, [typed]).task.env.name == f"{FOREIGN}:Env"


SECRETS = (
    *("${oc.env:SECRET}", "x${oc.env:SECRET}", "${given:${oc.env:SECRET}}", "${stem:'${oc.env:SECRET}'}"),
    *("${ oc.env:SECRET}", "${oc.decode:${oc.env:SECRET}}", "${${label}:SECRET}", "${oc.${label}:SECRET}"),
    *("${hydra:runtime.cwd}", "${run_dir:a,b,c,d}", "${oc.create:{a: 1}}", "\\\\${oc.env:SECRET}"),
)


@pytest.mark.parametrize("text", SECRETS)
def test_a_run_of_others_reads_nothing_of_this_machine(tmp_path, monkeypatch, text):
    monkeypatch.setenv("SECRET", "password")
    stored(tmp_path / "run", lambda config: config["wandb"].update(project=text))
    with pytest.raises(ValueError, match="run: wandb.project: got "):
        stored_config(tmp_path / "run", [])
    inside = {"list": ["plain", {"deep": text}]}  # of a checkpoint, the only configuration of older runs
    save_checkpoint(tmp_path / "old" / "checkpoints" / "last.safetensors", {}, config=inside, state={"step": 0})
    with pytest.raises(ValueError, match="old: list.1.deep: got "):
        stored_config(tmp_path / "old", [])


def test_a_run_that_was_started_with_such_a_text_resumes_with_its_value(tmp_path, monkeypatch):
    monkeypatch.setenv("LABEL", "mine")
    config = compose_task("pusht", ["label='${oc.env:LABEL}'"])
    write_config(tmp_path, config, OmegaConf.to_container(config, resolve=True))
    save_checkpoint(tmp_path / "checkpoints" / "last.safetensors", {}, config={}, state={"step": 0})
    monkeypatch.delenv("LABEL")
    assert stored_config(tmp_path, []).label == "mine"


def test_what_runs_refer_to_is_welcome():
    references = ["${label}", "runs/${task.name}/${a.b[0]}", "${scaled:${base_lr},${training.batch_size}}", "$5 {x}"]
    check_references({"a": references, "b": {"c": "${stem:${data}}", "d": None, "e": 0.5}}, "run")


def test_the_encoder_of_others_reads_nothing_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "password")
    config = compose_task("cifar10", [])
    OmegaConf.set_struct(config, False)
    source = load_encoder(checkpoint(tmp_path / "x.safetensors", encoder={"init": "${oc.env:SECRET}"}))
    with pytest.raises(ValueError, match="encoder.init: encoder.init: got "):
        adopt_encoder(config, source, [])


def test_a_report_shows_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "password")
    folder = write_finished(tmp_path / "run", "language", label="${oc.env:SECRET}")
    (run,) = read_runs([folder])[0]
    assert run.options["label"] == "${oc.env:SECRET}"
