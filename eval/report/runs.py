"""Runs as ``python -m eval.report`` reads them: configuration, metrics and results of a folder."""

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import safe_open
from tqdm import tqdm
from yaml import YAMLError

from eval.report.kinds import CURVES, KINDS, Kind, kind_of
from eval.shared.run_config import check_references
from policy.checkpoint import find_checkpoint, load_checkpoint

SEEDS = ("seed", "training.seed")
OF_ONE_RUN = (*SEEDS, "output", "resume", "label", "wandb")  # keys, and sections, in which runs of one group may differ
CONFIGS = ("resolved.yaml", "config.yaml")  # the first that is there counts
ROLLOUT = {"score_mean", "success_rate", "score_ci95", "success_ci95", "episodes"}
METRICS = [metric for kind in KINDS.values() for metric in kind.metrics]
NUMBERS = {"step", "steps", "epoch", "steps_per_second", "minutes", "training_minutes", "parameters", *CURVES}
NUMBERS |= {metric.key for metric in METRICS}
INTERVALS = {metric.interval for metric in METRICS if metric.interval}
ALLOWED = "a run (config.yaml, metrics.jsonl), a result (summary.json), or a folder that such ones lie in"


@dataclass
class Run:
    """A training run, or the result of a test, which has a summary and no lines.

    options: {dotted key: value} of its configuration; lines: of metrics.jsonl, with the results of the rollouts that
    they tell of; summary: of summary.json.
    """

    folder: Path
    options: dict
    lines: list
    summary: dict

    @cached_property
    def kind(self) -> Kind:
        return kind_of(self.options.get("model.name"), self.last.keys())

    @property
    def task(self):
        """What it learns: a simulator's task, a data set, or a text."""
        found = (self.options.get(key) for key in ("data", "task.name", "text", "source"))
        name = next((value for value in found if isinstance(value, str)), None)
        embedded = self.options.get("model.name") in ("language", "translation")
        return Path(name).name if name else "embedded text" if embedded else "unknown"

    @property
    def seed(self):
        """Seed of the run as text, "42", or "42/7" where that of the training differs from it."""
        seeds = dict.fromkeys(str(self.options[key]) for key in SEEDS if key in self.options)
        return "/".join(seeds) or "unknown"

    @cached_property
    def last(self):
        """The newest value of every number, {key: value}; summary.json, written at the end, has the last word."""
        return {key: value for line in [*self.lines, self.summary] for key, value in line.items()}

    @cached_property
    def best(self):
        """The line, of those that were evaluated, with the best ``training.score``; or None."""
        key = self.options.get("training.score", self.kind.metrics[0].key)
        lines = [line for line in self.lines if key in line] or [self.summary] * (key in self.summary)
        sign = -1 if key.endswith("loss") else 1
        return max(lines, key=lambda line: sign * line[key], default=None)

    @property
    def steps(self):
        return self.last.get("step", self.last.get("steps"))

    @property
    def minutes(self):
        """Steps at the mean rate logged last; of a resumed run as if all had gone at the rate since then."""
        rate = self.last.get("steps_per_second")
        return self.steps / rate / 60 if rate else self.last.get("training_minutes", self.last.get("minutes"))

    @cached_property
    def parameters(self):
        """As summary.json says, or else counted in the checkpoint, its few constants included; None without any."""
        if "parameters" in self.summary:
            return self.summary["parameters"]
        try:
            with safe_open(find_checkpoint(self.summary.get("checkpoint", self.folder)), framework="pt") as file:
                names = [name for name in file.keys() if name.startswith("ema.")]  # noqa: SIM118 (not a dict)
                return sum(math.prod(file.get_slice(name).get_shape()) for name in names) or None
        except OSError:
            return None


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
    if any((path / name).is_file() for name in (*CONFIGS, "metrics.jsonl", "summary.json")) or not children:
        yield path
    else:
        for child in children:
            yield from _folders(child)


