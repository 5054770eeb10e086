"""What a user gets wrong: exit code 1 and one line that names the value and what is allowed, never a traceback."""

import os
import re
import runpy
import subprocess
import sys

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from paths import ROOT

import train  # also registers the resolvers of the configuration
from eval.rollout import loop as rollout
from eval.shared.command import check_types, command, known_values

CONFIG = ROOT / "config"


def arguments(workplace, *overrides):
    """Command line of a one-step run on the tiny data; ``overrides`` stand last and so win."""
    return [
        "--config-dir=config/pusht",
        "preset=smoke",
        "encoder.init=none",
        "training.max_steps=1",
        f"task.data={workplace}/demos.zarr",
        f"cache_dir={workplace}/cache",
        f"hydra.run.dir={workplace}/run",
        *overrides,
    ]


def only_error(code, text):
    """The one error line of a failed program; checks that there is one and no traceback."""
    assert code not in (0, None), text
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error:")]
    assert text.rstrip().endswith(line)  # it is the last thing that is seen
    return line


def unknown(kind, got, nearest, allowed):
    return rf"{kind}: got '{got}' \(did you mean '{nearest}'\?\), allowed: {allowed}"


# Each kind of defect as the user meets it, through a real process: (overrides, what the line must say).
PROCESSES = {
    "unknown key": (["training.batchsize=3"], unknown("override", "training.batchsize", "training.batch_size", "keys")),
    "missing data": (
        ["task.data=human", "task.datasets.human.source=nowhere.zarr"],
        "task.data: got 'human' .*allowed: embedded, human, scenes or a path; to get it: python -m policy.dataset",
    ),
    "crop": (["crop=200"], "crop: got 200 px, allowed: 1 to 96, the size of 'image'"),
}


