"""Windows of T frames cut from a replay buffer, and the split of its episodes.

Time table of a window whose second frame is "now" (T = 16, To = 2, Ta = 8), as in Diffusion Policy
(arXiv 2303.04137):

    frame        t-1  t  t+1 ...  t+7  t+8 ... t+14
    observed      x   x
    predicted     x   x   x  ...   x    x  ...  x
    executed          x   x  ...   x
"""

import numpy as np
import torch


def window_frames(episode_ends, *, horizon, pad_before, pad_after, episodes=None):
    """Frame numbers (W, T) of every window of the chosen episodes, never crossing an episode's edge.

    A window may start up to ``pad_before`` frames before its episode and end up to ``pad_after`` frames after it;
    frames outside repeat the first or last one. episodes: episode numbers, all by default.

    Raises ValueError when no window fits.
    """
    if horizon < 1 or not 0 <= pad_before < horizon or not 0 <= pad_after < horizon:
        raise ValueError(
            f"horizon, pad_before, pad_after: got {horizon}, {pad_before}, {pad_after},"
            " allowed: horizon >= 1 and pads from 0 to horizon - 1"
        )
    starts = np.concatenate([[0], episode_ends[:-1]])
    episodes = np.arange(len(episode_ends)) if episodes is None else np.asarray(episodes, dtype=np.int64)
    windows = []
    for first, end in zip(starts[episodes], episode_ends[episodes], strict=True):
        origin = np.arange(first - pad_before, end - horizon + pad_after + 1)
        windows.append(np.clip(origin[:, None] + np.arange(horizon), first, end - 1))
    windows = np.concatenate(windows) if windows else np.empty((0, horizon), dtype=np.int64)
    if len(windows) == 0:
        longest = int((episode_ends - starts)[episodes].max()) if len(episodes) else 0
        raise ValueError(
            f"horizon: got {horizon}, allowed: at most {longest + pad_before + pad_after}"
            f" (longest of {len(episodes)} episodes: {longest} frames, padding {pad_before} + {pad_after})"
        )
    return windows


def split_episodes(num_episodes, *, val_ratio, seed, max_train=None):
    """Held-out split by episode: (train, val) sorted disjoint episode numbers.

    At least one episode is held out when val_ratio > 0. ``max_train`` caps the training episodes; what it leaves
    over is used for neither (the published code validates on it, so that its "validation" set changes with the cap).
    """
    if not 0 <= val_ratio < 1:
        raise ValueError(f"val_ratio: got {val_ratio}, allowed: 0 <= val_ratio < 1")
    if max_train is not None and max_train < 1:
        raise ValueError(f"max_train_episodes: got {max_train}, allowed: >= 1 or null")
    if seed < 0:
        raise ValueError(f"seed: got {seed}, allowed: >= 0")
    order = np.random.default_rng(seed).permutation(num_episodes)
    num_val = max(1, round(val_ratio * num_episodes)) if val_ratio > 0 else 0
    if num_val >= num_episodes:
        raise ValueError(
            f"val_ratio: got {val_ratio} of {num_episodes} episodes, allowed: one that leaves some to train"
        )
    val, train = order[:num_val], order[num_val:]
    return np.sort(train[:max_train]), np.sort(val)


def epoch_order(num_windows, *, seed, epoch, group=1):
    """Order (W,) of the windows in one epoch, a function of seed and epoch alone so that resuming needs no state.

    group > 1 keeps runs of that many neighbouring windows together: they share frames, which the encoder then sees
    only once a batch, while a batch still holds many episodes.
    """
    if group < 1:
        raise ValueError(f"windows_per_group: got {group}, allowed: >= 1")
    rng = np.random.default_rng([seed, epoch])
    if group == 1:
        return rng.permutation(num_windows)
    shift = rng.integers(group)  # other neighbours in every epoch
    blocks = np.array_split(np.arange(num_windows), np.arange(shift or group, num_windows, group))
    return np.concatenate([blocks[i] for i in rng.permutation(len(blocks))])


class WindowDataset:
    """Windows of a replay buffer as batches of arrays, of tensors where the buffer's are.

    obs_keys: keys of ``buffer.arrays`` that the policy observes; only the first ``obs_steps`` frames of a window are
    ever read for them. Episodes of fewer than ``shortest`` frames have no window; their numbers are ``unused``.
    """

    def __init__(self, buffer, *, obs_keys, horizon, obs_steps, pad_after, episodes=None):
        if not 1 <= obs_steps <= horizon:
            raise ValueError(f"obs_steps: got {obs_steps}, allowed: 1 to the horizon {horizon}")
        self.buffer = buffer
        self.obs_keys = list(obs_keys)
        self.obs_steps, self.horizon, self.pad_after = obs_steps, horizon, pad_after
        self.shortest = max(horizon - (obs_steps - 1) - pad_after, 1)
        self.use_episodes(np.arange(buffer.num_episodes) if episodes is None else episodes)

    def use_episodes(self, episodes):
        """Consist of the windows of these episode numbers."""
        self.episodes = np.asarray(episodes, dtype=np.int64)
        self.windows = window_frames(
            self.buffer.episode_ends,
            horizon=self.horizon,
            pad_before=self.obs_steps - 1,
            pad_after=self.pad_after,
            episodes=self.episodes,
        )
        lengths = np.diff(self.buffer.episode_ends, prepend=0)
        self.unused = self.episodes[lengths[self.episodes] < self.shortest]

    def __len__(self):
        return len(self.windows)

    def batch(self, indices):
        """{"obs": {key: (U, ...)}, "frame": (B, To), "frame_id": (U,), "action": (B, T, Da)} of windows ``indices``.

        Each of the U distinct observed frames is there once; ``frame`` says where. Images are uint8 (U, C, h, w).
        frame_id is the frame's number in the buffer.
        """
        windows = self.windows[indices]
        frame_id, position = np.unique(windows[:, : self.obs_steps], return_inverse=True)
        return {
            "obs": {key: observed(self.buffer.take(key, frame_id)) for key in self.obs_keys},
            "frame": position.reshape(len(windows), self.obs_steps),
            "frame_id": frame_id,
            "action": self.buffer.take("action", windows),
        }


class FrameDataset:
    """Single frames with targets, for pre-training: ``target_key`` beside the observed keys."""

    def __init__(self, buffer, *, obs_keys, target_key, frames):
        self.buffer = buffer
        self.obs_keys = list(obs_keys)
        self.target_key = target_key
        self.frames = np.asarray(frames)

    def __len__(self):
        return len(self.frames)

    def batch(self, indices):
        """{"obs": {key: (B, ...)}, target_key: (B, ...)}."""
        frames = self.frames[indices]
        obs = {key: observed(self.buffer.take(key, frames)) for key in self.obs_keys}
        return {"obs": obs, self.target_key: self.buffer.take(self.target_key, frames)}


def observed(array):
    """Images (..., h, w, C) as the view (..., C, h, w) that encoders take; anything else as it is."""
    if isinstance(array, torch.Tensor):
        return array.movedim(-1, -3) if array.dtype == torch.uint8 else array
    return np.moveaxis(array, -1, -3) if array.dtype == np.uint8 else array
