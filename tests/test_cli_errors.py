"""What a user gets wrong: exit code 1 and one line that names the value and what is allowed, never a traceback."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from door import shell
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from paths import ROOT

import train
from eval.rollout import __main__ as rollout
from eval.shared.command import command
from eval.shared.compose import compose
from eval.shared.help import KEY
from eval.shared.overrides import CONFIG, LEFT_OUT, _plain, known_values, readable, task_folders


def arguments(workplace, *overrides):
    """Command line of a one-step run on the tiny data; ``overrides`` stand last and so win."""
    return [
        "--config-dir=config/pusht",
        "preset=smoke",
        "encoder.init=none",
        "training.max_steps=1",
        "rollout.episodes=0",
        f"task.data={workplace}/demos.zarr",
        f"cache_dir={workplace}/cache",
        f"output={workplace}/run",
        *overrides,
    ]


def only_error(code, text):
    """The one error line of a failed program; checks that there is one and no traceback."""
    assert code not in (0, None), text
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error:")]
    assert text.rstrip().endswith(line)  # it is the last thing that is seen
    return line


# (overrides, the start of the line)
OPTIONS = {
    "unknown key": (["training.batchsize=3"], "override: got 'training.batchsize' (did you mean 'training.batch_size'"),
    "missing data": (["task.data=human", "task.datasets.human.source=nowhere.zarr"], "task.data: got 'human'"),
    "crop": (["crop=200"], "crop: got 200 px, allowed: 1 to 96"),
    "unknown preset": (["preset=papr"], "preset: got 'papr' (did you mean 'paper'?), allowed: "),
    "unknown encoder": (["encoder=vit_bas"], "encoder: got 'vit_bas' (did you mean 'vit_base'?), allowed: "),
    "unknown attention": (["attention=fibo"], "attention: got 'fibo' (did you mean 'fibottention'?), allowed: "),
    "unknown task": (["task=pushtt"], "task: got 'pushtt' (did you mean 'pusht'?), allowed: "),
    "unknown config": (["--config-name=pretrian"], "--config-name: got 'pretrian' (did you mean 'pretrain'?)"),
    "unknown folder": (["--config-dir=config/puhst"], "--config-dir: got "),
    "dashes": (["--preset", "smoke"], "--preset: write preset=smoke"),
    "dashes and equals": (["--preset=smoke"], "--preset=smoke: write preset=smoke"),
    "no key=value": (["crop"], "override: got 'crop', allowed: key=value"),
    "unknown data": (["task.data=humann"], "task.data: got 'humann' (did you mean 'human'?)"),
    "data called path": (["task.data=path"], "task.data: got 'path'"),
    "no data set": (["task.data=train.py"], "train.py: got something that is not a readable zarr group"),
    "no such array": (["task.shape_meta.obs.image.source=images"], "demos.zarr: got no data/images for 'image'"),
    "patch": (
        ["encoder=vit_base", "encoder.patch_size=7", "encoder.drop_remainder=false", "crop=80"],
        "image size: got 80, allowed: a multiple of patch size 7",
    ),
    "horizon": (["model.horizon=32", "data.pad_after=7"], "horizon: got 32, allowed: at most 28"),
    "horizon's multiple": (["model.horizon=15"], "horizon: got 15, allowed: a multiple of 4"),
    "action steps": (["model.action_steps=16"], "action_steps: got 16, allowed: 1 to 15"),
    "frozen under another attention": (
        ["encoder.init=pretrained/pusht_encoder.safetensors", "attention=softmax"],
        "attention: got ",
    ),
    "missing weights": (["encoder.init=nowhere"], "checkpoint: got "),
    "missing run": (["resume={workplace}/none"], "checkpoint: got "),
    "all held out": (["data.val_ratio=0.9"], "val_ratio: got 0.9 of 4 episodes"),
    "negative seed": (["seed=-1"], "seed: got -1, allowed: >= 0"),
    "storage": (["storage=disk"], "storage: got 'disk', allowed: "),
    "device": (["device=gpu"], "device: got 'gpu', allowed: auto, cpu, cuda"),
    "cuda": (["device=cuda"], "device: got 'cuda'"),
    "tracker": (["wandb.mode=on"], "wandb.mode: got 'on', allowed: "),
    "simulator": (["task.env.name=pushh", "rollout.episodes=1"], "task.env.name: got 'pushh'"),
    "text for a number": (["data.val_ratio=some"], "data.val_ratio: got 'some', allowed: number"),
    "part of a step": (["training.epochs=1.5"], "training.epochs: got 1.5, allowed: integer"),
    "null": (["training.batch_size=null"], "training.batch_size: got None, allowed: integer"),
    "yes": (["encoder=vit_base", "encoder.pretrained=yes"], "encoder.pretrained: got 'yes', allowed: true/false"),
    "value for a section": (["training.ema=3"], "training.ema: got 3, allowed: section"),
    "rounds without an expert": (["dagger.rounds=-1"], "dagger.rounds"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option_gives_one_line_and_leaves_no_folder(workplace, capfd, case):
    overrides, start = OPTIONS[case]
    if case == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    overrides = [override.format(workplace=workplace) for override in overrides]
    given = arguments(workplace, *overrides)
    with pytest.raises(SystemExit) as stop, shell(given):
        train.cli(given)
    line = only_error(stop.value.code, capfd.readouterr().err)
    assert start in line, line
    assert not (workplace / "run").exists()


@pytest.mark.slow
def test_a_process_ends_with_the_line_and_code_1(workplace):
    environment = {key: value for key, value in os.environ.items() if key not in ("DEBUG", "HYDRA_FULL_ERROR")}
    result = subprocess.run(
        [sys.executable, "train.py", *arguments(workplace, "crop=200")],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert only_error(result.returncode, result.stderr).startswith("error: crop: got 200 px")


def test_without_a_task_the_tasks_are_listed(capfd):
    with pytest.raises(SystemExit) as stop, shell(["preset=smoke"]):
        train.cli(["preset=smoke"])
    line = only_error(stop.value.code, capfd.readouterr().err)
    assert line.startswith("error: --config-dir: got none, allowed: ") and "config/pusht" in line


def test_help_explains_itself_and_cfg_is_annotated(capsys):
    with shell(["--help"]):
        train.cli(["--help"])
    printed = capsys.readouterr().out
    assert all(f"config/{name} " in printed for name in task_folders()) and "preset=smoke" in printed
    given = ["--config-dir=config/pusht", "--cfg", "job", "training.lr=0.5"]
    with shell(given):
        train.cli(given)
    lines = capsys.readouterr().out.splitlines()
    (rate,) = [line for line in lines if line.startswith("  lr: ")]
    (steps,) = [line for line in lines if line.startswith("  obs_steps: ")]
    assert "0.5" in rate and "# To, observed" in steps
    keys = [line for line in lines if KEY.match(line)]
    assert sum("#" in line for line in keys) > len(keys) / 3


def test_an_eval_command_names_the_form_with_dashes(capsys):
    with pytest.raises(SystemExit):
        rollout.main(["--checkpoint", "x", "episodes=3"])
    assert "write --episodes 3" in capsys.readouterr().err


def test_rollouts_of_a_missing_checkpoint_give_one_line(monkeypatch, capsys):
    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(SystemExit) as stop:
        rollout.main(["--checkpoint", "nowhere", "--device", "cpu"])
    assert only_error(stop.value.code, capsys.readouterr().err).startswith("error: checkpoint: got nowhere")


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

    def allocate(library):
        library.empty(10**18)

    for library in (np, torch):
        with pytest.raises(SystemExit) as stop:
            command(allocate)(library)
        assert stop.value.code == 1 and capsys.readouterr().err.startswith("error: memory: got too little")
    for error in (
        TypeError("ours"),
        AssertionError("ours"),
        KeyError("ours"),
        RuntimeError("ours"),
    ):  # mistakes of the program keep theirs
        with pytest.raises(type(error)):
            main(error)
    monkeypatch.setenv("DEBUG", "1")
    with pytest.raises(ValueError, match="a"):
        main(ValueError("a"))


@pytest.mark.parametrize("group", ["attention", "denoiser", "encoder", "scheduler", "preset"])
def test_every_shipped_choice_has_the_known_types(group):
    for path in (CONFIG / group).glob("*.yaml"):
        kind = path.stem.partition("_")[0]
        task = {"image": "cifar10", "video": "pusht_turn", "language": "language", "translation": "translation"}
        config = compose(task.get(kind, "pusht") if group == "preset" else "pusht", [f"{group}={path.stem}"])
        assert config[group] == path.stem if group == "preset" else config[group]


def test_types_that_some_file_has_are_accepted():
    changes = {"crop=null": None, "crop=76": 76, "training.lr=1": 1, "training.gradient_clip=2": 2}
    for change, value in changes.items():
        assert OmegaConf.select(OmegaConf.create(compose("pusht", [change])), change.split("=")[0]) == value


def test_known_values_are_those_of_the_files():
    known = known_values()
    assert OmegaConf.load(CONFIG / "base/run.yaml").training.batch_size in known["training.batch_size"]
    assert {"paper", "fast", "small", "smoke"} <= set(known["preset"])  # presets and tasks' folders change the root
    assert known["task.env.name"] and known["encoder.patch_size"] and known["training.ema.power"]
    assert not any(key.startswith(("pusht", "preset.")) for key in known)


@pytest.mark.parametrize(
    "folder", ["é 数", "a (1)", "x,y", "k=v", "it's", "[b]", "{c}", "a b", "100%", "$x", "a:b", "#1"]
)
def test_paths_of_all_characters_can_be_given(tmp_path, folder):
    """Values that hydra's grammar cannot read are put in quotes; sweeps and lists stay what they are."""
    path = tmp_path / folder / "demos.zarr"
    path.mkdir(parents=True)
    assert compose("pusht", [f"task.data={path}"])["task"]["data"] == str(path)
    for sweeps in (False, True):
        (given,) = readable([f"task.data={path}"], sweeps=sweeps)
        assert OverridesParser.create().parse_override(given).value() == str(path)


def test_what_hydra_reads_stays_as_it_is():
    given = [
        "seed=1,2",
        "denoiser.widths=[1,2]",
        "attention=softmax",
        "--multirun",
        "data={a: 1}",
        "~seed",
        "x=",
        "x=1",
    ]
    assert readable(given) == readable(given, sweeps=True) == given


def test_every_key_has_a_known_type():
    """Also those that all files leave at null; data sets and what fills itself in apart."""
    known = known_values()
    left_out = {key for key in known if all(value is None for value in _plain(key, known))}
    others = {key for key in left_out if key.startswith(("hydra.", "task.datasets.", "task.env."))}
    assert left_out - others == set(LEFT_OUT)
