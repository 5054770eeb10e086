"""Video classification, on an embedded task or on lists of videos."""

from envs import make_data
from eval.benchmark.classification import Classification, refuse_changes
from eval.shared.overrides import ROOT
from policy.dataset.labelled import open_labelled
from policy.dataset.video.dataset import VideoDataset, open_videos

# What embedded tasks, clips in memory, do not use.
OF_FILES = ("sampling", "target_fps", "jitter", "flip", "temporal_views", "spatial_views", "workers", "root")
OF_FILES += ("num_classes",)


def check_changes(config, changes):
    """Raise ValueError for changes of what this run does not use; drop it from ``config``."""
    data = config["data"]
    if config["encoder"].get("freeze", False):
        reason = "a frozen encoder's features are computed once, of unchanged clips"
        refuse_changes(changes, ["flip", f"embedded.{data}.pad"], reason)
    if data in config["embedded"]:
        refuse_changes(changes, OF_FILES, f"{data} is no set of videos")
        for key in OF_FILES:
            del config[key]


def open_data(config):
    """(training data, test data): an embedded task, or lists of videos."""
    if config["data"] in config["embedded"]:
        return _embedded(config, dict(config["embedded"][config["data"]]))
    shared = {key: config[key] for key in ("frames", "sampling", "stride", "image_size", "jitter", "workers")}
    shared["target_fps"] = config.get("target_fps")  # older runs have none
    changes = {
        "train": {"flip": config["flip"]},
        "test": {key: config[key] for key in ("temporal_views", "spatial_views")},
    }
    datasets = []
    for split, options in changes.items():
        found = open_videos(config["data"], split, root=config["root"], num_classes=config["num_classes"])
        paths, labels, classes = found
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
    frozen = config["encoder"].get("freeze", False)
    train = open_labelled(path, task, split="train", pad=0 if frozen else pad, **options)
    return train, open_labelled(path, task, split="test", **options)


class VideoBenchmark(Classification):
    """Clips with a class each."""

    unit = "clips"
    command = "eval.classify_video"

    open_data = staticmethod(open_data)

    def extra_results(self):
        """Which videos could not be read; says so."""
        from_disk = [data for data in (self.samples, self.test_samples) if isinstance(data, VideoDataset)]
        unreadable = {}
        for data in from_disk:
            unreadable |= data.unreadable
            if data.unreadable:
                print(data.report_unreadable())
        return {"unreadable": unreadable}
