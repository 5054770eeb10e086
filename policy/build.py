"""Configuration to data sets and model: the one place that knows which classes a configuration asks for."""

import numpy as np
import torch
from tqdm import tqdm

from policy.dataset import FrameDataset, ReplayBuffer, WindowDataset, split_episodes
from policy.dataset.windows import observed
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


def build_datasets(config, path):
    """(training data, held-out data or None) of the zarr at ``path``, split by episode."""
    task, data, model = config["task"], config["data"], config["model"]
    shape_meta = task["shape_meta"]
    target = "keypoint" if model["name"] == "keypoints" else "action"
    sources = _sources(shape_meta, target)
    buffer = _open_buffer(config, path, sources)
    obs_meta = {key: spec for key, spec in sources.items() if key != target}
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


def _sources(shape_meta, target):
    obs_meta = shape_meta["obs"]
    if target == "keypoint":  # pre-training sees images only
        obs_meta = {key: spec for key, spec in obs_meta.items() if spec["type"] == "rgb"}
    return {**obs_meta, target: shape_meta[target]}


def _open_buffer(config, path, sources):
    storage = config["storage"]
    if storage == "auto":  # see ``place_buffer`` for a GPU; elsewhere a map is there at once from the second run on
        storage = "ram" if _uses_gpu(config) else "mmap"
    return ReplayBuffer.open(path, sources, storage=storage, cache_dir=config["cache_dir"])


def _uses_gpu(config):
    return torch.cuda.is_available() and config["device"] != "cpu"


def place_buffer(buffer, storage, device):
    """Move the arrays to the training ``device`` if asked, or with "auto" to a GPU that has room for them."""
    device = torch.device(device)
    if storage == "auto" and device.type == "cuda":
        size = sum(array.nbytes for array in buffer.arrays.values())
        free = torch.cuda.mem_get_info(device)[0]
        fits = size < free / 2  # the rest is for training
        print(f"storage=auto -> {'device' if fits else 'ram'} ({size / 1e9:.1f} GB, {free / 1e9:.1f} GB free)")
        storage = "device" if fits else "ram"
    if storage == "device":
        buffer.to(device)


def extend_dataset(dataset, path, *, config, policy, device="cpu"):
    """Add the episodes of the zarr at ``path`` to ``dataset``, whose buffer others may share."""
    buffer = dataset.buffer
    sources = _sources(config["task"]["shape_meta"], "action")
    added = ReplayBuffer.open(path, sources)  # into memory: a map of it would stay in cache_dir for one reading
    if "features" in buffer.arrays:
        added.arrays["features"] = encode_frames(policy, added, np.arange(added.num_frames), device=device)
    first = buffer.num_episodes
    buffer.extend(added)
    dataset.use_episodes(np.concatenate([dataset.episodes, np.arange(first, buffer.num_episodes)]))


@torch.no_grad()
def encode_frames(policy, buffer, frames, *, batch_size=256, device="cpu"):
    """Camera features (F, feature_dim) float32 of ``frames`` of a buffer (centre crop), zeros for all others."""
    encoder = policy.encoder
    features = np.zeros((buffer.num_frames, encoder.feature_dim), np.float32)
    encoder.to(device).eval()
    with tqdm(total=len(frames), desc="encoding frames once", unit="frame", leave=False, dynamic_ncols=True) as bar:
        for chunk in np.array_split(frames, -(-len(frames) // batch_size)):
            images = {key: torch.from_numpy(observed(buffer.arrays[key][chunk])).to(device) for key in encoder.cameras}
            features[chunk] = encoder.encode_images(images).cpu().numpy()
            bar.update(len(chunk))
    return features


def cache_features(policy, datasets, **options):
    """Encode every frame of ``datasets`` once with the frozen encoder and let them read features instead of images.

    Images that the decoder does not reconstruct are dropped from the shared buffer: nothing reads them any more.
    options: of ``encode_frames``.
    """
    encoder, buffer = policy.encoder, datasets[0].buffer
    episodes = np.concatenate([dataset.episodes for dataset in datasets])
    frames = np.concatenate([np.arange(*edge) for edge in _edges(buffer.episode_ends)[episodes]])
    features = encode_frames(policy, buffer, frames, **options)
    reconstructed = [] if policy.decoder is None else [key for key in encoder.cameras if key in policy.decoder.shapes]
    for key in set(encoder.cameras) - set(reconstructed):
        del buffer.arrays[key]
    buffer.arrays["features"] = features
    for dataset in datasets:
        dataset.obs_keys = [*encoder.low_dim, "features", *reconstructed]
