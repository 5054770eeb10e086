"""Small checkpoints, and what they hold, that several test files share."""

import tiny
import torch

from policy.build import build_model

CONFIG = {"seed": 3, "names": ["a", "ü"], "nested": {"lr": 1e-4, "none": None, "flag": True}}
STATE = {"step": 12, "scores": {"step=1.safetensors": 0.5}}


def tensors(seed=0, size=50):
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(size, 3, generator=generator),
        "model.mask": torch.rand(7, generator=generator) > 0.5,
        "ema.weight": torch.randn(size, 3, generator=generator).to(torch.bfloat16),
        "optimizer.step.weight": torch.tensor(12.0),
        "model.ids": torch.arange(5),
    }


def policy_checkpoint(path, seed=0, **options):
    """The path of a checkpoint of a fresh tiny policy, and that policy."""
    torch.manual_seed(seed)
    config = tiny.policy_config(**options)
    model = build_model(config).eval()
    return tiny.save(path, model, config), model
