"""Sweeps: ``python train.py --multirun`` runs its jobs one after another in one process, or hands them to a cluster."""

import contextlib
import gc
import json
import os
import subprocess
import sys
import types
import weakref

import numpy as np
import pytest
from door import door, shell
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from paths import ROOT

import train
from eval.report import __main__ as report
from eval.shared.command import command
from eval.shared.tracker import check_tracker, open_tracker


def arguments(workplace, *overrides):
    """Command line of a sweep of two-step runs without rollouts."""
    return [
        "--config-dir=config/pusht",
        "--multirun",
        "training.max_steps=2",
        "training.batch_size=16",
        "training.log_every=1",
        "rollout.episodes=0",
        f"task.data={workplace}/demos.zarr",
        f"cache_dir={workplace}/cache",
        f"output={workplace}/sweep",
        *overrides,
    ]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["train_loss"] for line in lines if "train_loss" in line]


@pytest.fixture(scope="module")
def sweep(workplace):
    """(folder, exit code, what was printed) of presets times precisions, one of which does not exist."""
    swept = arguments(workplace, "preset=fast,smoke", "training.precision=fp32,bf16,fp8,fp32")
    with open(workplace / "printed", "w+") as printed, contextlib.redirect_stderr(printed):
        with pytest.raises(SystemExit) as end, shell(swept):
            train.cli(swept)
        printed.seek(0)
        return workplace / "sweep", end.value.code, printed.read()


@pytest.mark.slow
def test_every_job_has_a_folder_and_its_own_options(sweep):
    folder, _, _ = sweep
    jobs = [("fast", "fp32"), ("fast", "bf16"), None, ("fast", "fp32"), ("smoke", "fp32"), ("smoke", "bf16"), None]
    for number, job in enumerate([*jobs, ("smoke", "fp32")]):
        run = folder / str(number)
        assert run.exists() == (run / "metrics.jsonl").exists() == (job is not None)  # a failed start leaves no folder
        if job is not None:
            config = OmegaConf.load(run / "config.yaml")
            assert (config.preset, config.training.precision) == job
            assert (run / "checkpoints" / "last.safetensors").exists()


@pytest.mark.slow
def test_a_sweep_over_precisions_changes_them(sweep):
    """And what a job computes does not depend on those before it."""
    folder, _, _ = sweep
    single, half, again = (losses(folder / number) for number in "013")
    assert len(single) == 2 and single == again
    assert half != single and np.allclose(half, single, rtol=0.1)


@pytest.mark.slow
def test_a_failed_job_says_why_and_the_others_go_on(sweep):
    _, code, printed = sweep
    assert code == 1
    assert printed.count("error: training.precision: got 'fp8', allowed: fp32, bf16") == 2
    assert "Traceback" not in printed
    last = printed.rstrip().splitlines()[-1]
    assert last.startswith("error: job 2 of the sweep failed: ") and "training.precision=fp8" in last


# One job -------------------------------------------------------------------------------------------------------------


def run_main(monkeypatch, fail, mode=RunMode.MULTIRUN):
    """What ``main`` does with a job that calls ``fail``."""
    settings = types.SimpleNamespace(mode=mode)
    settings.job, settings.overrides = types.SimpleNamespace(num=3), types.SimpleNamespace(task=["seed=1", "crop=2"])
    monkeypatch.setattr(train.HydraConfig, "get", lambda: settings)
    monkeypatch.setattr(train, "job", command(lambda config: fail()))
    return train.main(OmegaConf.create())


def test_a_failed_job_leaves_no_memory_behind(monkeypatch, capsys):
    """Hydra keeps the error until the end of the sweep; the frames that it came from held a model."""

    class Model:
        pass

    kept = []

    def broken():
        model = Model()
        kept.append(weakref.ref(model))
        raise RuntimeError("broken")

    with pytest.raises(HydraException, match="job 3 of the sweep failed: seed=1 crop=2") as raised:
        run_main(monkeypatch, broken)
    assert "RuntimeError: broken" in capsys.readouterr().err
    gc.collect()
    assert raised.value.__context__ is None and kept[0]() is None


def test_a_signal_ends_the_sweep(monkeypatch):
    def interrupted():
        raise SystemExit(130)

    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, interrupted)
    assert end.value.code == 130


def test_outside_of_a_sweep_an_error_is_what_it_was(monkeypatch, capsys):
    def wrong():
        raise ValueError("crop: got 2")

    with pytest.raises(SystemExit):
        run_main(monkeypatch, wrong, RunMode.RUN)
    assert capsys.readouterr().err == "error: crop: got 2\n"


@pytest.mark.parametrize("launched", [False, True])
def test_the_state_of_accelerate_is_reset_only_in_a_process_of_its_own(monkeypatch, launched):
    """Under torchrun it holds the connection to the other processes."""
    resets = []

    def stop(**options):
        raise ValueError("far enough")

    monkeypatch.setattr(train.AcceleratorState, "_reset_state", lambda **options: resets.append(options))
    monkeypatch.setattr(train, "PartialState", stop)
    monkeypatch.setenv("RANK", "0") if launched else monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        train.job(OmegaConf.create({"device": "cpu"}))
    assert resets == ([] if launched else [{"reset_partial_state": True}])


def test_every_job_has_a_wandb_session_of_its_own(monkeypatch, tmp_path):
    calls = []
    fake = types.SimpleNamespace(finish=lambda: calls.append("finish"), init=lambda **options: calls.append("init"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        open_tracker({"mode": "offline", "project": "p"}, {}, tmp_path)
    assert calls == ["finish", "init"] * 2


# Other kinds ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_of_language_models_and_its_report(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 60)
    small = ["model.dim=16", "model.depth=1", "model.num_heads=2", "context=16", "contexts=[0]", "stride=16"]
    door("language", "--multirun", "attention=softmax,performer", f"text={text}", f"output={tmp_path}/sweep", *small,
         "training.max_steps=2", "training.warmup_steps=1")  # fmt: skip
    report.main([str(tmp_path / "sweep"), "--output", str(tmp_path / "report.html")])
    shown = (tmp_path / "report.md").read_text()
    assert "softmax" in shown and "performer" in shown and "bits a byte" in shown


# On a cluster --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_submitit_runs_the_jobs_in_processes_of_their_own(workplace):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs pip install -e .[cluster]")
    target = workplace / "cluster"
    changes = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", f"output={target}"]
    swept = arguments(workplace, *changes, "preset=smoke", "training.precision=fp8,bf16")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "DEBUG", "HYDRA_FULL_ERROR")}
    result = subprocess.run(
        [sys.executable, "train.py", *swept],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "error: job 0 of the sweep failed" in result.stderr, result.stderr
    assert not (target / "0" / "config.yaml").exists()
    assert OmegaConf.load(target / "1" / "config.yaml").training.precision == "bf16" and len(losses(target / "1")) == 2
    logs = [path.read_text() for path in (target / ".submitit").glob("*/*.err")]
    assert sum("error: training.precision: got 'fp8', allowed: fp32, bf16" in log for log in logs) == 1


def test_online_tracking_without_a_key_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ValueError, match="wandb.mode: got 'online'.*wandb.mode=offline"):
        check_tracker({"mode": "online", "project": "p"})
    with pytest.raises(ValueError, match="wandb.mode: got 'on'"):
        check_tracker({"mode": "on"})
