"""Kinds of runs, and the numbers that ``python -m eval.report`` shows of each: the one place that knows them."""

import math
from dataclasses import dataclass

ANY, SHARE = (-math.inf, math.inf), (0.0, 1.0)


@dataclass(frozen=True)
class Metric:
    """A number of a run, as metrics.jsonl or summary.json names it.

    form, scale: how it is written; interval: key of its own 95 % interval; limits: of an interval over seeds; smaller:
    whether smaller is better.
    """

    key: str
    title: str
    form: str = ".3f"
    scale: float = 1
    interval: str | None = None
    limits: tuple = ANY
    smaller: bool = False


@dataclass(frozen=True)
class Kind:
    """title: of its runs; chosen: whether training keeps the best of several evaluations by ``training.score``."""

    title: str
    metrics: tuple
    chosen: bool = False


LOSS = Metric("val_loss", "held-out loss", ".4f", smaller=True)
ACCURACY = (
    Metric("top1", "top-1, %", ".1f", 100, "top1_ci95", SHARE),
    Metric("top5", "top-5, %", ".1f", 100, limits=SHARE),
)
KINDS = {  # model.name: what to show
    "diffusion": Kind(
        "Policies",
        (
            Metric("score_mean", "score", ".3f", 1, "score_ci95"),
            Metric("success_rate", "success, %", ".0f", 100, "success_ci95", SHARE),
        ),
        chosen=True,
    ),
    "keypoints": Kind("Keypoint pre-training", (Metric("val_px", "held-out error, px", ".2f", smaller=True), LOSS)),
    "image_classifier": Kind("Image classifiers", ACCURACY, chosen=True),
    "video_classifier": Kind("Video classifiers", ACCURACY, chosen=True),
    "mae": Kind("Masked autoencoders", (LOSS,)),
    "language": Kind(
        "Language models",
        (
            Metric("bits_per_byte", "bits a byte", smaller=True),
            Metric("perplexity", "perplexity", ".2f", smaller=True),
            LOSS,
        ),
    ),
    "translation": Kind(
        "Translation",
        (
            Metric("bleu", "BLEU", ".1f", 1, "bleu_ci95"),
            Metric("chrf", "chrF", ".1f"),
            Metric("exact", "exact, %", ".1f", 100, limits=SHARE),
            LOSS,
        ),
    ),
}
OTHER = Kind("Other models", (LOSS,))  # whatever else the trainer trained
CURVES = {  # key of metrics.jsonl: (label, scale of the axis)
    "score_mean": ("score", "share"),
    "success_rate": ("success rate", "share"),
    "top1": ("top-1 accuracy on test samples", "share"),
    "val_px": ("held-out keypoint error, px", "log"),
    "val_loss": ("held-out loss", "log"),
    "test_loss": ("test loss", "log"),
    "train_loss": ("training loss", "log"),
}
PICTURES = {  # newest file of the best run: kind of figure
    "rollouts/*/*.mp4": "video",
    "*.mp4": "video",  # of eval.rollout
    "reconstructions/*.png": "image",
    "confusion.png": "image",
    "examples.png": "image",
    "sample.txt": "text",
    "examples.txt": "text",
}


def kind_of(name, found):
    """The ``Kind`` of the model ``name``; without a known one that whose first number is in the set ``found``."""
    if name in KINDS:
        return KINDS[name]
    return next((kind for kind in KINDS.values() if kind.metrics[0].key in found), OTHER)