def _natural(path):
    """Sorts 2 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def read_run(folder):
    """The run in ``folder``; raises ValueError where it is none, or has logged nothing."""
    summary = read_summary(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    if summary and not (folder / "metrics.jsonl").is_file():
        return Run(folder, _options_of_result(summary), [], summary)
    config = next((folder / name for name in CONFIGS if (folder / name).is_file()), None)
    if config is None or not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{folder}: got no {'metrics.jsonl' if config else 'config.yaml'}")
    lines = read_lines(folder / "metrics.jsonl")
    if not lines:
        raise ValueError(f"{folder / 'metrics.jsonl'}: got no whole line")
    for line in lines:
        if "score_mean" in line:
            line |= {key: value for key, value in _rollout(folder, line).items() if key not in line}
    return Run(folder, flatten(_read_config(config)), lines, summary)


def _read_config(path):
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: got no YAML ({' '.join(str(error).split())})") from None
    plain = OmegaConf.to_container(loaded)
    try:
        check_references(plain, path)  # of a foreign run: a report is for others to read
        return OmegaConf.to_container(loaded, resolve=True)
    except (ValueError, OmegaConfBaseException):  # or a composed one without its resolvers
        return plain


def read_lines(path):
    """Lines of metrics.jsonl as dictionaries; a last one that a kill tore is ignored, another raises ValueError."""
    texts, lines = path.read_text(errors="replace").splitlines(), []
    for number, text in enumerate(texts, start=1):
        line = sound_numbers(text)
        if (
            line is not None
            and math.isfinite(line.get("step", math.nan))
            and math.isfinite(line.get("epoch", math.nan))
        ):
            lines.append(line)
        elif number < len(texts):
            raise ValueError(f"{path}: got {text[:40]!r} in line {number}, allowed: steps as JSON")
    return lines


def _rollout(folder, line):
    """Episodes and intervals of the rollout that a line of metrics.jsonl tells of, None where they are gone."""
    path = folder / "rollouts" / f"epoch_{math.ceil(line['epoch']):04d}" / "summary.json"
    summary = read_summary(path) if path.is_file() else {}
    return {key: summary.get(key) for key in sorted(ROLLOUT)}


def read_summary(path):
    """summary.json of a rollout, a test or a finished run; raises ValueError for another or a damaged file."""
    summary = sound_numbers(path.read_text(errors="replace"))
    if summary is not None:
        known = kind_of(None, summary.keys()).metrics[0].key in summary
        if known and (set(summary) >= ROLLOUT - INTERVALS or "score_mean" not in summary):
            return summary
    raise ValueError(f"{path}: got another or a damaged file, allowed: summary.json of a run or a test")


def sound_numbers(text):
    """The JSON object ``text`` without what is null in it; None for another text, or one whose numbers are none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    found = {key: value for key, value in found.items() if value is not None}
    shapes = {key: _is_number for key in NUMBERS} | {key: _is_interval for key in INTERVALS}
    shapes |= {"episodes": _are_episodes, "checkpoint": lambda value: isinstance(value, str)}
    return found if all(shapes[key](value) for key, value in found.items() if key in shapes) else None


def _is_number(value):
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e18)


def _is_interval(value):
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _are_episodes(value):
    keys = ("seed", "success")
    return isinstance(value, list) and all(
        isinstance(row, dict) and all(isinstance(row.get(key), int | float) for key in keys) for row in value
    )


def _options_of_result(summary):
    """Options of a result without a run: those of its checkpoint, where that still exists, and what it says itself."""
    options = {key: value for key, value in summary.items() if isinstance(value, str)}
    if "checkpoint" in summary:
        try:
            file = find_checkpoint(summary["checkpoint"])
            config = load_checkpoint(file, prefix="none")[1]
            options |= {**flatten(config), "checkpoint": file.stem.split("_score=")[0]}  # every seed has another score
        except (OSError, ValueError):
            pass
    if "episodes" in summary:
        seeds = [row["seed"] for row in summary["episodes"]]
        options |= {"eval.rollout.episodes": len(seeds), "eval.rollout.seed": min(seeds, default=None)}
    return options


def flatten(section, prefix=""):
    """{dotted key: value} of nested dictionaries."""
    if not isinstance(section, dict):
        return {prefix: section}
    return {k: v for key, value in section.items() for k, v in flatten(value, f"{prefix}.{key}".lstrip(".")).items()}
