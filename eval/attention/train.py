"""Every attention mechanism trained on the image benchmark, at equal steps and seeds; ``eval.attention --train``."""

import json

import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from eval.benchmark import build_benchmark
from eval.benchmark.fit import fit
from eval.benchmark.start import complete
from eval.shared.classify import quoted
from eval.shared.compose import compose_task
from eval.shared.intervals import seed_interval
from eval.shared.overrides import task_folders
from eval.shared.run_config import COMPOSED, stored_config
from policy.checkpoint import LAST

FIRST_SEED = 42  # that of config/base/run.yaml
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
    """The composed configuration of one run, that of ``python train.py --config-dir=config/DATA attention=NAME``.

    data: a folder of config/, or what config/images takes as data=...; pusht_octant by default.
    """
    folder = data or "pusht_octant"
    changes = [*overrides, f"attention={name}", f"seed={seed}"]
    if folder not in task_folders():
        folder, changes = "images", [*changes, f"data={quoted(data)}"]
    changes += [f"preset={preset}"] if preset else []
    changes += [f"training.epochs={epochs}"] if epochs is not None else []
    return complete(compose_task(folder, changes), changes)


def _run(config, folder):
    """The summary of the run in ``folder``, from there where it is finished."""
    stopped = (folder / "checkpoints" / LAST).exists()
    if stopped or (folder / "summary.json").exists():
        _check_same(config, OmegaConf.load(folder / COMPOSED), folder)
    if not (folder / "summary.json").exists():
        config = stored_config(folder, []) if stopped else config
        torch.manual_seed(config.seed)
        benchmark = build_benchmark(OmegaConf.to_container(config, resolve=True), folder, resume=stopped)
        fit(benchmark, config, folder, resume=stopped)
    return json.loads((folder / "summary.json").read_text())


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
