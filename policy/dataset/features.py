"""Frames of a replay buffer on their way to training: on the device, extended, encoded once by a frozen encoder."""

import numpy as np
import torch
from tqdm import tqdm

from policy.dataset.replay_buffer import ReplayBuffer
from policy.dataset.windows import observed


def episode_edges(episode_ends):
    """(E, 2) first frame and the one after the last."""
    return np.column_stack([np.concatenate([[0], episode_ends[:-1]]), episode_ends])


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


def extend_dataset(dataset, path, *, sources, policy, device="cpu"):
    """Add the episodes of the zarr at ``path`` to ``dataset``, whose buffer others may share.

    sources: {key: spec} of its arrays; policy: whose frozen encoder makes features, where the buffer holds them.
    """
    buffer = dataset.buffer
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
    frames = np.concatenate([np.arange(*edge) for edge in episode_edges(buffer.episode_ends)[episodes]])
    features = encode_frames(policy, buffer, frames, **options)
    reconstructed = [] if policy.decoder is None else [key for key in encoder.cameras if key in policy.decoder.shapes]
    for key in set(encoder.cameras) - set(reconstructed):
        del buffer.arrays[key]
    buffer.arrays["features"] = features
    for dataset in datasets:
        dataset.obs_keys = [*encoder.low_dim, "features", *reconstructed]
