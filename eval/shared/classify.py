"""What eval.classify_image and eval.classify_video share: probes of frozen encoders, tests of trained classifiers."""

import json
from datetime import datetime
from pathlib import Path

import torch
from omegaconf import OmegaConf

from eval.benchmark import build_benchmark, image, video
from eval.benchmark.classification import adopt_encoder, describe, load_source, predict, summarise, write_summary
from eval.benchmark.fit import fit
from eval.benchmark.start import CHECKS
from eval.shared.classify_plots import plot_comparison
from eval.shared.compose import compose_at
from eval.shared.folders import own_folder, result_name, results_folder
from eval.shared.overrides import quoted
from eval.shared.run_config import check_new
from policy.checkpoint import load_model
from policy.files import write_whole

TESTED = {"image_classifier": ("image", image), "video_classifier": ("video", video)}
RANDOM = "random"  # in place of a run: the architecture of the others with random weights
PROBED = (RANDOM, "pretrained/pusht_policy.safetensors")  # without --encoder


def add_arguments(parser, data):
    """Options that both commands have; data: what --data names."""
    parser.add_argument("--data", help=data)
    parser.add_argument("--checkpoint", type=Path, metavar="RUN", help="test this trained classifier, no probe")
    parser.add_argument(
        "--encoder",
        nargs="+",
        default=[],
        metavar="RUN",
        help=f"runs or checkpoints whose encoders to probe, or {RANDOM} (default: {' '.join(PROBED)})",
    )
    parser.add_argument("--camera", help="whose encoder, of a policy with several")
    parser.add_argument("--output", type=Path, help="folder of the results (default: below runs/)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of config/base/*_probe.yaml")


def main(parser, arguments, *, kind):
    """Run the command; kind: "image" or "video"."""
    args = parser.parse_intermixed_args(arguments)
    changes = [value for value in args.encoder if "=" in value and not Path(value).exists()]
    args.encoder = [value for value in args.encoder if value not in changes]
    args.overrides += changes  # a key=value after several encoders
    if args.checkpoint is not None:
        test(args)
        return
    probe(args, kind)


def test(args):
    """Accuracy of a trained classifier on its test data, or on --data; writes summary.json and confusion.png."""
    if args.encoder or args.overrides or args.camera:
        raise ValueError("--checkpoint: got --encoder, --camera or key=value, too, allowed: --data, --output")
    model = load_model(args.checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    config = model.config
    if "classes" not in config:
        raise ValueError(f"--checkpoint: got a {config['model']['name']!r} run, allowed: a classifier")
    kind, module = TESTED[config["model"]["name"]]
    if args.data:  # an embedded task's run, or an older one, has no options of files
        defaults = compose_at(f"base/{kind}_probe", [])
        config = {key: defaults[key] for key in module.OF_FILES} | config | {"data": args.data}
    _, samples = module.open_data(config)
    if list(samples.classes) != config["classes"]:
        raise ValueError(f"--data: got classes {samples.classes}, allowed: those of the training, {config['classes']}")
    scores, labels = predict(model, samples, next(model.parameters()).device)
    summary = {"checkpoint": str(args.checkpoint), "data": config["data"], **summarise(scores, labels, samples.classes)}
    print(f"{config['data']}: {describe(summary)}")  # before it is written, which can fail
    output = results_folder(args.output, "runs/tests", args.checkpoint)
    write_summary(output, summary)
    print(f"results: {output}")


def probe(args, kind):
    """Train a head on each frozen encoder, test it, and compare them."""
    names = args.encoder or list(PROBED)
    if len(set(names)) < len(names):
        raise ValueError(f"--encoder: got {', '.join(names)}, allowed: each once")
    named = [name for name in names if name != RANDOM]
    sources = {name: load_source(name, args.camera) for name in named}
    like = sources[named[0]] if named else None
    configs = {
        name: probe_config(kind, args, source=sources.get(name, like), init=name if name in sources else "none")
        for name in names
    }
    place = args.output or f"runs/probes/{_stem(configs[names[0]]['data'])}_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    with own_folder(place, key="--output" if args.output else None) as output:
        folders = [output / f"{number}_{result_name(name)}" for number, name in enumerate(names)]
        folders = [output] if len(names) == 1 else folders
        for folder in folders:
            check_new(folder)
        summaries = {name: _probe_one(configs[name], folder) for name, folder in zip(names, folders, strict=True)}
        if len(names) > 1:
            compare(summaries, output)


def _probe_one(config, folder):
    """The summary of a probe in ``folder``."""
    torch.manual_seed(config["seed"])
    folder.mkdir(parents=True, exist_ok=True)
    benchmark = build_benchmark(config, folder)
    fit(benchmark, OmegaConf.create(config), folder)
    return benchmark.summary


def probe_config(kind, args, *, source, init):
    """The configuration of one probe, for the encoder ``source``, if any."""
    data = [f"data={quoted(args.data)}"] if args.data else []
    camera = [f"camera={args.camera}"] if args.camera else []
    config = compose_at(f"base/{kind}_probe", [*args.overrides, *data, *camera])
    if source is not None:
        adopt_encoder(config, source, args.overrides)
    config["encoder"] |= {"init": init, "freeze": True}
    CHECKS[config["model"]["name"]](config, args.overrides)
    return config


def compare(summaries, run_dir):
    """Write comparison.json and comparison.png of several {name: summary}, and print them as a table."""
    write_whole(run_dir / "comparison.json", json.dumps(summaries, indent=1))
    plot_comparison(run_dir / "comparison.png", summaries)
    chance = next(iter(summaries.values()))["chance"]
    print(f"\n| encoder | top-1 | 95 % interval |\n|---|---|---|\n| chance | {chance:.1%} | |")
    for name, summary in summaries.items():
        low, high = summary["top1_ci95"]
        print(f"| {name} | {summary['top1']:.1%} | {low:.1%} to {high:.1%} |")
    print(f"results: {run_dir}")


def _stem(data):
    return Path(data).name.split(".")[0]
