"""What a trained diffusion policy does: draw chunks of actions, and act on a robot, one observation at a time."""

import math
import numbers
from collections import deque

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from policy.denoiser.loop import DenoisingLoop
from policy.denoiser.samplers import PREDICTIONS, sampling_steps
from policy.registry import at_least, choose

WARM_START = 0.5  # share of the sampling steps that refine the rest of the previous chunk


class ChunkSampler(nn.Module):
    """Observations of To steps -> chunks of actions of T steps, of which Ta are executed.

    encoder: an ``ObservationEncoder``; denoiser: of policy.denoiser; relative_to: key whose last observed value is
    added to the first columns of every action, or None. noise: arguments of diffusers' ``DDPMScheduler``; sampler:
    {"name", "num_inference_steps"}, see ``set_sampler``. Raises ValueError for numbers of steps that do not fit.
    """

    def __init__(self, *, encoder, denoiser, horizon, obs_steps, action_steps, action_dim, relative_to, noise, sampler):
        super().__init__()
        if not 1 <= obs_steps <= horizon:
            raise ValueError(f"obs_steps: got {obs_steps}, allowed: 1 to the horizon {horizon}")
        choose("noise.prediction_type", noise.get("prediction_type"), PREDICTIONS)
        self.encoder, self.denoiser = encoder, denoiser
        self.horizon, self.obs_steps, self.action_dim = horizon, obs_steps, action_dim
        self.relative_to = relative_to
        self.noise_scheduler = _noise_scheduler(noise)
        self.loop = DenoisingLoop(clip=self.noise_scheduler.config.clip_sample)
        self.precision = "fp32"
        self._step_lists = {}  # of the samplers asked for so far
        self.set_action_steps(action_steps)
        self.set_sampler(**sampler)
        self.reset()

    # Settings: training depends on none of them -------------------------------------------------------------------

    def set_action_steps(self, action_steps):
        """How many steps of a chunk ``act`` returns."""
        most = self.horizon - self.obs_steps + 1
        if not 1 <= action_steps <= most:
            raise ValueError(f"action_steps: got {action_steps}, allowed: 1 to {most} (horizon - obs_steps + 1)")
        self.action_steps = action_steps

    def set_sampler(self, name=None, num_inference_steps=None):
        """Sample with ``name`` (policy.denoiser.samplers.SAMPLERS) in as many steps; None leaves either as it is.

        Raises ValueError for an unknown name or impossible number.
        """
        name = name or self.sampler
        count = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        self._steps_of(name, count, 0)
        self.sampler, self.num_inference_steps = name, count

    def set_inference(self, *, precision="fp32", cuda_graph=False):
        """How ``sample`` computes. precision: "bf16" is autocast, or, where the CPU kernels for few rows run, their
        weights; cuda_graph: on a GPU the denoising loop is captured once for each batch size.
        """
        self.precision = choose("precision", precision, ("fp32", "bf16"))
        self.loop.packed_weights = "bfloat16" if precision == "bf16" else "float32"
        self.loop.cuda_graph = cuda_graph
        self.loop.clear()

    def sampling_steps(self, count=None, *, warm_start=None):
        """The steps of the sampler, ``num_inference_steps`` or ``count``; of a warm start, that share from the end."""
        count = self.num_inference_steps if count is None else count
        return self._steps_of(self.sampler, count, 0 if warm_start is None else _skipped(count, warm_start))

    def _steps_of(self, *choice):
        if choice not in self._step_lists:
            name, count, first = choice
            self._step_lists[choice] = sampling_steps(name, self.noise_scheduler.config, count, first=first)
        return self._step_lists[choice]

    @property
    def normalizer(self):
        """Of low-dim keys and actions; the observation encoder owns it, so that it is saved once."""
        return self.encoder.normalizer

    def origin(self, now):
        """What chunks are relative to: the key's value ``now`` (B, D), then zeros: (B, 1, Da)."""
        return F.pad(now, (0, self.action_dim - now.shape[1]))[:, None]

    # Chunks -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, obs, *, generator=None, num_inference_steps=None, previous=None, elapsed=None, warm_start=WARM_START
    ):
        """Draw action chunks: obs {key: (B, To, ...)} in raw units -> (B, T, Da) in raw units.

        Images are uint8 or float in 0..255, (C, h, w). generator: one ``torch.Generator`` or a list of B, one an
        episode. previous: a chunk (B, T, Da) that was sampled ``elapsed`` steps ago; what is left of it is noised and
        denoised with the last ``warm_start`` of the steps only (SDEdit, arXiv 2108.01073; warm starts of plans:
        Diffuser, arXiv 2205.09991). Raises ValueError for missing keys, wrong shapes, NaN or inf, images in another
        range, such as floats in [0, 1], or impossible step counts.
        """
        device = next(self.parameters()).device
        obs = self._tensors(obs)
        batch, seen = self.encoder.check(obs)  # where the values lie
        obs = {key: values.to(device) for key, values in obs.items()}
        if seen != self.obs_steps:
            raise ValueError(f"obs: got {seen} steps, allowed: {self.obs_steps}")
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator: got a list of {len(generator)}, allowed: one, or a list of {batch} (B)")
        origin = self.origin(obs[self.relative_to][:, -1].float()) if self.relative_to else 0.0
        guess = None if previous is None else self._rest_of(previous, elapsed, batch).to(device)
        steps = self.sampling_steps(num_inference_steps, warm_start=None if guess is None else warm_start)
        start, noise = self.loop.draw((batch, self.horizon, self.action_dim), steps, generator=generator, device=device)
        if guess is not None:
            guess = self.normalizer.normalize("action", guess - origin)
            start = self.noise_scheduler.add_noise(guess, start, torch.tensor(steps[0].timestep))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            frames = self.encoder({key: value.flatten(0, 1) for key, value in obs.items()})  # (B * To, K)
            chunk = self.loop(self.denoiser, frames.reshape(batch, -1), start, noise, steps)
        return self.normalizer.denormalize("action", chunk) + origin

    def _tensors(self, obs):
        """What the encoder reads of ``obs``, as tensors where they lie."""
        tensors = {}
        for key in (key for key in self.encoder.shapes if key in obs):
            try:
                tensors[key] = torch.as_tensor(obs[key])
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"obs {key!r}: got no array of numbers ({error})") from error
        return tensors

    def _rest_of(self, previous, elapsed, batch):
        """``previous`` (B, T, Da) without the ``elapsed`` first steps, its last one repeated."""
        previous = torch.as_tensor(previous).float()
        shape, got = (batch, self.horizon, self.action_dim), tuple(previous.shape)
        if got != shape or not isinstance(elapsed, numbers.Integral) or not 0 <= elapsed < self.horizon:
            allowed = f"{shape} (B, T, Da), 0 to {self.horizon - 1}"
            raise ValueError(f"previous, elapsed: got {got}, {elapsed}, allowed: {allowed}")
        if not previous.isfinite().all():
            raise ValueError("previous: got NaN or inf, allowed: a chunk that was sampled")
        return torch.cat([previous[:, elapsed:], previous[:, -1:].expand(-1, elapsed, -1)], dim=1)

    def act(self, obs, **options):
        """The steps to execute now, from the last observed one on: (B, Ta, Da); options as ``sample``."""
        start = self.obs_steps - 1
        return self.sample(obs, **options)[:, start : start + self.action_steps]

    # On a robot ---------------------------------------------------------------------------------------------------

    def reset(self):
        """Forget the observations and the plan of ``select_action``: an episode begins."""
        self._observed, self._planned = deque(maxlen=self.obs_steps), deque()

    def select_action(self, obs, **options):
        """The action (Da,) for now, of one observation {key: (...)}; call it at every control step.

        It keeps the last To observations, executes Ta actions, then plans again; options as ``sample``. Before the
        first observation there is nothing: that one is repeated, as in training. Raises ValueError as ``sample`` does.
        """
        obs = {key: values.clone() for key, values in self._tensors(obs).items()}  # cameras reuse memory
        self.encoder.check({key: value[None, None] for key, value in obs.items()})
        self._observed.extend([obs] * (1 if self._observed else self.obs_steps))
        if not self._planned:
            stacked = {key: torch.stack([seen[key] for seen in self._observed])[None] for key in obs}
            self._planned.extend(self.act(stacked, **options)[0])
        return self._planned.popleft()


def _noise_scheduler(noise):
    """diffusers' ``DDPMScheduler`` with the options ``noise``; ValueError where these give no falling signal."""
    choose("noise.clip_sample", noise.get("clip_sample", True), (True, False))
    at_least(1, **{"noise.num_train_timesteps": noise.get("num_train_timesteps", 1000)})
    try:
        with torch.device("cpu"):  # whatever the default is, as where a model is built without memory
            scheduler = DDPMScheduler(**noise)
    except (TypeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"noise: got {noise}, allowed: options of diffusers' DDPMScheduler ({error})") from error
    levels = scheduler.alphas_cumprod
    if not ((levels > 0) & (levels < 1)).all() or not (levels.diff() < 0).all():
        raise ValueError(f"noise: got {noise}, allowed: betas above 0 and below 1")
    return scheduler


def _skipped(count, warm_start):
    """How many of ``count`` sampling steps a warm start leaves out."""
    if not 0 < warm_start <= 1:
        raise ValueError(f"warm_start: got {warm_start}, allowed: above 0, to 1")
    return count - math.ceil(round(warm_start * count, 9))  # 7 % of 100 are 7, not 7.000000000000001
