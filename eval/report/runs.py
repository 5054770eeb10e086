"""Runs as ``python -m eval.report`` reads them: configuration, metrics and rollouts of a folder."""

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from omegaconf import OmegaConf
from tqdm import tqdm
from yaml import YAMLError

from policy.checkpoint import find_checkpoint, load_checkpoint

SEEDS = ("seed", "training.seed")
ALLOWED = (
    "a run (config.yaml, metrics.jsonl), a folder of eval.rollout (summary.json), or a folder that such ones lie in"
)


@dataclass
class Run:
    """A training run, or one result of eval.rollout, which has a rollout and no metrics.

    options: {dotted key: value} of its configuration; lines: those of metrics.jsonl; rollouts: in the order of the
    steps, {"step", "folder", "score_mean", "success_rate"} and, where its summary.json is there, that one's keys.
    """

    folder: Path
    options: dict
    lines: list
    rollouts: list

    @property
    def task(self):
        return self.options.get("task.name", "unknown")

    @property
    def seed(self):
        """Seed of the run as text, "42", or "42/7" where that of the training differs from it."""
        seeds = dict.fromkeys(str(self.options[key]) for key in SEEDS if key in self.options)
        return "/".join(seeds) or "unknown"

    @property
    def last(self):
        return self.rollouts[-1] if self.rollouts else None

    @property
    def best(self):
        """The rollout with the largest ``training.score``."""
        key = self.options.get("training.score", "score_mean")
        return max(self.rollouts, key=lambda rollout: rollout.get(key, rollout["score_mean"]), default=None)

    @property
    def steps(self):
        return self.lines[-1]["step"] if self.lines else None

    @cached_property
    def steps_per_second(self):
        """As logged last: the mean since the training started, validation and rollouts included."""
        return next((line["steps_per_second"] for line in reversed(self.lines) if "steps_per_second" in line), None)

    @property
    def minutes(self):
        """Steps at their logged rate; of a resumed run as if all had gone at the rate since then."""
        return self.steps / self.steps_per_second / 60 if self.steps_per_second else None


def read_runs(paths):
    """(runs in ``paths`` and below them, sentences about folders that were left out).

    A folder that is named itself must be a run, or have one below it: ValueError or FileNotFoundError if not. Others
    may be unfinished or damaged.
    """
    runs, left_out = {}, []
    for path in map(Path, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"RUNS: got {path} (no folder), allowed: {ALLOWED}")
        folders, told = list(_folders(path)), len(left_out)
        for folder in tqdm(folders, desc="reading runs", unit="run", leave=False, dynamic_ncols=True):
            try:
                runs.setdefault(folder.resolve(), read_run(folder))
            except (ValueError, OSError) as error:
                left_out.append(str(error))
        if not any(folder.resolve() in runs for folder in folders):
            raise ValueError(f"RUNS: got {path} ({left_out[told]}), allowed: {ALLOWED}")
    return list(runs.values()), left_out


def _folders(path):
    """``path`` if it holds something of a run or nothing at all, else those below it; links are not followed."""
    children = sorted((child for child in path.iterdir() if child.is_dir() and not child.is_symlink()), key=_natural)
    children = [child for child in children if not child.name.startswith((".", "__"))]
    if any((path / name).is_file() for name in ("config.yaml", "metrics.jsonl", "summary.json")) or not children:
        yield path
    else:
        for child in children:
            yield from _folders(child)


def _natural(path):
    """Sorts 2 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def read_run(folder):
    """The run in ``folder``; raises ValueError where it is none, or has logged nothing."""
    if (folder / "summary.json").is_file():
        return _rollout_run(folder)
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: got no {name}")
    lines = read_lines(folder / "metrics.jsonl")
    if not lines:
        raise ValueError(f"{folder / 'metrics.jsonl'}: got no whole line")
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    except YAMLError as error:
        raise ValueError(f"{folder / 'config.yaml'}: got no YAML ({' '.join(str(error).split())})") from None
    rollouts = [_rollout(folder, line) for line in lines if "score_mean" in line]
    return Run(folder, flatten(config), lines, rollouts)


def read_lines(path):
    """Lines of metrics.jsonl as dictionaries; a last one that a kill tore is ignored, another raises ValueError."""
    texts, lines = path.read_text().splitlines(), []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            line["step"], line["epoch"]
        except (ValueError, KeyError, TypeError):
            if number < len(texts):
                raise ValueError(f"{path}: got {text[:40]!r} in line {number}, allowed: steps as JSON") from None
        else:
            lines.append(line)
    return lines


def _rollout(folder, line):
    """The rollout that a line of metrics.jsonl tells of, with its summary where that was kept."""
    rollout = folder / "rollouts" / f"epoch_{math.ceil(line['epoch']):04d}"
    summary = read_summary(rollout / "summary.json") if (rollout / "summary.json").is_file() else {}
    return {**summary, "step": line["step"], "folder": rollout, **{k: line[k] for k in ("score_mean", "success_rate")}}


def read_summary(path):
    """summary.json of a rollout; raises ValueError for another or a damaged file."""
    try:
        summary = json.loads(path.read_text())
        if {"score_mean", "success_rate", "score_ci95", "success_ci95", "episodes"} <= set(summary):
            return summary
    except (ValueError, TypeError):
        pass
    raise ValueError(f"{path}: got another or a damaged file, allowed: summary.json of a rollout")


def _rollout_run(folder):
    """A folder of eval.rollout; its configuration is that of its checkpoint, where that still exists."""
    summary = read_summary(folder / "summary.json")
    checkpoint = summary.get("checkpoint", "unknown")
    options = {"checkpoint": checkpoint}
    try:
        file = find_checkpoint(checkpoint)
        _, config, _ = load_checkpoint(file, prefix="none")
        name = file.stem.split("_score=")[0]  # every seed has a score of its own
        options = {**flatten(config), "checkpoint": name}
    except (OSError, ValueError):
        pass
    seeds = [row["seed"] for row in summary["episodes"]]
    options |= {"eval.rollout.episodes": len(seeds), "eval.rollout.seed": min(seeds, default=None)}
    return Run(folder, options, [], [{**summary, "step": None, "folder": folder}])


def flatten(section, prefix=""):
    """{dotted key: value} of nested dictionaries."""
    if not isinstance(section, dict):
        return {prefix: section}
    return {k: v for key, value in section.items() for k, v in flatten(value, f"{prefix}.{key}".lstrip(".")).items()}
