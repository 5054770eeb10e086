"""What the language and the translation command share: arguments, training, a table of several mechanisms."""

import json
import os
from datetime import datetime
from pathlib import Path

import torch
from omegaconf import OmegaConf

from eval.shared.classify import stored
from eval.shared.compose import compose_at
from eval.shared.tracker import record, write_whole
from policy.build import build_model
from policy.training.curves import read_metrics
from policy.training.trainer import Trainer


def add_arguments(parser):
    """Options that both commands have."""
    parser.add_argument(
        "--attention", nargs="+", default=[], metavar="NAME", help="a file of config/attention; several: one run each"
    )
    parser.add_argument("--preset", choices=("cpu", "paper"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder of the results (default: below runs/)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a stopped run, that alone")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")


def parse(parser, arguments):
    """The arguments, in any order: a key=value after several mechanisms is one of the overrides."""
    args = parser.parse_intermixed_args(arguments)
    args.overrides += [value for value in args.attention if "=" in value]
    args.attention = [value for value in args.attention if "=" not in value]
    if len(set(args.attention)) < len(args.attention):
        raise ValueError(f"--attention: got {', '.join(args.attention)}, allowed: each once")
    return args


def main(args, *, kind, overrides, open_data, run, columns):
    """What both commands do with their arguments.

    overrides: more of the command line's; open_data(config, run_dir) -> data, run_dir being None for a new run;
    run(config, data, run_dir, resume) -> summary; columns: {heading: function summary -> text} of the table.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"processes: got {os.environ['WORLD_SIZE']}, allowed with this command: 1")
    if args.resume:
        if args.overrides or args.attention or args.output or overrides:
            raise ValueError("--resume: got other options, too, allowed: none, a resumed run keeps its own")
        config = stored(args.resume)
        check_kind(config, kind, args.resume)
        run(config, open_data(config, args.resume), args.resume, resume=True)
        return
    changes = [*args.overrides, *overrides, f"{kind}/preset@_global_={args.preset}"]
    names = args.attention or [None]
    configs = [compose_at(f"{kind}/base", [*changes, *([f"attention={name}"] if name else [])]) for name in names]
    data = open_data(configs[0], None)
    for config in configs:  # what one mechanism refuses is said before the others are trained
        config["model"]["vocabulary"] = data["tokens"].size
        build_model(config)
    output = args.output or Path("runs") / kind / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    folders = [output / name if len(names) > 1 else output for name in names]
    for folder in folders:
        if (folder / "metrics.jsonl").exists() or (folder / "checkpoints").exists():
            raise ValueError(f"--output: got {folder}, which holds a run, allowed: a new folder, or --resume {folder}")
    summaries = {}
    for config, folder in zip(configs, folders, strict=True):
        summaries[folder.name] = run(config, data, folder, resume=False)
    if len(names) > 1:
        compare(summaries, output, columns)


def check_kind(config, kind, path):
    """Raise ValueError where the run at ``path`` is of another model than ``kind``."""
    if config["model"]["name"] != kind:
        raise ValueError(f"{path}: got a {config['model']['name']!r} run, allowed: a {kind!r} run")


def quoted(key, path):
    """The override that sets ``key`` to a path, whatever characters it has."""
    text = str(path).replace("\\'", "\\\\'").replace("'", "\\'")
    return f"{key}='{text}'"


def fit(config, data, run_dir, *, resume):
    """Train what ``config`` describes on data["train"] in the folder ``run_dir``; returns the trainer."""
    torch.manual_seed(config["seed"])
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        build_model(config),
        data["train"],
        data["valid"],
        options=OmegaConf.create(config["training"]),
        config=config,
        run_dir=run_dir,
        device=config["device"],
    )
    if resume:
        trainer.resume()
    record(trainer, config, run_dir)
    data["tokens"].save(run_dir)
    trainer.fit()
    return trainer


def describe(trainer, config):
    """What every summary begins with."""
    return {
        "attention": config["attention"]["name"],
        "attention_options": config["attention"],
        "tokens": config["tokens"],
        "vocabulary": config["model"]["vocabulary"],
        "parameters": sum(parameter.numel() for parameter in trainer.raw_model.parameters()),
        "steps": trainer.step,
        "validation_loss": [line["val_loss"] for line in read_metrics(trainer.folder.path) if "val_loss" in line][-1],
    }


def compare(summaries, output, columns):
    """Write comparison.json and comparison.png of several {name: summary}, and print them as a Markdown table."""
    write_whole(output / "comparison.json", json.dumps(summaries, indent=1))
    print("| attention |" + "".join(f" {heading} |" for heading in columns))
    print("|---|" + "---|" * len(columns))
    for name, summary in summaries.items():
        print(f"| {name} |" + "".join(f" {form(summary)} |" for form in columns.values()))
    _plot(output, summaries)
    print(f"results: {output}")


def _plot(output, summaries):
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("train_loss", "val_loss"), strict=True):
        for name in summaries:
            points = [(line["step"], line[key]) for line in read_metrics(output / name) if key in line]
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else None)
        axes.set(title=key, xlabel="step", ylabel="nats a token")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(output / "comparison.png", dpi=110)
