"""Configuration to data sets and model: the one place that knows which classes a configuration asks for."""

import numpy as np
import torch
from tqdm import tqdm

from policy.dataset import FrameDataset, ReplayBuffer, WindowDataset, split_episodes
from policy.dataset.windows import observed
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
    obs_meta = shape_meta["obs"]
    if target == "keypoint":  # pre-training sees images only
        obs_meta = {key: spec for key, spec in obs_meta.items() if spec["type"] == "rgb"}
    sources = {**obs_meta, target: shape_meta[target]}
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
            return FrameDataset(buffer, obs_keys=obs_meta, target_key=target, frames=frames)
        return WindowDataset(
            buffer,
            obs_keys=obs_meta,
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
    """Encode every frame of ``datasets`` once with the frozen encoder (centre crop) and let them read features.

    The images are dropped from the shared buffer: hundreds of MB that nothing reads any more.
    """
    encoder = policy.encoder
    buffer = datasets[0].buffer
    episodes = np.concatenate([dataset.episodes for dataset in datasets])
    frames = np.concatenate([np.arange(*edge) for edge in _edges(buffer.episode_ends)[episodes]])
    features = np.zeros((buffer.num_frames, encoder.feature_dim), np.float32)
    encoder.to(device).eval()
    with tqdm(total=len(frames), desc="encoding frames once", unit="frame", leave=False, dynamic_ncols=True) as bar:
        for chunk in np.array_split(frames, -(-len(frames) // batch_size)):
            images = {key: torch.from_numpy(observed(buffer.arrays[key][chunk])).to(device) for key in encoder.cameras}
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
                features[chunk] = encoder.encode_images(images).float().cpu().numpy()
            bar.update(len(chunk))
    for key in encoder.cameras:
        del buffer.arrays[key]
    buffer.arrays["features"] = features
    for dataset in datasets:
        dataset.obs_keys = [*encoder.low_dim, "features"]
