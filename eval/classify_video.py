"""Video classification with the encoder of a policy: TimeSformer (arXiv 2102.05095), or a probe of single frames.

    python -m eval.classify_video                                     which way a block turns, in a few minutes
    python -m eval.classify_video --mode finetune --encoder RUN       TimeSformer on a policy's encoder
    python -m eval.classify_video --data FOLDER --preset ntu --mode finetune --encoder RUN

FOLDER holds train.csv and test.csv (or val.csv) of lines "path label" or "path,label".
"""

import argparse
import time

from envs import make_data
from eval.shared import classify
from eval.shared.command import command
from eval.shared.compose import ROOT
from policy.dataset.labelled import open_labelled
from policy.dataset.video.dataset import VideoDataset, open_videos

PRESETS = ("cpu", "small", "paper", "smarthome", "ntu", "nucla")
UNUSED = ("sampling", "jitter", "flip", "temporal_views", "spatial_views", "workers", "root", "num_classes")


def open_data(config):
    """(training data, test data) that ``config`` names: an embedded task, or lists of videos."""
    if config["data"] in config["embedded"]:
        return _embedded(config, dict(config["embedded"][config["data"]]))
    shared = {key: config[key] for key in ("frames", "sampling", "stride", "image_size", "jitter", "workers")}
    changes = {
        "train": {"flip": config["flip"]},
        "test": {key: config[key] for key in ("temporal_views", "spatial_views")},
    }
    datasets = []
    for split, options in changes.items():
        paths, labels, classes = open_videos(
            config["data"], split, root=config["root"], num_classes=config["num_classes"]
        )
        datasets.append(VideoDataset(paths, labels, classes=classes, **shared, **options))
    return datasets


def _embedded(config, entry):
    clip = {"frames": config["frames"], "stride": config["stride"], "every": entry.pop("every")}
    task, pad, balanced = (entry.pop(key) for key in ("task", "pad", "balanced"))
    if "source" in entry:
        entry["source"] = ROOT / entry["source"]
        entry |= {"frames": config["frames"], "stride": config["stride"]}
    path = make_data(entry.pop("maker"), cache_dir=config["cache_dir"], **entry)
    options = {"clip": clip, "balanced": balanced, "image_size": config["image_size"]}
    options |= {"storage": "mmap", "cache_dir": config["cache_dir"]}
    train = open_labelled(path, task, split="train", pad=0 if config["encoder"]["freeze"] else pad, **options)
    return train, open_labelled(path, task, split="test", **options)


def configure(args, *, source=None, init="none"):
    """The configuration of one run; ValueError for changes of what an embedded task does not use."""
    config = classify.configure("video", args, source=source, init=init)
    if config["encoder"]["freeze"]:
        where = "a frozen encoder's features are computed once, of unchanged clips"
        classify.refuse_changes(args, ["flip", f"embedded.{config['data']}.pad"], where)
    if config["data"] in config["embedded"]:
        classify.refuse_changes(args, UNUSED, f"{config['data']} is no set of videos")
        config = {key: value for key, value in config.items() if key not in UNUSED}
    return config


def run(config, run_dir, *, source=None, resume=False):
    """Train and test what ``config`` describes; returns the summary."""
    started = time.monotonic()
    train_data, test_data = open_data(config)
    size = f"{config['frames']} frames of {config['image_size']} px"
    print(f"{config['data']}: {len(train_data)} training, {len(test_data)} test clips, {size}")
    config = classify.complete(config, train_data)
    trainer, tested = classify.fit(config, train_data, test_data, run_dir=run_dir, source=source, resume=resume)
    if not trainer.accelerator.is_main_process:
        return None
    unreadable = {}
    for data in (train_data, test_data):
        unreadable |= getattr(data, "unreadable", {})
    if unreadable:
        print("\n".join(data.report_unreadable() for data in (train_data, test_data) if data.unreadable))
    return classify.finish(trainer, tested, config, run_dir, started=started, extra={"unreadable": unreadable})


@command
def main(arguments=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    classify.add_arguments(parser, modes=("probe", "finetune", "scratch"), presets=PRESETS)
    args = classify.parse(parser, arguments)
    classify.main(args, kind="video", configure=configure, run=run)


if __name__ == "__main__":
    main()
