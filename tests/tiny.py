"""Small configurations, data and models that several test files share."""

import copy

import numpy as np
import torch
import zarr
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from policy.build import build_model
from policy.checkpoint import save_checkpoint
from policy.dataset import ReplayBuffer, WindowDataset

LOW_DIM = {"agent_pos": {"type": "low_dim", "shape": [2]}}
IMAGE = {"image": {"type": "rgb", "shape": [3, 12, 12]}}
VIT = {
    "name": "vit",
    "arch": "vit_tiny_patch16_224",
    "patch_size": 4,
    "dim": 16,
    "depth": 1,
    "num_heads": 2,
    "mlp_ratio": 2,
    "out_dim": 5,
    "init": "none",
    "freeze": False,
}
DECODER = {
    "name": "a",
    "weight": 0.1,
    "weights": {},
    "image_size": None,
    "every": 1,
    "start_channels": 8,
    "channels": 8,
    "code_channels": 8,
    "kernel_size": 3,
    "groups": 4,
}
TRAINING = {
    "seed": 0,
    "epochs": 2,
    "max_steps": None,
    "batch_size": 8,
    "gradient_accumulation": 1,
    "gradient_clip": None,
    "precision": "fp32",
    "optimizer": "adamw",
    "lr": 1e-2,
    "min_lr": 0.0,
    "schedule": "cosine",
    "milestones": [],
    "gamma": 0.1,
    "layer_decay": None,
    "momentum": 0.9,
    "betas": [0.95, 0.999],
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "warmup_steps": 2,
    "warmup_epochs": None,
    "compile": False,
    "windows_per_group": 1,
    "ema": {"power": 0.75, "max_decay": 0.9999},
    "log_every": 1,
    "val_every": 1,
    "max_val_batches": 20,
    "rollout_every": 1,
    "checkpoint_every": 100,
    "top_k": 2,
    "score": "score_mean",
}


def policy_config(*, images=False, crop=8, relative=False, sampler="ddim", **changes):
    """The resolved configuration of a policy of a few thousand parameters; ``changes`` replace keys of its parts."""
    config = {
        "task": {
            "env": {"name": "fake"},
            "shape_meta": {
                "obs": {**(IMAGE if images else {}), **LOW_DIM},
                "action": {"type": "low_dim", "shape": [2], "relative_to": "agent_pos" if relative else None},
            },
        },
        "crop": crop if images else None,
        "encoder": VIT,
        "attention": {"name": "fibottention", "variant": "robot"},
        "model": {
            "name": "diffusion",
            "horizon": 8,
            "obs_steps": 2,
            "action_steps": 4,
            "denoiser": {"widths": [8, 16], "kernel_size": 3, "groups": 4, "step_dim": 8},
            "noise": {
                "num_train_timesteps": 20,
                "beta_schedule": "squaredcos_cap_v2",
                "prediction_type": "epsilon",
                "clip_sample": True,
            },
            "sampler": {"name": sampler, "num_inference_steps": 4},
        },
    }
    config = copy.deepcopy(config)
    for part, values in changes.items():
        config[part] = {**config[part], **values}
    return config


def policy(**options):
    """A fresh tiny policy in evaluation mode."""
    return build_model(policy_config(**options)).eval()


def save(path, model, config, **state):
    """Write ``model`` as the averaged weights of a checkpoint of ``config``; returns the path."""
    weights = {f"ema.{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(path, weights, config=config, state={"step": 1, **state})
    return path


def replay_buffer(*, lengths=(9, 12, 10), images=True, seed=0):
    """Random episodes of these lengths in memory: image, agent_pos in [0, 512) and action in [-1, 1) * 50."""
    rng = np.random.default_rng(seed)
    frames = sum(lengths)
    arrays = {
        "agent_pos": rng.uniform(0, 512, (frames, 2)).astype(np.float32),
        "action": rng.uniform(-50, 50, (frames, 2)).astype(np.float32),
    }
    if images:
        arrays["image"] = rng.integers(0, 256, (frames, 12, 12, 3), dtype=np.uint8)
    return ReplayBuffer(arrays, np.cumsum(lengths))


def window_data(config, buffer, episodes=None):
    """The windows of ``buffer`` that the model of ``config`` reads."""
    model = config["model"]
    return WindowDataset(
        buffer,
        obs_keys=config["task"]["shape_meta"]["obs"],
        horizon=model["horizon"],
        obs_steps=model["obs_steps"],
        pad_after=3,
        episodes=episodes,
    )


def training_options(**changes):
    """The ``training`` section as train.py hands it over."""
    return OmegaConf.create({**TRAINING, **changes})


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation makes, its storage included."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel(), x.untyped_storage().nbytes() // x.element_size())
        return out


def write_demos(path):
    """A zarr of four episodes of 20 frames as of Push-T: random pictures, states and actions."""
    rng = np.random.default_rng(0)
    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    root.create_array("data/img", data=rng.integers(0, 256, (80, 96, 96, 3), dtype=np.uint8))
    root.create_array("data/state", data=rng.uniform(50, 450, (80, 5)).astype(np.float32))
    root.create_array("data/action", data=rng.uniform(50, 450, (80, 2)).astype(np.float32))
    root.create_array("meta/episode_ends", data=np.arange(20, 81, 20))
