"""Train anything: a policy, its encoder, an image or video classifier, a language model, translation.

    python train.py --config-dir=config/TASK [--config-name=NAME] [key=value ...]

    python train.py --config-dir=config/pusht                          a policy, 13 to 19 minutes on two CPU cores
    python train.py --config-dir=config/pusht preset=smoke             the same in a minute, to see everything run
    python train.py --config-dir=config/pusht --cfg job                every key with its value and what it means
    python train.py --config-dir=config/pusht --multirun seed=1,2,3    a sweep; python -m eval.report shows it
    python train.py --config-dir=config/pusht resume=RUN_FOLDER        go on exactly where a run stopped
    torchrun --nproc_per_node 2 train.py --config-dir=config/pusht     several processes

From here to the loss: the configuration, this file, eval/benchmark/policy.py, policy/training/trainer.py and
policy/diffusion.py; the encoder inside it: policy/encoder/vit.py, policy/attention/fibottention.py.
"""

import contextlib
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import hydra
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from eval.benchmark import build_benchmark
from eval.benchmark.fit import fit
from eval.benchmark.start import complete
from eval.shared.command import command
from eval.shared.compose import first_config
from eval.shared.folders import own_folder
from eval.shared.help import annotated, check_flags, config_dir, usage
from eval.shared.overrides import CONFIG, check_types, readable, task_folders
from eval.shared.run_config import check_new, stored_config
from eval.shared.tracker import check_tracker
from policy.training.options import check_training
from policy.training.processes import exit_on_signals, uses_cpu

WAIT = timedelta(hours=4)  # of the other processes, while the first one renders, rolls out or tests alone


def run(config, run_dir, resume=False):
    """Train what ``config`` (composed) describes in the folder ``run_dir``; returns the trainer."""
    check_types(config)
    check_training(config.training)
    check_tracker(config.wandb)
    torch.manual_seed(config.seed)
    benchmark = build_benchmark(OmegaConf.to_container(config, resolve=True), run_dir, resume=resume)
    return fit(benchmark, config, run_dir, resume=resume)


@command
def job(config):
    """Train what hydra composed, in the folder that it made."""
    if "RANK" not in os.environ:  # accelerate keeps precision and device for a whole process, which a sweep changes
        AcceleratorState._reset_state(reset_partial_state=True)
    first = PartialState(cpu=uses_cpu(config.device), timeout=WAIT).is_main_process
    settings, named = HydraConfig.get(), "resume" if config.resume else "output" if config.output else None
    changes, place = list(settings.overrides.task), [None]
    with contextlib.ExitStack() as stack:
        stack.enter_context(exit_on_signals())  # later the trainer saves first
        stored = stored_config(config.resume, changes) if config.resume else None
        if first:
            place = [stack.enter_context(own_folder(config.resume or settings.runtime.output_dir, key=named))]
        run_dir = Path(broadcast_object_list(place)[0])
        if stored is not None:
            return run(stored, run_dir, resume=True)
        check_new(run_dir)
        return run(complete(config, changes), run_dir)


def main(config):
    """One job. In a sweep one that fails says why and the others go on; only a signal ends them all."""
    settings = HydraConfig.get()
    sweeps = settings.mode == RunMode.MULTIRUN
    try:
        job(config)
        return
    except SystemExit as end:
        if not sweeps or end.code != 1:
            raise
    except Exception:
        if not sweeps:
            raise
        traceback.print_exc()
    # Here, without the frames of the error: hydra keeps what is raised to the end, and they hold the model.
    raise HydraException(f"job {settings.job.num} of the sweep failed: {' '.join(settings.overrides.task)}")


@command
def cli(arguments):
    """The command line."""
    folder = config_dir(arguments)
    if {"--help", "-h"} & set(arguments):
        print(usage(__doc__))
        return
    check_flags(arguments)
    if folder is None:
        names = ", ".join(f"config/{name}" for name in task_folders())
        raise ValueError(f"--config-dir: got none, allowed: {names}")
    sys.argv[1:] = readable(arguments, sweeps=bool({"--multirun", "-m"} & set(arguments)))  # where hydra reads them
    start = hydra.main(config_path=str(CONFIG), config_name=first_config(folder), version_base="1.3")(main)
    if {"--cfg", "-c"} & set(arguments):
        print(annotated(start))
    else:
        start()


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach ``command``, which prints one line
    cli(sys.argv[1:])
