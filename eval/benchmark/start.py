"""The last word on a new run's configuration: what its first encoder and the command line's changes mean for it."""

from omegaconf import OmegaConf

from eval.benchmark import classification, image, video

CHECKS = {"image_classifier": image.check_changes, "mae": image.check_changes, "video_classifier": video.check_changes}


def complete(config, changes):
    """``config`` of a new run, still composed: a classifier that starts from a run gets the network of that run.

    changes: the command line's key=value. Raises ValueError for changes of what this run does not use.
    """
    OmegaConf.set_struct(config, False)
    if config.model.name not in CHECKS:
        return config
    if config.data is None:
        raise ValueError("data: got none, allowed: data=FOLDER, or another name that config/base lists")
    init = config.encoder.get("init", "none")
    if config.mode == "finetune" and init == "none" and not config.encoder.get("pretrained", False):
        raise ValueError("encoder.init: got none, allowed with mode finetune: a run or checkpoint (or pretrained=true)")
    if config.mode == "scratch" and init != "none":
        raise ValueError(f"encoder.init: got {init}, allowed with mode scratch: none (--config-name=finetune takes it)")
    if init != "none":
        classification.adopt_encoder(config, classification.load_source(init, config.camera), changes)
    CHECKS[config.model.name](config, changes)
    return config
