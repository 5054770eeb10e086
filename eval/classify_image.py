"""Image classification with the encoder of a policy: linear probe, fine-tuning, from scratch, masked pre-training.

    python -m eval.classify_image                                        what encoders know of Push-T, in a minute
    python -m eval.classify_image --data cifar10 --mode scratch          a new encoder
    python -m eval.classify_image --data FOLDER_OR_ZIP --encoder RUN --mode finetune

A run's encoder, once trained here, starts a policy: python train.py --config-dir=config/pusht encoder.init=RUN ...
"""

import argparse
import time

import numpy as np
import torch

from envs import make_data
from eval.shared import classify
from eval.shared.classify_plots import plot_examples
from eval.shared.command import command
from policy.dataset.image.dataset import ImageDataset
from policy.dataset.image.sources import open_images
from policy.dataset.labelled import open_labelled
from policy.training.trainer import to_tensors

PRESETS = ("cpu", "small", "paper", "pusht")  # pusht: the default of embedded tasks from scratch
OF_FILES = ("augment", "root", "download", "workers")  # what embedded tasks, pictures in memory, do not use


def open_data(config):
    """(training data, test data) that ``config`` names: an embedded task, or images from disk."""
    size, frozen = config["image_size"], config["encoder"]["freeze"]
    if config["data"] in config["embedded"]:
        entry = dict(config["embedded"][config["data"]])
        options = {"image_size": size, "storage": "mmap", "cache_dir": config["cache_dir"]}
        task, pad = entry.pop("task"), entry.pop("pad")
        path = make_data(entry.pop("maker"), cache_dir=config["cache_dir"], **entry)
        train = open_labelled(path, task, split="train", pad=0 if frozen else pad, **options)
        return train, open_labelled(path, task, split="test", **options)
    where = {"root": config["root"], "download": config["download"]}
    train, test = (open_images(config["data"], split, **where) for split in ("train", "test"))
    augment = None if frozen else config["augment"]  # features are computed once
    return (
        ImageDataset(train, image_size=size, augment=augment, workers=config["workers"]),
        ImageDataset(test, image_size=size, workers=config["workers"]),
    )


def configure(args, *, source=None, init="none"):
    """The configuration of one run; ValueError for changes of what it does not use."""
    config = classify.configure("image", args, source=source, init=init)
    data = config["data"]
    if data in config["embedded"] and args.mode == "scratch":  # another network than photographs need
        chosen = config["encoder"]
        config = classify.configure("image", args, preset="pusht")
        if any(change.split("=", 1)[0] == "encoder" for change in args.overrides):
            config["encoder"] = chosen  # the preset's sizes are those of its own ViT
    if config["mode"] == "pretrain":
        classify.refuse_changes(args, ["recipe"], "mode pretrain has no labels")
        del config["recipe"]
    if config["encoder"]["freeze"]:
        unused = ["augment", "recipe.mixup", "recipe.cutmix", "recipe.mask_ratio", f"embedded.{data}.pad"]
        classify.refuse_changes(args, unused, "a frozen encoder's features are computed once, of unchanged pictures")
    if data in config["embedded"]:
        where = f"{data} is drawn in memory and shifted by embedded.{data}.pad px alone, which keeps its labels"
        classify.refuse_changes(args, OF_FILES, where)
        config["augment"] = {"pad": config["embedded"][data]["pad"]}
    return config


def run(config, run_dir, *, source=None, resume=False):
    """Train and test what ``config`` describes; returns the summary, None without labels."""
    started = time.monotonic()
    train_data, test_data = open_data(config)
    print(f"{config['data']}: {len(train_data)} training, {len(test_data)} test images, {config['image_size']} px")
    config = classify.complete(config, train_data)
    trainer, tested = classify.fit(config, train_data, test_data, run_dir=run_dir, source=source, resume=resume)
    if config["mode"] == "pretrain" or not trainer.accelerator.is_main_process:
        return None
    summary = classify.finish(trainer, tested, config, run_dir, started=started)
    _draw_examples(trainer, test_data, tested, config, run_dir / "examples.png")
    return summary


def _draw_examples(trainer, test_data, tested, config, path, count=32):
    """What the trained model makes of ``count`` test images; tested: the same data, perhaps as cached features."""
    indices = np.linspace(0, len(test_data) - 1, min(count, len(test_data))).astype(int)
    images = test_data.batch(indices)
    with torch.no_grad():
        inputs = to_tensors(tested.batch(indices), trainer.accelerator.device)
        predicted = trainer.ema.model.logits(inputs).argmax(dim=1).cpu()
    plot_examples(path, images["image"].numpy(), images["label"].numpy(), predicted.numpy(), config["classes"])


@command
def main(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    classify.add_arguments(parser, modes=("probe", "finetune", "scratch", "pretrain"), presets=PRESETS)
    args = classify.parse(parser, arguments)
    classify.main(args, configure=configure, run=run, kind="image")


if __name__ == "__main__":
    main()