@pytest.mark.parametrize("case", PROCESSES)
def test_a_wrong_command_line_gives_one_line(workplace, case):
    overrides, message = PROCESSES[case]
    environment = {key: value for key, value in os.environ.items() if key not in ("DEBUG", "HYDRA_FULL_ERROR")}
    result = subprocess.run(
        [sys.executable, "train.py", *arguments(workplace, *overrides)],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert re.match(f"error: {message}", only_error(result.returncode, result.stderr))


# The same program inside this process, where a case costs a tenth: (overrides, what the line must say).
OPTIONS = {
    "unknown preset": (["preset=papr"], unknown("preset", "papr", "paper", "auto, cpu, paper, small, smoke")),
    "unknown encoder": (
        ["encoder=vit_bas"],
        unknown("encoder", "vit_bas", "vit_base", "pvt_v2, resnet18, vit, vit_base, vit_image, vit_key"),
    ),
    "unknown attention": (
        ["attention=fibo"],
        unknown("attention", "fibo", "fibottention", ".*fibottention, fibottention_exclude, .*softmax"),
    ),
    "unknown task": (["task=pushtt"], unknown("task", "pushtt", "pusht", ".*pusht")),
    "unknown config": (
        ["--config-name=pretrian"],
        unknown("--config-name", "pretrian", "pretrain", "pretrain, typea, typeb, typec, typed"),
    ),  # fmt: skip  # noqa: E501
    "unknown folder": (["--config-dir=config/puhst"], "--config-dir: got .*config/puhst, allowed: .*config/pusht"),
    "no key=value": (["crop"], "override: got 'crop', allowed: key=value"),
    "unknown data": (["task.data=humann"], r"task.data: got 'humann' \(did you mean 'human'\?\) .*allowed: embedded, "),
    "data called path": (["task.data=path"], "task.data: got 'path' .* does not exist; allowed: embedded, human, scen"),
    "no data set": (["task.data=train.py"], "train.py: got something that is not a readable zarr group"),
    "no such array": (
        ["task.shape_meta.obs.image.source=images"],
        "demos.zarr: got no data/images for 'image', allowed: action, img, state",
    ),
    "patch": (
        ["encoder=vit_base", "encoder.patch_size=7", "encoder.drop_remainder=false", "crop=80"],
        "image size: got 80, allowed: a multiple of patch size 7",
    ),
    "horizon": (
        ["model.horizon=32", "data.pad_after=7"],
        r"horizon: got 32, allowed: at most 28 \(longest of 3 episodes: 20 frames, padding 1 \+ 7\)",
    ),
    "horizon's multiple": (["model.horizon=15"], "horizon: got 15, allowed: a multiple of 4"),
    "action steps": (["model.action_steps=16"], "action_steps: got 16, allowed: 1 to 15"),
    "frozen under another attention": (
        ["encoder.init=pretrained/pusht_encoder.safetensors", "attention=softmax"],
        "attention: got \\{'name': 'softmax'\\}, allowed with the frozen encoder.init=pretrained/.*'fibottention'",
    ),
    "missing weights": (["encoder.init=nowhere"], "checkpoint: got .*nowhere, allowed: a .safetensors file or a run"),
    "missing run": (["resume={workplace}/none"], "checkpoint: got .*last.safetensors, which is not a file"),
    "all held out": (["data.val_ratio=0.9"], "val_ratio: got 0.9 of 4 episodes, allowed: one that leaves some"),
    "negative seed": (["seed=-1"], "seed: got -1, allowed: >= 0"),
    "storage": (["storage=disk"], "storage: got 'disk', allowed: auto, ram, mmap, device"),
    "device": (["device=gpu"], "device: got 'gpu', allowed: auto, cpu, cuda"),
    "cuda": (["device=cuda"], "device: got 'cuda', but torch sees no CUDA device; allowed here: auto, cpu"),
    "tracker": (["wandb.mode=on"], "wandb.mode: got 'on', allowed: disabled, offline, online"),
    "simulator": (["task.env.name=pushh"], "task.env.name: got 'pushh', allowed: .*pusht"),
    "text for a number": (["data.val_ratio=some"], "data.val_ratio: got 'some', allowed: number, as in 0.02"),
    "part of a step": (["training.epochs=1.5"], "training.epochs: got 1.5, allowed: integer, as in "),
    "null": (["training.batch_size=null"], "training.batch_size: got None, allowed: integer, as in "),
    "yes": (
        ["encoder=vit_base", "encoder.pretrained=yes"],
        "encoder.pretrained: got 'yes', allowed: true/false, as",
    ),
    "value for a section": (["training.ema=3"], "training.ema: got 3, allowed: section, as in training.ema.power="),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option_gives_one_line(workplace, monkeypatch, capfd, case):
    overrides, message = OPTIONS[case]
    if case == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    overrides = [override.format(workplace=workplace) for override in overrides]
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("DEBUG", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as train.py sets it for its own process
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(workplace, *overrides)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("train.py", run_name="__main__")
    assert re.match(rf"error: (\S*/)?{message}", only_error(stop.value.code, capfd.readouterr().err))


def test_without_a_task_the_tasks_are_listed(monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["train.py", "preset=smoke"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("train.py", run_name="__main__")
    line = only_error(stop.value.code, capfd.readouterr().err)
    assert line.startswith("error: --config-dir: got none, allowed: ") and "config/pusht" in line


def test_rollouts_of_a_missing_checkpoint_give_one_line(monkeypatch, capsys):
    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop:
        rollout.main(["--checkpoint", "nowhere", "--device", "cpu"])
    line = only_error(stop.value.code, capsys.readouterr().err)
    assert line == (
        "error: checkpoint: got nowhere, allowed: a .safetensors file or a run folder with checkpoints/last.safetensors"
    )


# The pieces ----------------------------------------------------------------------------------------------------------


def test_command_prints_one_line_for_a_users_error_only(monkeypatch, capsys):
    @command
    def main(error):
        raise error

    monkeypatch.delenv("DEBUG", raising=False)
    for error in (ValueError("a\n  b"), FileNotFoundError("a b"), ImportError("a b")):
        with pytest.raises(SystemExit) as stop:
            main(error)
        assert stop.value.code == 1 and capsys.readouterr().err == "error: a b\n"
    for error in (TypeError("ours"), AssertionError("ours"), KeyError("ours")):  # mistakes of the program keep theirs
        with pytest.raises(type(error)):
            main(error)
    monkeypatch.setenv("DEBUG", "1")
    with pytest.raises(ValueError, match="a"):
        main(ValueError("a"))


def compose(*overrides, name="typea"):
    """The configuration of config/pusht as train.py composes it."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIG / "pusht")):
        return hydra.compose(name, [f"hydra.searchpath=[file://{CONFIG}]", *overrides])


@pytest.mark.parametrize("preset", [path.stem for path in (CONFIG / "preset").glob("*.yaml") if path.stem != "auto"])
def test_every_shipped_preset_has_the_known_types(preset):
    check_types(compose(f"preset={preset}"))


@pytest.mark.parametrize("group", ["attention", "denoiser", "encoder", "scheduler"])
def test_every_shipped_choice_has_the_known_types(group):
    for path in (CONFIG / group).glob("*.yaml"):
        check_types(compose("preset=paper", f"{group}={path.stem}"))


def test_types_that_some_file_has_are_accepted():
    check_types(compose(name="pretrain"))
    for change in ("crop=null", "crop=76", "training.lr=1", "training.gradient_clip=2", "training.max_steps=5"):
        check_types(compose("preset=paper", change))


def test_known_values_are_those_of_the_files():
    known = known_values()
    assert OmegaConf.load(CONFIG / "run.yaml").training.batch_size in known["training.batch_size"]
    assert {"paper", "cpu", "small", "smoke"} <= set(known["preset"])  # presets and tasks' folders change the root
    assert known["task.env.name"] and known["encoder.patch_size"] and known["training.ema.power"]
    assert not any(key.startswith(("pusht", "preset.")) for key in known)


@pytest.mark.parametrize(
    ("arguments_given", "expected"),
    [
        (["--config-dir=config/pusht"], "cpu"),
        (["preset=auto", "crop=84"], "cpu"),
        (["encoder.init=pretrained/pusht_encoder.safetensors"], "cpu"),
        (["encoder.init=runs/pusht/pretrain_1", "encoder.pretrained=true"], "cpu"),
        (["preset=smoke"], "smoke"),
        (["--config-name=pretrain"], None),
        (["-cn", "pretrain"], None),
        (["resume=runs/pusht/cpu_1"], None),
    ],
)
def test_the_preset_is_chosen_unless_one_is_asked_for(monkeypatch, arguments_given, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = [a for a in train.choose_preset(arguments_given) if a.startswith("preset=")]
    assert chosen == ([] if expected is None else [f"preset={expected}"])
