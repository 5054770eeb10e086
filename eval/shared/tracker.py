"""Lines of metrics for an experiment tracker."""

from pathlib import Path

MODES = ("disabled", "offline", "online")


def open_tracker(wandb_options, config, run_dir):
    """A function that hands a line (a dictionary with "step", pictures as paths) to wandb, or None where disabled.

    wandb_options: {"mode", "project"}; config: all of the run's. Raises ValueError for an unknown mode.
    """
    mode = wandb_options["mode"]
    if mode not in MODES:
        raise ValueError(f"wandb.mode: got {mode!r}, allowed: {', '.join(MODES)}")
    if mode == "disabled":
        return None
    import wandb

    wandb.finish()  # the session of a sweep's job before, which would go on
    session = wandb.init(project=wandb_options["project"], mode=mode, dir=run_dir, config=config)

    def log(line):
        shown = {key: wandb.Image(str(value)) if isinstance(value, Path) else value for key, value in line.items()}
        session.log(shown, step=line["step"])

    return log
