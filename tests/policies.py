"""Tiny diffusion policies ready to sample, and what they see."""

import numpy as np
import tiny
import torch

from policy.build import build_model


def fitted(*, seed=0, **options):
    """A policy of ``tiny.policy_config`` in evaluation mode, the normaliser fitted to its windows, and these."""
    config = tiny.policy_config(**options)
    torch.manual_seed(seed)
    policy = build_model(config).eval()
    data = tiny.window_data(config, tiny.replay_buffer(images=bool(policy.encoder.cameras)))
    policy.fit_normalizer(data)
    return policy, data


def observations(policy, batch=3, seed=0):
    """Random observations {key: (B, To, ...)} as numpy arrays."""
    rng = np.random.default_rng(seed)
    obs = {"agent_pos": rng.uniform(0, 512, (batch, policy.obs_steps, 2)).astype(np.float32)}
    if policy.encoder.cameras:
        obs["image"] = rng.integers(0, 256, (batch, policy.obs_steps, 3, 12, 12), dtype=np.uint8)
    return obs


def seeded(seed=0):
    """A generator for torch."""
    return torch.Generator().manual_seed(seed)
