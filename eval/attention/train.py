"""Every attention mechanism trained on the image benchmark, at equal steps and seeds; ``eval.attention --train``."""

import argparse
import json

import numpy as np
from omegaconf import OmegaConf
from tqdm import tqdm

from eval import classify_image
from eval.report.groups import seed_interval
from eval.shared import classify
from policy.checkpoint import LAST

FIRST_SEED = 42  # that of config/run.yaml
# What must not differ between the runs of a sweep; the rest depends on the machine or on the data.
SETTINGS = ("data", "image_size", "encoder", "attention", "augment", "recipe", "training")


def train(names, folder, *, seeds=1, **changes):
    """A row for each mechanism and seed: accuracy with its 95 % interval, minutes.

    changes: as of ``configure``. Runs lie in FOLDER/NAME/SEED; a finished one is not repeated, a stopped one goes on.
    Raises ValueError where the folder holds runs of other settings.
    """
    runs = [(name, seed) for seed in range(FIRST_SEED, FIRST_SEED + seeds) for name in names]
    rows = []
    with tqdm(total=len(runs), unit="run", leave=False, dynamic_ncols=True) as bar:
        for name, seed in runs:
            bar.set_description(f"training {name}, seed {seed}")
            summary = _run(configure(name, seed, **changes), folder / name / str(seed))
            numbers = ("top1", "top1_ci95", "chance", "test_samples", "parameters", "minutes")
            rows.append({"mechanism": name, "seed": seed, **{key: summary[key] for key in numbers}})
            bar.update()
    return rows


def configure(name, seed, *, data=None, preset=None, epochs=None, overrides=()):
    """The configuration of one run, that of ``python -m eval.classify_image --mode scratch``."""
    parser = argparse.ArgumentParser()
    classify.add_arguments(parser, modes=("scratch",), presets=classify_image.PRESETS)
    options = {"--data": data, "--preset": preset}
    chosen = [part for option, value in options.items() if value is not None for part in (option, value)]
    steps = [] if epochs is None else [f"training.epochs={epochs}"]
    line = ["--mode", "scratch", *chosen, *overrides, *steps, f"attention={name}", f"seed={seed}"]
    return classify_image.configure(classify.parse(parser, line))


def _run(config, folder):
    """The summary of the run in ``folder``, from there where it is finished."""
    stopped = (folder / "checkpoints" / LAST).exists()
    if stopped or (folder / "summary.json").exists():
        _check_same(config, OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")), folder)
    if (folder / "summary.json").exists():
        return json.loads((folder / "summary.json").read_text())
    return classify_image.run(classify.stored(folder) if stopped else config, folder, resume=stopped)


def _check_same(config, stored, folder):
    wrong = [key for key in SETTINGS if config.get(key) != stored.get(key)]
    if wrong:
        raise ValueError(f"--output: got {folder}, trained with other {', '.join(wrong)}, allowed: another folder")


def summarise(rows):
    """{mechanism: mean accuracy over seeds, its 95 % interval ("t" over seeds, or of the one run) and minutes}."""
    summaries = {}
    for name in dict.fromkeys(row["mechanism"] for row in rows):
        own = [row for row in rows if row["mechanism"] == name]
        values = [row["top1"] for row in own]
        interval = own[0]["top1_ci95"] if len(own) == 1 else np.clip(seed_interval(values), 0, 1).tolist()
        minutes = float(np.mean([row["minutes"] for row in own]))
        summaries[name] = {"top1": float(np.mean(values)), "interval": interval, "minutes": minutes, "seeds": len(own)}
    return summaries
