"""What a run writes beside its checkpoints: its configuration, and lines for an experiment tracker."""

import os
from pathlib import Path

from omegaconf import OmegaConf


def write_whole(path, content):
    """Write a file of text or bytes whole or not at all: what reads it never finds half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def record(trainer, config, run_dir):
    """Write config.yaml into the run folder and open the tracker that ``config`` names, in the first process."""
    if trainer.accelerator.is_main_process:
        OmegaConf.save(OmegaConf.create(config), run_dir / "config.yaml")
        trainer.tracker = open_tracker(config, run_dir)


def open_tracker(options, run_dir):
    """A function that hands a line (a dictionary with "step", pictures as paths) to wandb, if ``options`` say so."""
    mode = options["wandb"]["mode"]
    if mode not in ("disabled", "offline", "online"):
        raise ValueError(f"wandb.mode: got {mode!r}, allowed: disabled, offline, online")
    if mode == "disabled":
        return lambda line: None
    import wandb

    wandb.finish()  # the session of a sweep's job before, which would go on
    session = wandb.init(project=options["wandb"]["project"], mode=mode, dir=run_dir, config=options)

    def log(line):
        shown = {key: wandb.Image(str(value)) if isinstance(value, Path) else value for key, value in line.items()}
        session.log(shown, step=line["step"])

    return log
