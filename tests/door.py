"""train.py inside this process, as from a shell; and a run that is stopped half-way."""

import os
import sys
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from paths import ROOT

import train
from eval.benchmark import build_benchmark
from eval.shared.run_config import write_config
from policy.training.trainer import Trainer


@contextmanager
def shell(arguments):
    """The command line, folder and environment that train.py has when it is typed in the repository."""
    before = sys.argv, os.getcwd(), dict(os.environ)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # as train.py sets it for its own process
    for name in ("RANK", "DEBUG"):
        os.environ.pop(name, None)
    sys.argv = ["train.py", *arguments]
    os.chdir(ROOT)
    try:
        yield
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
        os.environ.clear()
        os.environ.update(before[2])
        GlobalHydra.instance().clear()
        AcceleratorState._reset_state(reset_partial_state=True)


def door(task, *overrides, name=None):
    """``python train.py --config-dir=config/TASK [--config-name=NAME] OVERRIDES``; SystemExit where it fails."""
    given = [str(override) for override in overrides]
    arguments = [f"--config-dir=config/{task}", *([f"--config-name={name}"] if name else []), *given]
    with shell(arguments):
        train.cli(arguments)


def stopped_run(whole, half, steps):
    """A run in the folder ``half`` with the configuration of the run ``whole``, stopped after ``steps``."""
    composed = OmegaConf.load(whole / "config.yaml")
    half.mkdir()
    torch.manual_seed(composed.seed)
    benchmark = build_benchmark(OmegaConf.to_container(composed, resolve=True), half)
    write_config(half, composed, benchmark.config)
    if hasattr(benchmark, "tokens"):
        benchmark.tokens.save(half)
    trainer = Trainer(
        benchmark.model,
        benchmark.train_data,
        benchmark.val_data,
        options=composed.training,
        config=benchmark.config,
        run_dir=half,
        evaluate=benchmark.evaluate,
        device="cpu",
    )
    trainer.fit(stop_at=steps)
    return trainer
