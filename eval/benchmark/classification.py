"""What the image and the video benchmark share: backbones that start from a run, testing, what a finished run holds."""

import json
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from eval.shared.classify_plots import plot_confusion
from eval.shared.intervals import rate_interval
from eval.shared.overrides import ROOT
from eval.shared.run_config import check_references
from policy.build import ENCODER_LOADING, build_model
from policy.checkpoint import LAST, load_checkpoint, load_encoder, load_encoder_weights, load_weights
from policy.files import write_whole
from policy.training.batches import to_tensors
from policy.training.protocols import Streaming

MOST_CONFUSED = 1000  # classes; the file of a confusion grows with their square
STARTS = (*ENCODER_LOADING, "pretrained")  # of an encoder: how its own run started


def load_source(name, camera=None):
    """The encoder of a run or checkpoint, whose path is relative to here or to the repository."""
    return load_encoder(Path(name) if Path(name).exists() else ROOT / name, camera=camera)


def adopt_encoder(config, source, changes):
    """Give ``config`` (a plain dict or DictConfig) the network of ``source``: encoder, attention, size of pictures.

    changes: the command line's key=value, which go before. Raises ValueError for another choice of encoder.
    """
    check_references(source.config, "encoder.init")
    changed = [change.split("=", 1)[0].lstrip("+") for change in changes]
    if "encoder" in changed:
        raise ValueError("encoder: got another one, allowed with encoder.init=RUN: its options, encoder.KEY=VALUE")
    for section in ("encoder", "attention"):
        if section not in changed:
            own = [key.removeprefix(f"{section}.") for key in changed if key.startswith(f"{section}.")]
            kept = {key: config[section][key] for key in (*own, *ENCODER_LOADING) if key in config[section]}
            learned = {key: value for key, value in source.config[section].items() if key not in STARTS}
            config[section] = learned | kept
    if "image_size" not in changed:
        config["image_size"] = image_size_of(source)


def image_size_of(encoder):
    """Side in px of the pictures that ``encoder``, from ``load_encoder``, was trained on."""
    if encoder.config["crop"] is not None:
        return encoder.config["crop"]
    return encoder.config["task"]["shape_meta"]["obs"][encoder.camera]["shape"][-1]


def refuse_changes(changes, keys, reason):
    """ValueError where the command line changes one of ``keys`` (or of their groups), which this run does not use."""
    for change in changes:
        name = change.split("=", 1)[0].lstrip("+")
        if any(name == key or name.startswith(f"{key}.") for key in keys):
            raise ValueError(f"{name}: got a change, allowed: none, as {reason}")


