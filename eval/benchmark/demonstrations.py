"""What policies and keypoint pre-training share: demonstrations, encoders to start from, the simulator."""

from pathlib import Path

from accelerate import PartialState

from envs import close_env, make_env
from eval.shared.compose import locate_data
from eval.shared.overrides import ROOT
from policy.build import datasets_of
from policy.checkpoint import load_encoder_weights, load_model
from policy.dataset.zarr_checks import open_zarr


def open_demonstrations(config, task):
    """(training data, held-out data or None) of ``task``; fills in the environment that the data set names."""
    with PartialState().main_process_first():  # the others find what it rendered
        path = locate_data(task, config["cache_dir"])
    if "env_args" in task["env"]:  # rollouts happen in the environment that the data set is from
        task["env"]["env_args"] = open_zarr(path).attrs.get("env_args")
    return datasets_of(config, path)


def describe_windows(task, train_data, val_data):
    """One line about the demonstrations, and about those too short to use."""
    buffer = train_data.buffer
    held_out = len(val_data) if val_data else 0
    line = (
        f"{task['data']}: {buffer.num_episodes:,} episodes, {buffer.num_frames:,} frames;"
        f" {len(train_data):,} training windows, {held_out:,} held out"
    )
    windows = [data for data in (train_data, val_data) if data and hasattr(data, "unused")]
    unused, asked = sum(len(data.unused) for data in windows), sum(len(data.episodes) for data in windows)
    if unused:
        line += f"; {unused:,} of {asked:,} episodes are shorter than {train_data.shortest} frames and unused"
    return line


def begin_encoder(model, encoder, *, attention, resume):
    """As ``start_encoder`` with the section ``encoder``; a resumed run does not read the file that it started from."""
    freeze = encoder.get("freeze", False)
    if not resume:
        return start_encoder(model, init=encoder.get("init", "none"), freeze=freeze, attention=attention)
    if freeze:
        freeze_encoder(model)
    return "as in the checkpoint" + (", frozen" if freeze else "")


def start_encoder(model, *, init, freeze, attention):
    """Load ``init`` into every camera's encoder and freeze it if asked; returns a line that says so.

    Each camera starts from the one of the same name, or all from the only one there is. attention: of the model.
    Raises ValueError when the weights do not fit, or would be frozen under another attention than they learned with,
    which has the same parameters and would silently see something else.
    """
    notes = []
    if init != "none":
        source = load_model(Path(init) if Path(init).exists() else ROOT / init)
        learned = source.config["attention"]
        if freeze and learned != attention:
            raise ValueError(
                f"attention: got {attention}, allowed with the frozen encoder.init={init}: {learned};"
                " or encoder.freeze=false, or encoder.init=none"
            )
        sources = source.encoder.encoders
        for camera, encoder in model.encoder.encoders.items():
            if camera not in sources and len(sources) > 1:
                raise ValueError(f"encoder.init={init}: got cameras {', '.join(sources)}, allowed: one, or {camera!r}")
            start = sources[camera] if camera in sources else next(iter(sources.values()))
            notes += load_encoder_weights(encoder, start.state_dict(), f"encoder.init={init}")
    if freeze:
        freeze_encoder(model)
    weights = "random weights" if init == "none" else init
    return ", ".join([weights, "frozen" if freeze else "trained", *notes])


def freeze_encoder(model):
    """Train everything but the cameras' encoders."""
    model.encoder.encoders.requires_grad_(False)


def check_simulator(env_options):
    """Make the environment once: an error shows now, not after the first epochs."""
    try:
        close_env(make_env(**env_options))
    except ImportError as error:
        raise ImportError(f"{error}; rollout.episodes=0 trains without a simulator") from error
