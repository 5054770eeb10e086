"""Demonstrations on disk to batches of windows."""

from policy.dataset.replay_buffer import ReplayBuffer
from policy.dataset.windows import FrameDataset, WindowDataset, epoch_order, split_episodes, window_frames

__all__ = ["FrameDataset", "ReplayBuffer", "WindowDataset", "epoch_order", "split_episodes", "window_frames"]
