"""Configuration to data sets and model: the one place that knows which classes a configuration asks for."""

import numpy as np
import torch
from tqdm import tqdm

from policy.dataset import FrameDataset, ReplayBuffer, WindowDataset, split_episodes
from policy.diffusion import DiffusionPolicy
from policy.keypoints import KeypointRegressor
from policy.registry import lookup

MODELS = {"diffusion": DiffusionPolicy, "keypoints": KeypointRegressor}
ENCODER_LOADING = ("init", "freeze")  # how an encoder's weights start, not what it is


def build_model(config):
    """The model that the resolved configuration (a plain dict) describes, with fresh weights."""
    options = dict(config["model"])
    model = lookup("model.name", options.pop("name"), MODELS)
    encoder = {key: value for key, value in config["encoder"].items() if key not in ENCODER_LOADING}
    return model(
        shape_meta=config["task"]["shape_meta"],
        crop=config["crop"],
        encoder=encoder,
        attention=config["attention"],
        **options,
    )


def build_datasets(config, path):
    """(training data, held-out data or None) of the zarr at ``path``, split by episode."""
    task, data, model = config["task"], config["data"], config["model"]
    shape_meta = task["shape_meta"]
    target = "keypoint" if model["name"] == "keypoints" else "action"
    observed = shape_meta["obs"]
    if target == "keypoint":  # pre-training sees images only
        observed = {key: spec for key, spec in observed.items() if spec["type"] == "rgb"}
    sources = {**observed, target: shape_meta[target]}
    buffer = ReplayBuffer.open(path, sources, storage=config["storage"], cache_dir=config["cache_dir"])
    train, val = split_episodes(
        buffer.num_episodes,
        val_ratio=data["val_ratio"],
        seed=config["seed"],
        max_train=data["max_train_episodes"],
    )

    def dataset(episodes):
        if len(episodes) == 0:
            return None
        if target == "keypoint":
            frames = np.concatenate([np.arange(*edge) for edge in _edges(buffer.episode_ends)[episodes]])
            return FrameDataset(buffer, obs_keys=observed, target_key=target, frames=frames)
        return WindowDataset(
            buffer,
            obs_keys=observed,
            horizon=model["horizon"],
            obs_steps=model["obs_steps"],
            pad_after=data["pad_after"],
            episodes=episodes,
        )

    return dataset(train), dataset(val)


def _edges(episode_ends):
    """(E, 2) first frame and the one after the last."""
    return np.column_stack([np.concatenate([[0], episode_ends[:-1]]), episode_ends])


@torch.no_grad()
def cache_features(policy, datasets, *, batch_size=256, device="cpu", precision="fp32"):
    """Encode every frame once with the frozen encoder (centre crop) and let ``datasets`` read features, not images."""
    encoder = policy.encoder
    buffer = datasets[0].buffer
    features = np.empty((buffer.num_frames, encoder.feature_dim), np.float32)
    encoder.to(device).eval()
    starts = range(0, buffer.num_frames, batch_size)
    for start in tqdm(starts, desc="encoding frames once", unit="batch", leave=False, dynamic_ncols=True):
        images = {key: buffer.arrays[key][start : start + batch_size] for key in encoder.cameras}
        images = {key: torch.from_numpy(np.moveaxis(a, -1, 1)).to(device) for key, a in images.items()}
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            features[start : start + batch_size] = encoder.encode_images(images).float().cpu().numpy()
    for key in encoder.cameras:
        del buffer.arrays[key]  # hundreds of MB that nothing reads any more
    buffer.arrays["features"] = features
    for dataset in datasets:
        dataset.obs_keys = [*encoder.low_dim, "features"]
