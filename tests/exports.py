"""Policies of random weights, what they observe and draw, and their exports: for tests of graphs and their runtime."""

import functools

import numpy as np
import tiny
import torch

from policy.build import build_model
from policy.export import export

KINDS = ("mean-pool", "conv-stem", "resnet18")


def shape_meta(obs, size=3, **action):
    return {"shape_meta": {"obs": obs, "action": {"type": "low_dim", "shape": [size], **action}}}


def config_of(kind):
    """A configuration for each way through encoder, normaliser and loop."""
    if kind == "mean-pool":  # with an image that the patches do not cover, relative columns 0, 1 and scaled ones 1, 2
        task = shape_meta({**tiny.LOW_DIM, **tiny.IMAGE}, relative_to="agent_pos", scaled=[1, 2])
        config = tiny.policy_config(images=True, sampler="ddim", task=task)
        config["encoder"] = {**config["encoder"], "patch_size": 3, "drop_remainder": True}
    elif kind == "conv-stem":
        config = tiny.policy_config(images=True, sampler="ddpm")
        config["encoder"] = {**config["encoder"], "stem": "conv", "pool": "spatial_softmax", "num_keypoints": 3}
        config["attention"] = {**config["attention"], "masked_score": "exclude"}
        config["model"]["denoiser"]["widths"] = [8]  # cheap
    else:
        obs = {
            **tiny.LOW_DIM,
            "image": {"type": "rgb", "shape": [3, 34, 40]},
            "angle": {"type": "low_dim", "shape": [1]},
        }
        config = tiny.policy_config(images=True, crop=33, sampler="dpmpp_2m", task=shape_meta(obs))
        config["encoder"] = {"name": "resnet18", "num_keypoints": 2, "out_dim": 3}
        config["model"]["noise"] = {**config["model"]["noise"], "prediction_type": "v_prediction", "clip_sample": False}
        config["model"]["denoiser"]["widths"] = [8]
    return config


def write_policy(path, config, *, seed=0):
    """A checkpoint of random weights and ranges, and its policy."""
    torch.manual_seed(seed)
    policy = build_model(config).eval()
    for key in (*policy.encoder.low_dim, "action"):
        data = torch.randn(5, *policy.normalizer.get_buffer(f"{key}_scale").shape)
        policy.normalizer.fit(key, 30 * data + 7, policy.scaled if key == "action" else None)
    tiny.save(path, policy, config)
    return policy


def observations(policy, batch, seed=0):
    rng = np.random.default_rng(seed)
    return {
        key: rng.integers(0, 256, (batch, policy.obs_steps, *shape), dtype=np.uint8)
        if key in policy.encoder.cameras
        else rng.normal(7, 30, (batch, policy.obs_steps, *shape)).astype(np.float32)
        for key, shape in policy.encoder.shapes.items()
    }


def noise_of(policy, batch, seed):
    """What ``policy.sample`` draws from a generator of this seed."""
    generator, shape = torch.Generator().manual_seed(seed), (batch, policy.horizon, policy.action_dim)
    start, draws = policy.loop.draw(shape, policy.sampling_steps(), generator=generator, device="cpu")
    return torch.cat([start[None], draws]).numpy()


def exporter(tmp_path_factory, endings):
    """kind -> a policy and the folder of its exports policy.ENDING, made once."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        policy = write_policy(folder / "policy.safetensors", config_of(kind))
        for ending in endings:
            export(folder / "policy.safetensors", folder / f"policy{ending}")
        return policy, folder

    return make