class Classification:
    """A classifier on labelled samples, judged by its accuracy on the test set.

    Keeps ``policy.training.protocols.Benchmark``. A subclass opens its data: ``open_data(config) -> (training, test)``.
    source: an encoder to start from, in place of the one that config["encoder"]["init"] names. The features of a frozen
    encoder are computed once.
    """

    unit = "samples"
    command = None  # tests a trained classifier

    def __init__(self, config, run_dir, *, resume=False, source=None):
        self.config, self.run_dir, self.started = config, run_dir, time.monotonic()
        self.samples, self.test_samples = self.open_data(config)
        size = config["image_size"]
        observation = {"image": {"type": "rgb", "shape": [3, size, size]}}
        config |= {"crop": None, "task": {"name": config["name"], "shape_meta": {"obs": observation}}}
        if self.has_labels:
            config["classes"] = list(self.samples.classes)
            config["model"]["num_classes"] = len(self.samples.classes)
        self.model = build_model(config)
        encoder = config["encoder"]
        init = encoder.get("init", "none")
        self.notes = {"encoder": "random weights" if init == "none" else str(init)}
        if resume:
            self.notes["encoder"] = "as in the checkpoint"
            weights, stored, _ = load_checkpoint(Path(run_dir) / "checkpoints" / LAST, prefix="model.")
            if stored.get("classes") != config.get("classes"):
                raise ValueError(f"data: got classes {config['classes']}, allowed with resume: {stored['classes']}")
            load_weights(self.model, weights, str(run_dir))  # a frozen encoder's features are those of its run
        elif init != "none":
            source = source or load_source(init, config["camera"])
            own = self.model.encoder.encoders["image"]
            notes = load_encoder_weights(own, source.state_dict(), f"encoder.init={init}")
            self.notes["encoder"] = ", ".join([str(init), *notes])
        self.train_data, self.test_data = self.samples, self.test_samples
        if encoder.get("freeze", False):
            self.model.encoder.requires_grad_(False)
            self.train_data = CachedFeatures(self.model, self.samples)
            self.test_data = CachedFeatures(self.model, self.test_samples)
        self.val_data = None
        if not self.has_labels:
            self.val_data, self.evaluate = self.test_data, None

    @staticmethod
    def metrics(config):
        """Of the test set; masked autoencoding has the held-out loss alone."""
        return ("val_loss",) if config["mode"] == "pretrain" else ("top1", "top5", "test_loss")

    @property
    def has_labels(self):
        """Whether classes are learned; masked autoencoding needs none."""
        return self.config["mode"] != "pretrain"

    def evaluate(self, model, epoch):
        """Accuracy and loss of ``model`` on the test set."""
        scores, labels = predict(model, self.test_data, next(model.parameters()).device)
        loss = torch.nn.functional.cross_entropy(scores, labels).item()
        return {"top1": topk(scores, labels, 1), "top5": topk(scores, labels, 5), "test_loss": loss}

    def describe_data(self):
        """One line of the plan."""
        classes = f", {len(self.config['classes'])} classes" if self.has_labels else ""
        counts = f"{len(self.samples):,} training, {len(self.test_samples):,} test {self.unit}"
        return f"{self.config['data']}: {counts} of {self.config['image_size']} px{classes}"

    def prepare(self, device):
        """Nothing: features of a frozen encoder are there already."""

    def fit(self, trainer):
        """Train to the end."""
        trainer.fit()

    def finish(self, trainer):
        """Test the EMA model; writes summary.json and pictures."""
        if not self.has_labels:
            names = self.run_dir / "reconstructions"
            use = f"python train.py --config-dir=config/... --config-name=finetune encoder.init={self.run_dir}"
            return {"pictures": names, "next": use}
        config = self.config
        scores, labels = predict(trainer.ema.model, self.test_data, trainer.accelerator.device)
        self.summary = {
            "data": config["data"],
            "mode": config["mode"],
            "encoder": config["encoder"].get("init", "none"),
            "attention": config["attention"]["name"],
            "image_size": config["image_size"],
            "parameters": sum(p.numel() for p in trainer.raw_model.parameters()),
            "train_samples": len(trainer.train_data),
            "minutes": round((time.monotonic() - self.started) / 60, 2),  # since the start, or since it was resumed
            **summarise(scores, labels, config["classes"]),
            **self.extra_results(),
        }
        write_summary(self.run_dir, self.summary)
        self.draw_examples(trainer)
        use = f"python -m {self.command} --checkpoint {self.run_dir}"
        pictures = self.run_dir if self.summary["confusion"] is None else self.run_dir / "confusion.png"
        return {"score": describe(self.summary), "pictures": pictures, "next": use}

    def extra_results(self):
        """More of summary.json."""
        return {}

    def draw_examples(self, trainer):
        """Pictures of single predictions."""


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
    if isinstance(data, Streaming):
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


def topk(scores, labels, k):
    """Share of rows of ``scores`` (n, K) whose label is among the ``k`` highest."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(dim=1).float().mean().item()


def summarise(scores, labels, classes):
    """What summary.json says of ``scores`` (n, K): top-1 with its 95 % interval, top-5, accuracy a class, confusion.

    The confusion (K, K) is None for more than MOST_CONFUSED classes.
    """
    predicted, count, size = scores.argmax(dim=1), len(labels), len(classes)
    right = int((predicted == labels).sum())
    known = labels[predicted == labels].bincount(minlength=size)
    per_class = known / labels.bincount(minlength=size).clamp(min=1)
    confusion = None
    if size <= MOST_CONFUSED:
        confusion = (labels * size + predicted).bincount(minlength=size**2).unflatten(0, (size, size)).tolist()
    return {
        "top1": right / count,
        "top1_ci95": rate_interval(right, count),
        "top5": topk(scores, labels, 5),
        "test_samples": count,
        "chance": (labels.bincount().max() / count).item(),  # always saying the most frequent class
        "per_class": dict(zip(classes, [round(value, 4) for value in per_class.tolist()], strict=True)),
        "confusion": confusion,
    }


def write_summary(folder, summary):
    """Write summary.json and, where there is a confusion, confusion.png."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "summary.json", json.dumps(summary, indent=1))
    if summary["confusion"] is not None:
        plot_confusion(folder / "confusion.png", np.array(summary["confusion"]), list(summary["per_class"]))


def describe(summary):
    """One line of a summary."""
    low, high = summary["top1_ci95"]
    others = f"top-5 {summary['top5']:.1%}, chance {summary['chance']:.1%}"
    return f"top-1 {summary['top1']:.1%} [{low:.1%}, {high:.1%}], {others}"
