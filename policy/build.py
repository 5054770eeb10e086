"""Configuration to data sets and model: the one place that knows which classes a configuration asks for."""

import os
import warnings

import numpy as np
import torch

from policy.dataset import FrameDataset, ReplayBuffer, WindowDataset, split_episodes
from policy.dataset.features import episode_edges
from policy.dataset.zarr_checks import open_zarr
from policy.diffusion import DiffusionPolicy
from policy.head.image import ImageClassifier
from policy.head.keypoints import KeypointRegressor
from policy.head.mae import MaskedAutoencoder
from policy.head.video import VideoClassifier
from policy.registry import lookup, within
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
MOST, MOST_ENTRIES = 1_000_000, 1_000  # of any number, and of any list or section
LIMITS = {  # of numbers that make many parts, long loops or large arrays
    "depth": 1_000,
    "decoder_depth": 1_000,
    "num_heads": 1_000,
    "num_train_timesteps": 10_000,
    "horizon": 10_000,
    "shape": 10_000,
    "vocabulary": 100_000_000,
    "seed": 2**63,
}
ENCODER_LOADING = ("init", "freeze")  # how an encoder's weights start, not what it is


def build_model(config):
    """The model that the resolved configuration (a plain dict) describes, with fresh weights.

    Raises ValueError for options and sizes that make none, before it takes memory or minutes.
    """
    outline(config)
    return assemble(config)


def outline(config):
    """The model of ``config`` without memory, on torch's meta device: names and shapes of its weights.

    Raises ValueError, by name, for numbers beyond ``LIMITS``, and for more weights than this machine has memory.
    """
    _check_sizes("model", config["model"])
    _check_sizes("attention", config["attention"])
    if "encoder" in config:
        _check_sizes("encoder", config["encoder"])
        _check_sizes("crop", config["crop"])
        _check_sizes("task.shape_meta", config["task"]["shape_meta"])
        config = {**config, "encoder": {key: value for key, value in config["encoder"].items() if key != "pretrained"}}
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks that copying weights without storage does nothing
            model = assemble(config)
    except (
        RuntimeError,
        ArithmeticError,
        AssertionError,
    ) as error:  # of torch and timm, for sizes below 1 and the like
        text = " ".join(str(error).split())
        raise ValueError(f"model: got sizes that make none ({type(error).__name__}: {text})") from error
    needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ValueError(f"model: got {needed / 1e9:,.0f} GB of weights, allowed: this machine's {memory / 1e9:.0f} GB")
    return model


def assemble(config):
    """As ``build_model``, without looking at sizes first."""
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


def _check_sizes(key, value):
    """Raise ValueError for a number, or a number of entries, with which building alone would take minutes or memory."""
    if isinstance(value, dict | list):
        within(0, MOST_ENTRIES, **{f"entries of {key}": len(value)})
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_sizes(f"{key}.{name}", inner)
    elif isinstance(value, list):
        for inner in value:
            _check_sizes(key, inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        most = LIMITS.get(key.rpartition(".")[2], MOST)
        if not abs(value) <= most:
            raise ValueError(f"{key}: got {value:,}, allowed: at most {most:,}")


def build_datasets(path, *, shape_meta, model, data, seed, storage="ram", cache_dir=None, device="auto"):
    """(training data, held-out data or None) of the zarr at ``path``, split by episode.

    model, data: the sections of the configuration, of a policy or of keypoint regression; storage, cache_dir and
    device: its values. data.filter_key, where there is one: only the episodes of this list of the zarr are split.
    Raises as ``ReplayBuffer.open`` does, and ValueError for a list that is not there.
    """
    keypoints = model["name"] == "keypoints"
    target = "keypoint" if keypoints else "action"
    sources = data_sources(shape_meta, target)
    buffer = ReplayBuffer.open(path, sources, storage=_storage(storage, device), cache_dir=cache_dir)
    obs_meta = {key: spec for key, spec in sources.items() if key != target}
    listed = _listed_episodes(path, data.get("filter_key"), buffer.num_episodes)
    splits = split_episodes(len(listed), val_ratio=data["val_ratio"], seed=seed, max_train=data["max_train_episodes"])

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

    return tuple(dataset(listed[episodes]) for episodes in splits)


def _listed_episodes(path, filter_key, num_episodes):
    """Numbers of all episodes, or those of the list ``filter_key`` of robomimic's mask, as conversion keeps them."""
    if filter_key is None:
        return np.arange(num_episodes)
    lists = open_zarr(path).attrs.get("filter_keys")
    if not lists or not isinstance(lists, dict):
        raise ValueError(f"data.filter_key: got {filter_key!r}, allowed: null, as {path} has no attribute filter_keys")
    listed = lookup("data.filter_key", filter_key, lists)
    numbers = set(range(num_episodes))
    if not listed or not isinstance(listed, list) or not all(type(n) is int and n in numbers for n in listed):
        raise ValueError(f"{path}: filter_keys.{filter_key}: got {listed}, allowed: numbers below {num_episodes}")
    return np.array(listed)


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
