"""Configuration to data sets and model: the one place that knows which classes a configuration asks for."""

import numpy as np
import torch

from policy.dataset import FrameDataset, ReplayBuffer, WindowDataset, split_episodes
from policy.dataset.features import episode_edges
from policy.diffusion import DiffusionPolicy
from policy.head.image import ImageClassifier
from policy.head.keypoints import KeypointRegressor
from policy.head.mae import MaskedAutoencoder
from policy.head.video import VideoClassifier
from policy.registry import lookup
from policy.sequence.language import LanguageModel
from policy.sequence.translation import TranslationModel

MODELS = {
    "diffusion": DiffusionPolicy,
    "image_classifier": ImageClassifier,
    "keypoints": KeypointRegressor,
    "mae": MaskedAutoencoder,
    "video_classifier": VideoClassifier,
}
SEQUENCE_MODELS = {"language": LanguageModel, "translation": TranslationModel}  # of tokens, without a camera
ENCODER_LOADING = ("init", "freeze")  # how an encoder's weights start, not what it is


def build_model(config):
    """The model that the resolved configuration (a plain dict) describes, with fresh weights."""
    options = dict(config["model"])
    model = lookup("model.name", options.pop("name"), MODELS | SEQUENCE_MODELS)
    if model in SEQUENCE_MODELS.values():
        return model(attention=config["attention"], **options)
    encoder = {key: value for key, value in config["encoder"].items() if key not in ENCODER_LOADING}
    built = model(
        shape_meta=config["task"]["shape_meta"],
        crop=config["crop"],
        encoder=encoder,
        attention=config["attention"],
        **options,
    )
    return built.to(memory_format=torch.channels_last)  # as images are stored: convolutions are 2 to 12 % faster


def build_datasets(path, *, shape_meta, model, data, seed, storage="ram", cache_dir=None, device="auto"):
    """(training data, held-out data or None) of the zarr at ``path``, split by episode.

    model, data: the sections of the configuration, of a policy or of keypoint regression; storage, cache_dir and
    device: its values. Raises as ``ReplayBuffer.open`` does.
    """
    keypoints = model["name"] == "keypoints"
    target = "keypoint" if keypoints else "action"
    sources = data_sources(shape_meta, target)
    buffer = ReplayBuffer.open(path, sources, storage=_storage(storage, device), cache_dir=cache_dir)
    obs_meta = {key: spec for key, spec in sources.items() if key != target}
    splits = split_episodes(
        buffer.num_episodes, val_ratio=data["val_ratio"], seed=seed, max_train=data["max_train_episodes"]
    )

    def dataset(episodes):
        if len(episodes) == 0:
            return None
        if keypoints:
            frames = np.concatenate([np.arange(*edge) for edge in episode_edges(buffer.episode_ends)[episodes]])
            return FrameDataset(buffer, obs_keys=obs_meta, target_key=target, frames=frames)
        return WindowDataset(
            buffer,
            obs_keys=obs_meta,
            horizon=model["horizon"],
            obs_steps=model["obs_steps"],
            pad_after=data["pad_after"],
            episodes=episodes,
        )

    return tuple(dataset(episodes) for episodes in splits)


def datasets_of(config, path):
    """``build_datasets`` with the sections of a whole resolved configuration."""
    sections = {key: config[key] for key in ("model", "data", "seed", "storage", "cache_dir", "device")}
    return build_datasets(path, shape_meta=config["task"]["shape_meta"], **sections)


def data_sources(shape_meta, target="action"):
    """{key: spec} of the arrays that training reads: the observations (keypoints: only images) and the target."""
    obs_meta = shape_meta["obs"]
    if target == "keypoint":
        obs_meta = {key: spec for key, spec in obs_meta.items() if spec["type"] == "rgb"}
    return {**obs_meta, target: shape_meta[target]}


def _storage(storage, device):
    """What "auto" means before training: memory where a GPU may take the arrays, else a map, there at once later."""
    if storage != "auto":
        return storage
    return "ram" if torch.cuda.is_available() and device != "cpu" else "mmap"
