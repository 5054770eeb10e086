"""Policies run as plainly as a user would with diffusers and timm, on our modules and weights: what eval.speed beats.

After the published code (Charlotte-CharMLab/Fibottention, robot_learning/): attention over all pairs times a mask of
zeros and ones, a Python loop over the scheduler, FiLM of [step, observation] in full at every step, samples that hold
all T frames as float32, torch's default AdamW, an EMA in a loop over parameters. All of it eager and in float32. The
weights are our tensors and lie in memory as ours do, which favours it a little.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from policy.attention.fibottention import FibottentionAttention
from policy.dataset.windows import window_frames
from policy.dataset.zarr_checks import open_zarr
from policy.denoiser.samplers import diffusers_scheduler
from policy.encoder.observation import crop_images

# The policy ----------------------------------------------------------------------------------------------------------


class PlainAttention(nn.Module):
    """x (B, P+N, C) -> (B, P+N, C): the layers of ``ours`` (FibottentionAttention) over all pairs of tokens."""

    def __init__(self, ours):
        super().__init__()
        self.qkv, self.proj = ours.qkv, ours.proj
        self.num_heads, self.attn_drop, self.masked_score = ours.num_heads, ours.attn_drop, ours.masked_score
        self.register_buffer("mask", ours.mask.float(), persistent=False)  # made once, as the published code keeps it

    def forward(self, x, attn_mask=None, is_causal=False):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, P+N, D)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        scores = scores * self.mask if self.masked_score == "zero" else scores.masked_fill(self.mask == 0, -torch.inf)
        weights = F.dropout(scores.softmax(dim=-1), self.attn_drop, self.training)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def sharing(policy):
    """A copy of ``policy`` whose parameters are the very tensors of the other one, so that it takes no memory."""
    return copy.deepcopy(policy, {id(parameter): parameter for parameter in policy.parameters()})


def plain_policy(policy):
    """``policy`` with dense attention, sharing its parameters; for the functions below."""
    plain = sharing(policy)
    for module in list(plain.modules()):
        for name, child in module.named_children():
            if isinstance(child, FibottentionAttention):
                setattr(module, name, PlainAttention(child))
    return plain


def normalized(policy, obs):
    """obs {key: (..., *shape)}, images of 0..1, as the encoders take them: float32 in [-1, 1]."""
    encoder = policy.encoder
    return {
        key: value * 2.0 - 1.0 if key in encoder.cameras else encoder.normalizer.normalize(key, value)
        for key, value in obs.items()
    }


def plain_encode(policy, observed, crop=None):
    """``normalized`` frames {key: (U, ...)} -> (U, K); crop: positions (U, 2) in [0, 1), the centre by default."""
    encoder = policy.encoder
    parts = []
    for key in encoder.cameras:
        images = observed[key]
        if encoder.crop is not None and encoder.crop < min(images.shape[-2:]):
            images = crop_images(images, encoder.crop, position=crop)
        parts.append(encoder.encoders[key](images))
    return torch.cat([*parts, *(observed[key] for key in encoder.low_dim)], dim=-1)


def plain_unet(unet, actions, steps, condition):
    """actions (B, T, Da), steps (B,), condition (B, K) -> prediction (B, T, Da), bottleneck (B, C, T')."""
    both = torch.cat([unet.step_embedding(steps), condition], dim=-1)
    return unet.denoise_and_bottleneck(actions, [block.film(both) for block in unet.blocks()])


# Sampling ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_condition(policy, obs):
    """obs {key: (B, To, ...)} as of ``policy.sample`` -> (B, To * K)."""
    flat = {key: obs[key].flatten(0, 1).float() for key in policy.encoder.shapes}
    scaled = {key: value / 255.0 if key in policy.encoder.cameras else value for key, value in flat.items()}
    return plain_encode(policy, normalized(policy, scaled)).reshape(-1, policy.obs_steps * policy.encoder.out_dim)


@torch.no_grad()
def plain_loop(policy, condition, generator=None):
    """condition (B, To * K) -> denoised chunks (B, T, Da), normalised, by the policy's sampler."""
    scheduler = diffusers_scheduler(policy.sampler, policy.noise_scheduler.config)
    scheduler.set_timesteps(policy.num_inference_steps)
    shape = (len(condition), policy.horizon, policy.action_dim)
    where = condition.device if generator is None else generator.device
    x = torch.randn(shape, generator=generator, device=where).to(condition.device)
    for step in scheduler.timesteps:
        predicted, _ = plain_unet(policy.denoiser, x, step.to(x.device).expand(len(x)), condition)
        x = scheduler.step(predicted, step, x, generator=generator).prev_sample
    return x


@torch.no_grad()
def plain_sample(policy, obs, *, generator=None):
    """As ``policy.sample`` from pure noise: obs {key: (B, To, ...)} in raw units -> (B, T, Da) in raw units."""
    chunk = plain_loop(policy, plain_condition(policy, obs), generator)
    return policy.normalizer.denormalize("action", chunk) + _origin(policy, obs)


def _origin(policy, obs):
    """What chunks are relative to, (B, 1, Da) or 0: the key's last observed value, then zeros."""
    if policy.relative_to is None:
        return 0.0
    now = obs[policy.relative_to][:, policy.obs_steps - 1].float()
    return F.pad(now, (0, policy.action_dim - now.shape[1]))[:, None]


# Training ------------------------------------------------------------------------------------------------------------


def plain_loss(policy, batch, *, noise, steps, crop=None):
    """The loss of a batch of ``PlainDataset`` as tensors.

    noise (B, T, Da), steps (B,), crop (B * To, 2): what ``policy.randomness`` and the trainer draw, for S = 1.
    """
    obs = normalized(policy, batch["obs"])  # all T frames, of which the next line drops most
    observed = {key: value[:, : policy.obs_steps].flatten(0, 1) for key, value in obs.items()}
    features = plain_encode(policy, observed, crop).unflatten(0, (-1, policy.obs_steps))  # (B, To, K)
    actions = batch["action"] - _origin(policy, batch["obs"])
    actions = policy.normalizer.normalize("action", actions)
    noisy = policy.noise_scheduler.add_noise(actions, noise, steps)
    predicted, bottleneck = plain_unet(policy.denoiser, noisy, steps, features.flatten(1))
    kind = policy.noise_scheduler.config.prediction_type
    target = {"epsilon": noise, "sample": actions}.get(kind)
    if kind == "v_prediction":
        target = policy.noise_scheduler.get_velocity(actions, noise, steps)
    loss = F.mse_loss(predicted, target)
    if policy.decoder is None:
        return loss
    every = policy.decoder.every
    frames = {key: value[:, : policy.obs_steps][::every] for key, value in obs.items()}
    targets = policy.decoder.targets(frames)
    for key, rebuilt in policy.decoder(bottleneck[::every], features[::every]).items():
        loss = loss + policy.decoder.weights[key] * F.mse_loss(rebuilt, targets[key])
    return loss


def plain_training_step(policy, batch, *, noise, steps, crop, optimizer, average, decay, gradient_clip=None):
    """One update of the parameters by ``optimizer`` and of their EMA ``average`` (a policy); returns the loss."""
    loss = plain_loss(policy, batch, noise=noise, steps=steps, crop=crop)
    loss.backward()
    if gradient_clip is not None:
        nn.utils.clip_grad_norm_(policy.parameters(), gradient_clip)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for old, new in zip(average.parameters(), policy.parameters(), strict=True):
            old.mul_(decay).add_(new, alpha=1 - decay)
    return loss.detach()


# Data ----------------------------------------------------------------------------------------------------------------


class PlainDataset(Dataset):
    """Windows of T frames for torch's DataLoader: {"obs": {key: (T, ...)}, "action": (T, Da)}, all float32.

    arrays: {key: (F, ...)}, images (F, h, w, C) of 0..255; windows: frame numbers (W, T). Images come out as
    (T, C, h, w) of 0..1.
    """

    def __init__(self, arrays, windows, obs_meta):
        self.arrays, self.windows, self.obs_meta = arrays, windows, obs_meta

    @classmethod
    def open(cls, path, shape_meta, *, horizon, obs_steps, pad_after, episodes=None):
        """All arrays of the zarr at ``path`` that the policy reads, decoded into memory as float32."""
        root = open_zarr(path)
        arrays = {}
        for key, spec in {**shape_meta["obs"], "action": shape_meta["action"]}.items():
            source = root[f"data/{spec['source']}"]
            array = np.empty(source.shape, np.float32)
            for start in range(0, len(array), source.chunks[0]):  # zarr 3 holds three times the array when read at once
                array[start : start + source.chunks[0]] = source[start : start + source.chunks[0]]
            arrays[key] = array if spec.get("columns") is None else array[:, list(spec["columns"])]
        pads = {"pad_before": obs_steps - 1, "pad_after": pad_after}
        ends = root["meta/episode_ends"][:].astype(np.int64)
        return cls(arrays, window_frames(ends, horizon=horizon, **pads, episodes=episodes), shape_meta["obs"])

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, index):
        frames = self.windows[index]
        obs = {}
        for key, spec in self.obs_meta.items():
            values = self.arrays[key][frames]
            is_image = spec["type"] == "rgb"
            obs[key] = np.divide(np.moveaxis(values, -1, 1), 255, dtype=np.float32) if is_image else values
        return {"obs": obs, "action": self.arrays["action"][frames]}
