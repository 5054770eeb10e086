"""Image classification and masked autoencoding, on an embedded task or on images from disk."""

import numpy as np
import torch

from envs import make_data
from eval.benchmark.classification import Classification, refuse_changes
from eval.shared.classify_plots import plot_examples
from policy.dataset.image.dataset import ImageDataset
from policy.dataset.image.sources import open_images
from policy.dataset.labelled import open_labelled
from policy.training.batches import to_tensors

OF_FILES = ("augment", "resize", "root", "download", "workers")  # what embedded tasks, pictures in memory, do not use
EXAMPLES = 32


def check_changes(config, changes):
    """Raise ValueError for changes of what this run does not use; drop it from ``config``."""
    data = config["data"]
    if config["mode"] == "pretrain":
        refuse_changes(changes, ["recipe", "hidden"], "mode pretrain has no labels")
        del config["recipe"], config["hidden"]
    if config["encoder"].get("freeze", False):
        unused = ["augment", "recipe.mixup", "recipe.cutmix", "recipe.mask_ratio", f"embedded.{data}.pad"]
        refuse_changes(changes, unused, "a frozen encoder's features are computed once, of unchanged pictures")
    if data in config["embedded"]:
        reason = f"{data} is drawn in memory and shifted by embedded.{data}.pad px alone, which keeps its labels"
        refuse_changes(changes, OF_FILES, reason)
        for key in OF_FILES:
            del config[key]


def open_data(config):
    """(training data, test data): an embedded task, or images from disk."""
    size, frozen = config["image_size"], config["encoder"].get("freeze", False)
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
    options = {"image_size": size, "workers": config["workers"]}
    options["resize"] = config.get("resize")  # older runs have none
    return ImageDataset(train, augment=augment, **options), ImageDataset(test, **options)


class ImageBenchmark(Classification):
    """Images with a class each."""

    unit = "images"
    command = "eval.classify_image"

    open_data = staticmethod(open_data)

    def draw_examples(self, trainer):
        """examples.png: test images with predicted and true class."""
        count = min(EXAMPLES, len(self.test_samples))
        indices = np.linspace(0, len(self.test_samples) - 1, count).astype(int)
        images = self.test_samples.batch(indices)
        with torch.no_grad():
            inputs = to_tensors(self.test_data.batch(indices), trainer.accelerator.device)
            predicted = trainer.ema.model.logits(inputs).argmax(dim=1).cpu().numpy()
        path = self.run_dir / "examples.png"
        plot_examples(path, images["image"].numpy(), images["label"].numpy(), predicted, self.config["classes"])
