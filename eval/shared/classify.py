"""What the image and the video benchmark share: encoders of runs as backbones, training, testing, results."""

import json
import time
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from omegaconf import OmegaConf
from tqdm import tqdm

from eval.shared.classify_plots import plot_comparison, plot_confusion
from eval.shared.compose import ROOT, compose_at
from eval.shared.intervals import rate_interval
from eval.shared.tracker import record, write_whole
from policy.build import build_model
from policy.checkpoint import LAST, load_checkpoint, load_encoder, load_encoder_weights, load_weights
from policy.training.trainer import Trainer, to_tensors, uses_cpu

WAIT = timedelta(hours=4)  # of the other processes, while the first one tests alone
RANDOM = "random"  # in place of a run: the architecture of the others with random weights
PROBED = (RANDOM, "pretrained/pusht_policy.safetensors")  # without --encoder


def add_arguments(parser, *, modes, presets=("cpu", "small", "paper")):
    """Options that both commands have."""
    parser.add_argument("--data", help="an embedded task, a named data set or a path (default: an embedded task)")
    parser.add_argument("--mode", choices=modes, default="probe", help="(default: %(default)s)")
    parser.add_argument(
        "--encoder",
        nargs="+",
        default=[],
        metavar="RUN",
        help=f"run folders or checkpoints, or {RANDOM}; probe: several",
    )
    parser.add_argument("--camera", help="whose encoder, of a policy with several")
    parser.add_argument("--preset", choices=presets, help="sizes and recipe (default: cpu)")
    parser.add_argument("--output", type=Path, help="folder of the results (default: below runs/)")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a stopped run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")


def parse(parser, arguments):
    """The arguments, in any order: a key=value after several encoders is one of the overrides."""
    args = parser.parse_intermixed_args(arguments)
    changes = [value for value in args.encoder if "=" in value and not Path(value).exists()]
    args.encoder = [value for value in args.encoder if value not in changes]
    args.overrides += changes
    return args


def main(args, *, kind, configure, run):
    """What both commands do with their arguments."""
    if args.resume:
        config = stored(args.resume)
        _join(config)
        run(config, args.resume, resume=True)
        return
    names = args.encoder or (list(PROBED) if args.mode == "probe" else [])
    _check_encoders(args, names)
    named = [name for name in names if name != RANDOM]
    sources = {name: load_source(name, args.camera) for name in named}
    like = sources[named[0]] if named else None
    summaries, output = {}, None
    for number, name in enumerate(names or ["none"]):
        source = sources.get(name)
        config = configure(args, source=source or (like if name == RANDOM else None), init=name if source else "none")
        _join(config)
        output = output or _broadcast(args.output or default_output(kind, config))
        folder = output / f"{number}_{Path(name).stem}" if len(names) > 1 else output
        summaries[name] = run(config, folder, source=source)
    if len(names) > 1 and PartialState().is_main_process:
        compare(summaries, output)


def _check_encoders(args, names):
    """ValueError where ``--encoder`` and ``--mode`` do not go together."""
    allowed = {"probe": range(1, 100), "finetune": range(1, 2), "scratch": range(1), "pretrain": range(2)}[args.mode]
    timm_weights = args.mode == "finetune" and "encoder.pretrained=true" in args.overrides
    if len(names) not in allowed and not (timm_weights and not names):
        counts = {"probe": "1 or more", "pretrain": "0 or 1"}.get(args.mode, f"{allowed.start}")
        raise ValueError(f"--encoder: got {len(names)}, allowed with --mode {args.mode}: {counts}")
    if len(set(names)) < len(names):
        raise ValueError(f"--encoder: got {', '.join(names)}, allowed: each once")


def _join(config):
    """Meet the other processes, where accelerate or torchrun started several; the first call decides how."""
    PartialState(cpu=uses_cpu(config["device"]), timeout=WAIT)


def _broadcast(path):
    """The first process's ``path``, for all of them: its name holds the time."""
    return Path(broadcast_object_list([str(path)])[0])


def load_source(name, camera=None):
    """The encoder of a run or checkpoint, whose path is relative to here or to the repository."""
    return load_encoder(Path(name) if Path(name).exists() else ROOT / name, camera=camera)


