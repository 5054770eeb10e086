"""Lines of metrics for an experiment tracker."""

from pathlib import Path

from policy.registry import choose

MODES = ("disabled", "offline", "online")


def check_tracker(wandb_options):
    """Raise ValueError for an unknown mode, or for "online" where wandb knows no key, before anything is computed."""
    if choose("wandb.mode", wandb_options["mode"], MODES) == "online":
        import wandb

        try:
            wandb.login(force=True)
        except wandb.Error as error:
            allowed = "wandb.mode=offline, or online after `wandb login`"
            raise ValueError(f"wandb.mode: got 'online', but {error} Allowed: {allowed}") from error


def open_tracker(wandb_options, config, run_dir):
    """A function that hands a line (a dictionary with "step", pictures as paths) to wandb, or None where disabled.

    wandb_options: {"mode", "project"}, checked; config: all of the run's.
    """
    mode = wandb_options["mode"]
    if mode == "disabled":
        return None
    import wandb

    wandb.finish()  # the session of a sweep's job before, which would go on
    session = wandb.init(project=wandb_options["project"], mode=mode, dir=run_dir, config=config)

    def log(line):
        shown = {key: wandb.Image(str(value)) if isinstance(value, Path) else value for key, value in line.items()}
        session.log(shown, step=line["step"])

    return log
