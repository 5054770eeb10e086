"""Diffusion policy: a DDPM over action chunks, conditioned on encoded observations.

Sources: Diffusion Policy (arXiv 2303.04137), DDPM (arXiv 2006.11239), DDIM (arXiv 2010.02502); the schedulers are
diffusers'. Time table of a chunk: policy/dataset/windows.py.
"""

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from policy.encoder.observation import ObservationEncoder
from policy.normalizer import Normalizer
from policy.registry import lookup
from policy.unet1d import ConditionalUNet1D

PREDICTIONS = ("epsilon", "sample", "v_prediction")  # what the U-Net predicts: noise, clean actions, velocity
SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


class DiffusionPolicy(nn.Module):
    """Observations of To steps -> actions of T steps, of which Ta are executed.

    shape_meta: {"obs": {key: {"type", "shape"}}, "action": {"shape": [Da], "relative_to": low-dim key or null}}.
    relative_to predicts offsets from that key (D,) at the last observed step in the first D entries of the action, such
    as the position of a gripper's pose; actions are then normalised per step of the chunk. An action may also name the
    "scaled" columns: only these are normalised, all by default.
    noise: arguments of diffusers' ``DDPMScheduler``; sampler: {"name": "ddpm" | "ddim", "num_inference_steps"}.
    """

    def __init__(
        self, *, shape_meta, horizon, obs_steps, action_steps, crop, encoder, attention, denoiser, noise, sampler
    ):
        super().__init__()
        self.horizon, self.obs_steps = horizon, obs_steps
        if not 1 <= obs_steps <= horizon:
            raise ValueError(f"obs_steps: got {obs_steps}, allowed: 1 to the horizon {horizon}")
        self.set_action_steps(action_steps)
        obs_meta, action_meta = shape_meta["obs"], shape_meta["action"]
        (self.action_dim,) = action_meta["shape"]
        self.relative_to = action_meta.get("relative_to")
        self.scaled = action_meta.get("scaled")
        if self.scaled is not None and not set(self.scaled) <= set(range(self.action_dim)):
            raise ValueError(f"action.scaled: got {self.scaled}, allowed: null or columns below {self.action_dim}")
        self._check_relative(obs_meta)
        low_dim = {key: spec["shape"] for key, spec in obs_meta.items() if spec["type"] == "low_dim"}
        action_shape = (horizon, self.action_dim) if self.relative_to else (self.action_dim,)
        normalizer = Normalizer({**low_dim, "action": action_shape})
        self.encoder = ObservationEncoder(
            shape_meta=obs_meta, crop=crop, encoder=encoder, attention=attention, normalizer=normalizer
        )
        self.denoiser = ConditionalUNet1D(
            action_dim=self.action_dim, condition_dim=obs_steps * self.encoder.out_dim, **denoiser
        )
        if horizon % self.denoiser.multiple:
            raise ValueError(f"horizon: got {horizon}, allowed: a multiple of {self.denoiser.multiple} (U-Net levels)")
        if noise["prediction_type"] not in PREDICTIONS:
            raise ValueError(f"prediction_type: got {noise['prediction_type']!r}, allowed: {', '.join(PREDICTIONS)}")
        self.noise_scheduler = DDPMScheduler(**noise)
        self.sampler = lookup("sampler", sampler["name"], SCHEDULERS).from_config(self.noise_scheduler.config)
        self.num_inference_steps = sampler["num_inference_steps"]
        self._check_inference_steps(self.num_inference_steps)

    def set_action_steps(self, action_steps):
        """How many steps of a chunk ``act`` returns; training does not depend on it."""
        most = self.horizon - self.obs_steps + 1
        if not 1 <= action_steps <= most:
            raise ValueError(f"action_steps: got {action_steps}, allowed: 1 to {most} (horizon - obs_steps + 1)")
        self.action_steps = action_steps

    def _check_relative(self, obs_meta):
        if self.relative_to is None:
            return
        low_dim = {key: s["shape"][0] for key, s in obs_meta.items() if s["type"] == "low_dim"}
        keys = [key for key, size in low_dim.items() if size <= self.action_dim]
        if self.relative_to not in keys:
            raise ValueError(f"action.relative_to: got {self.relative_to!r}, allowed: null or one of {keys}")

    def _check_inference_steps(self, steps):
        train_steps = self.noise_scheduler.config.num_train_timesteps
        if not 1 <= steps <= train_steps:
            raise ValueError(f"num_inference_steps: got {steps}, allowed: 1 to {train_steps}")

    @property
    def normalizer(self):
        """Of low-dim keys and actions; the observation encoder owns it, so that it is saved once."""
        return self.encoder.normalizer

    def _origin(self, now):
        """What chunks are relative to: the key's value ``now`` (B, D), then zeros: (B, 1, Da)."""
        return F.pad(now, (0, self.action_dim - now.shape[1]))[:, None]

    # Training -------------------------------------------------------------------------------------------------

    def fit_normalizer(self, dataset):
        """Take the ranges of the training windows of ``dataset`` (policy.dataset.WindowDataset)."""
        arrays = dataset.buffer.arrays
        for key in self.encoder.low_dim:
            self.normalizer.fit(key, torch.from_numpy(arrays[key][dataset.windows[:, : self.obs_steps]]).flatten(0, 1))
        actions = torch.from_numpy(arrays["action"][dataset.windows])  # (W, T, Da)
        if self.relative_to:
            now = torch.from_numpy(arrays[self.relative_to][dataset.windows[:, self.obs_steps - 1]])
            actions = actions - self._origin(now)
        else:
            actions = actions.flatten(0, 1)
        self.normalizer.fit("action", actions, self.scaled)

    def randomness(self, count, generator):
        """What the loss of ``count`` samples draws: {"noise": (B, T, Da), "steps": (B,)} on the CPU."""
        train_steps = self.noise_scheduler.config.num_train_timesteps
        return {
            "noise": torch.randn(count, self.horizon, self.action_dim, generator=generator),
            "steps": torch.randint(train_steps, (count,), generator=generator),
        }

    def loss(self, batch, randomness):
        """{"loss": total, ...parts} of a batch of ``WindowDataset`` as tensors, with "crop" (U, 2) in [0, 1) or None.

        The noise-prediction loss of DDPM, equation 14 of arXiv 2006.11239, or the same error of the clean actions
        or of the velocity (arXiv 2202.00512, section 4), as the scheduler's prediction_type says.
        """
        features = self.encoder(batch["obs"], batch.get("crop"))[batch["frame"]]  # (B, To, K)
        actions = batch["action"]
        if self.relative_to:
            actions = actions - self._origin(batch["obs"][self.relative_to][batch["frame"][:, -1]])
        actions = self.normalizer.normalize("action", actions)
        noisy = self.noise_scheduler.add_noise(actions, randomness["noise"], randomness["steps"])
        predicted = self.denoiser(noisy, randomness["steps"], features.flatten(1))
        diffusion = F.mse_loss(predicted.float(), self._target(actions, randomness))
        return {"loss": diffusion, "diffusion": diffusion.detach()}

    def _target(self, actions, randomness):
        prediction = self.noise_scheduler.config.prediction_type
        if prediction == "epsilon":
            return randomness["noise"]
        if prediction == "sample":
            return actions
        return self.noise_scheduler.get_velocity(actions, randomness["noise"], randomness["steps"])

    def forward(self, batch, randomness):
        """The loss; torch's and accelerate's wrappers only know ``forward``."""
        return self.loss(batch, randomness)

    # Inference ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, obs, *, generator=None, num_inference_steps=None):
        """Draw action chunks: obs {key: (B, To, ...)} in raw units -> (B, T, Da) in raw units.

        Images are uint8 or float in 0..255, (C, h, w). generator: one ``torch.Generator`` or a list of B, one an
        episode. Raises ValueError for missing keys, wrong shapes or impossible step counts.
        """
        device = next(self.parameters()).device
        obs = {key: torch.as_tensor(obs[key]).to(device) for key in self.encoder.shapes if key in obs}
        batch, steps = self.encoder.check(obs)
        if steps != self.obs_steps:
            raise ValueError(f"obs: got {steps} steps, allowed: {self.obs_steps}")
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator: got a list of {len(generator)}, allowed: one, or a list of {batch} (B)")
        if num_inference_steps is None:
            num_inference_steps = self.num_inference_steps
        self._check_inference_steps(num_inference_steps)
        flat = {key: value.flatten(0, 1) for key, value in obs.items()}
        condition = self.encoder(flat).reshape(batch, -1)  # (B, To * K)
        chunk = self._denoise(condition, generator, num_inference_steps)
        chunk = self.normalizer.denormalize("action", chunk)
        if self.relative_to:
            chunk = chunk + self._origin(obs[self.relative_to][:, -1].to(chunk))
        return chunk

    def _denoise(self, condition, generator, num_inference_steps):
        shape = (len(condition), self.horizon, self.action_dim)
        chunk = randn_tensor(shape, generator=generator, device=condition.device, dtype=torch.float32)
        self.sampler.set_timesteps(num_inference_steps, device=condition.device)
        for step in self.sampler.timesteps:
            noise = self.denoiser(chunk, step.expand(len(chunk)), condition)
            chunk = self.sampler.step(noise.float(), step, chunk, generator=generator).prev_sample
        return chunk

    def act(self, obs, **options):
        """The steps to execute now, from the last observed one on: (B, Ta, Da); options as ``sample``."""
        start = self.obs_steps - 1
        return self.sample(obs, **options)[:, start : start + self.action_steps]