def configure(kind, args, *, source=None, init="none", preset="cpu"):
    """The configuration of config/KIND/MODE.yaml with the command line's changes, for the encoder ``source`` if any.

    preset: where the command line names none. Encoder, attention and size of the pictures are those of ``source``,
    unless the command line says otherwise.
    """
    overrides = [*args.overrides, f"{kind}/preset@_global_={args.preset or preset}"]
    overrides += [f"data={args.data}"] if args.data else []
    config = compose_at(f"{kind}/{args.mode}", overrides)
    if source is None:
        return config
    changed = [change.split("=", 1)[0].lstrip("+") for change in args.overrides]
    if "encoder" in changed:
        raise ValueError("encoder: got another one, allowed with --encoder: its options, encoder.KEY=VALUE")
    composed = config["encoder"]
    config["encoder"] = {key: value for key, value in source.config["encoder"].items() if key != "pretrained"}
    for key in changed:
        if key.startswith("encoder."):
            config["encoder"][key.removeprefix("encoder.")] = composed[key.removeprefix("encoder.")]
    config["encoder"] |= {"init": init, "freeze": args.mode == "probe"}
    if "attention" not in changed:
        names = [key.removeprefix("attention.") for key in changed if key.startswith("attention.")]
        config["attention"] = source.config["attention"] | {name: config["attention"][name] for name in names}
    if "image_size" not in changed:
        config["image_size"] = image_size_of(source)
    return config


def refuse_changes(args, keys, where):
    """ValueError where the command line changes one of ``keys`` (or of their groups), which ``where`` does not use."""
    for change in args.overrides:
        name = change.split("=", 1)[0].lstrip("+")
        if any(name == key or name.startswith(f"{key}.") for key in keys):
            raise ValueError(f"{name}: got a change, but {where}")


def image_size_of(encoder):
    """Side in px of the pictures that ``encoder``, from ``load_encoder``, was trained on."""
    if encoder.config["crop"] is not None:
        return encoder.config["crop"]
    return encoder.config["task"]["shape_meta"]["obs"][encoder.camera]["shape"][-1]


def complete(config, data):
    """Add to ``config`` what only the data say: the observations, and the classes."""
    size = config["image_size"]
    observation = {"image": {"type": "rgb", "shape": [3, size, size]}}
    config |= {"crop": None, "task": {"name": config["data"], "shape_meta": {"obs": observation}}}
    if config["mode"] != "pretrain":
        config["classes"] = list(data.classes)
        config["model"]["num_classes"] = data.num_classes
    return config


def fit(config, train_data, test_data, *, run_dir, source=None, resume=False):
    """Train what ``config`` describes in the folder ``run_dir`` with the one trainer; returns it and the test data.

    source: an encoder whose weights to start from. A frozen encoder's features are computed once, before; the test
    data that are returned are then these.
    """
    torch.manual_seed(config["seed"])
    model = build_model(config)
    if resume:  # a frozen encoder's features are those of its run
        load_weights(model, load_checkpoint(run_dir / "checkpoints" / LAST, prefix="model.")[0], str(run_dir))
    if source is not None:
        notes = load_encoder_weights(model.encoder.encoders["image"], source.state_dict(), config["encoder"]["init"])
        print(", ".join([f"encoder: {config['encoder']['init']}", *notes]))
    if config["encoder"]["freeze"]:
        model.encoder.requires_grad_(False)
        train_data, test_data = (CachedFeatures(model, data) for data in (train_data, test_data))
    tests = config["mode"] != "pretrain"
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        model,
        train_data,
        None if tests else test_data,
        options=OmegaConf.create(config["training"]),
        config=config,
        run_dir=run_dir,
        evaluate=partial(_scores, test_data) if tests else None,
        device=config["device"],
    )
    if resume:
        trainer.resume()
    record(trainer, config, run_dir)
    trainer.fit()
    return trainer, test_data


class CachedFeatures:
    """Features of a frozen encoder for all of ``data``, computed once: batches of {"features", "label"}."""

    def __init__(self, model, data):
        device = PartialState().device
        model.to(device).eval()
        self.features, self.labels = _run(model.encode_batch, data, device, "features, once")
        model.train()
        self.classes = data.classes

    def __len__(self):
        return len(self.features)

    def batch(self, indices):
        """{"features": (B, ...), "label": (B,)}."""
        return {"features": self.features[indices], "label": self.labels[indices]}


def predict(model, data, device="cpu"):
    """(scores (n, K), labels (n,)) of ``model`` on all of ``data`` that can be read."""
    was_training = model.training
    model.eval()
    scores, labels = _run(model.logits, data, device, "testing")
    model.train(was_training)
    return scores, labels


@torch.no_grad()
def _run(function, data, device, description, batch_size=256):
    """``function`` of every batch of ``data`` and the labels, each concatenated on the CPU."""
    rows = range(len(data))
    requests = [[(index, None) for index in rows[start : start + batch_size]] for start in rows[::batch_size]]
    if hasattr(data, "stream"):
        batches = data.stream(requests)
    else:
        batches = (data.batch(np.array([index for index, _ in request])) for request in requests)
    outputs, labels = [], []
    with tqdm(total=len(data), desc=description, unit="sample", leave=False, dynamic_ncols=True) as bar:
        for batch in batches:
            if len(batch["label"]) == 0:  # none of its videos can be read
                continue
            batch = to_tensors(batch, device)
            outputs.append(function(batch).float().cpu())
            labels.append(batch["label"].cpu())
            bar.update(len(batch["label"]))
    return torch.cat(outputs), torch.cat(labels)


def _scores(data, model, epoch):
    """Metrics of ``model`` on the test set, as the trainer logs them."""
    scores, labels = predict(model, data, next(model.parameters()).device)
    loss = torch.nn.functional.cross_entropy(scores, labels).item()
    return {"top1": topk(scores, labels, 1), "top5": topk(scores, labels, 5), "test_loss": loss}


def topk(scores, labels, k):
    """Share of rows of ``scores`` (n, K) whose label is among the ``k`` highest."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(dim=1).float().mean().item()


def summarise(scores, labels, classes):
    """What summary.json says of ``scores`` (n, K): top-1 with its 95 % interval, top-5, accuracy a class, confusion."""
    predicted, count = scores.argmax(dim=1), len(labels)
    right = int((predicted == labels).sum())
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
    per_class = confusion.diagonal() / confusion.sum(dim=1).clamp(min=1)
    return {
        "top1": right / count,
        "top1_ci95": rate_interval(right, count),
        "top5": topk(scores, labels, 5),
        "test_samples": count,
        "chance": (labels.bincount().max() / count).item(),  # always saying the most frequent class
        "per_class": dict(zip(classes, [round(value, 4) for value in per_class.tolist()], strict=True)),
        "confusion": confusion.tolist(),
    }


def describe(summary):
    """One line of a summary."""
    low, high = summary["top1_ci95"]
    others = f"top-5 {summary['top5']:.1%}, chance {summary['chance']:.1%}"
    return f"top-1 {summary['top1']:.1%} [{low:.1%}, {high:.1%}], {others}"


def finish(trainer, test_data, config, run_dir, *, started, extra=None):
    """Test the EMA model of a finished run; writes summary.json and confusion.png, returns the summary."""
    scores, labels = predict(trainer.ema.model, test_data, trainer.accelerator.device)
    summary = {
        "data": config["data"],
        "mode": config["mode"],
        "encoder": config["encoder"]["init"],
        "attention": config["attention"]["name"],
        "image_size": config["image_size"],
        "parameters": sum(p.numel() for p in trainer.raw_model.parameters()),
        "train_samples": len(trainer.train_data),
        "minutes": round((time.monotonic() - started) / 60, 2),  # since the start, or since it was resumed
        **summarise(scores, labels, config["classes"]),
        **(extra or {}),
    }
    write_whole(run_dir / "summary.json", json.dumps(summary, indent=1))
    plot_confusion(run_dir / "confusion.png", np.array(summary["confusion"]), config["classes"])
    print(f"{config['data']}, {config['mode']}: {describe(summary)}\nresults: {run_dir}")
    return summary


def compare(summaries, run_dir):
    """Write comparison.json and comparison.png of several {name: summary}, and print them as a table."""
    (run_dir / "comparison.json").write_text(json.dumps(summaries, indent=1))
    plot_comparison(run_dir / "comparison.png", summaries)
    chance = next(iter(summaries.values()))["chance"]
    print(f"\n| encoder | top-1 | 95 % interval |\n|---|---|---|\n| chance | {chance:.1%} | |")
    for name, summary in summaries.items():
        low, high = summary["top1_ci95"]
        print(f"| {name} | {summary['top1']:.1%} | {low:.1%} to {high:.1%} |")
    print(f"results: {run_dir}")


def default_output(kind, config):
    """A new folder of a run below runs/."""
    name = Path(config["data"]).name.split(".")[0]
    return Path("runs") / kind / f"{name}_{config['mode']}_{datetime.now():%Y-%m-%d_%H-%M-%S}"


def stored(run_dir):
    """Configuration of the run to resume at ``run_dir``."""
    _, config, _ = load_checkpoint(Path(run_dir) / "checkpoints" / LAST, prefix="none")
    return config
