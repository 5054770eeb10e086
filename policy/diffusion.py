"""Diffusion policy: a DDPM over action chunks, conditioned on encoded observations.

Sources: Diffusion Policy (arXiv 2303.04137), DDPM (arXiv 2006.11239), and Crossway (arXiv 2307.01849) for the decoder.
Noise is added by diffusers' scheduler; samplers: policy/denoiser/samplers.py; time table: policy/dataset/windows.py.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from policy.decoder import build_decoder
from policy.denoiser.loop import DenoisingLoop
from policy.denoiser.samplers import PREDICTIONS, sampling_steps
from policy.denoiser.unet1d import ConditionalUNet1D
from policy.encoder.observation import ObservationEncoder, to_unit
from policy.normalizer import Normalizer

WARM_START = 0.5  # share of the sampling steps that refine the rest of the previous chunk


class DiffusionPolicy(nn.Module):
    """Observations of To steps -> actions of T steps, of which Ta are executed.

    shape_meta: {"obs": {key: {"type", "shape"}}, "action": {"shape": [Da], "relative_to": low-dim key or null}}.
    relative_to predicts offsets from that key (D,) at the last observed step in the first D entries of the action, such
    as the position of a gripper's pose; actions are then normalised per step of the chunk. An action may also name the
    "scaled" columns: only these are normalised, all by default.
    noise: arguments of diffusers' ``DDPMScheduler``; sampler: {"name", "num_inference_steps"}, see ``set_sampler``.
    decoder: {"name", options} of policy.decoder; it takes part in training only. timesteps_per_sample: S, diffusion
    steps that an encoded observation is trained on at once.
    """

    def __init__(
        self,
        *,
        shape_meta,
        horizon,
        obs_steps,
        action_steps,
        crop,
        encoder,
        attention,
        denoiser,
        noise,
        sampler,
        decoder=None,  # checkpoints from before there were decoders have neither of these two
        timesteps_per_sample=1,
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
        if timesteps_per_sample < 1:
            raise ValueError(f"timesteps_per_sample: got {timesteps_per_sample}, allowed: >= 1")
        self.timesteps_per_sample = timesteps_per_sample
        self.decoder = build_decoder(
            **(decoder or {"name": "none"}),
            shape_meta=obs_meta,
            obs_steps=obs_steps,
            bottleneck=(self.denoiser.widths[-1], horizon // self.denoiser.multiple),
            condition_dim=self.encoder.out_dim,
        )
        self._step_lists = {}  # of the samplers asked for so far
        self.precision = "fp32"  # of inference
        self.loop = DenoisingLoop(clip=self.noise_scheduler.config.clip_sample)
        self.set_sampler(**sampler)

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

    def set_sampler(self, name=None, num_inference_steps=None):
        """Sample with ``name`` (policy.denoiser.samplers.SAMPLERS) in as many steps; what is not given stays as it is.

        Training does not depend on it. Raises ValueError for an unknown name or impossible number.
        """
        name = name or self.sampler
        count = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        self._sampling_steps(name, count)
        self.sampler, self.num_inference_steps = name, count

    def set_inference(self, *, precision="fp32", cuda_graph=False):
        """How ``sample`` computes. precision: "bf16" is autocast, or, where the CPU kernels for few rows run, their
        weights; cuda_graph: on a GPU the denoising loop is captured once for each batch size.
        """
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision: got {precision!r}, allowed: fp32, bf16")
        self.precision = precision
        self.loop.packed_weights = "bfloat16" if precision == "bf16" else "float32"
        self.loop.cuda_graph = cuda_graph
        self.loop.forget()

    def _sampling_steps(self, name, count, first=0):
        key = (name, count, first)
        if key not in self._step_lists:
            self._step_lists[key] = sampling_steps(name, self.noise_scheduler.config, count, first=first)
        return self._step_lists[key]

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
        """What the loss of ``count`` samples draws: {"noise": (B, S, T, Da), "steps": (B, S)} on the CPU."""
        steps = (count, self.timesteps_per_sample)
        train_steps = self.noise_scheduler.config.num_train_timesteps
        return {
            "noise": torch.randn(*steps, self.horizon, self.action_dim, generator=generator),
            "steps": torch.randint(train_steps, steps, generator=generator),
        }

    def loss(self, batch, randomness):
        """{"loss": total, ...parts} of a batch of ``WindowDataset`` as tensors, with "crop" (U, 2) in [0, 1) or None.

        "diffusion" is the noise-prediction loss of DDPM, equation 14 of arXiv 2006.11239, or the same error of the
        clean actions or of the velocity (arXiv 2202.00512, section 4), as the scheduler's prediction_type says;
        "decode_KEY" the weighted error of a reconstructed key (arXiv 2307.01849, section 3.3).
        """
        self.loop.forget()  # fused optimizers change weights without counting it
        features = self.encoder(batch["obs"], batch.get("crop"))[batch["frame"]]  # (B, To, K)
        predicted, target, bottleneck = self._predict(batch, randomness, features)
        parts = {"diffusion": F.mse_loss(predicted, target)}
        if self.decoder is not None:
            reconstructed, targets = self._reconstruct(batch, features, bottleneck)
            losses = self.decoder.losses(reconstructed, targets)
            parts |= {f"decode_{key}": value for key, value in losses.items()}
        return {"loss": sum(parts.values()), **{key: value.detach() for key, value in parts.items()}}

    def _predict(self, batch, randomness, features):
        """(prediction, its target) (B * S, T, Da) and the bottleneck (B * S, C, T') of noisy actions."""
        actions = batch["action"]
        if self.relative_to:
            actions = actions - self._origin(batch["obs"][self.relative_to][batch["frame"][:, -1]])
        actions = self.normalizer.normalize("action", actions).repeat_interleave(self.timesteps_per_sample, dim=0)
        noise, steps = randomness["noise"].flatten(0, 1), randomness["steps"].flatten()
        noisy = self.noise_scheduler.add_noise(actions, noise, steps)
        films = self.denoiser.films(randomness["steps"], features.flatten(1))
        predicted, bottleneck = self.denoiser.denoise_and_bottleneck(noisy, films)
        return predicted.float(), self._target(actions, noise, steps), bottleneck

    def _reconstruct(self, batch, features, bottleneck):
        """What the decoder makes of the first of S diffusion steps, and what it should: {key: (B', To, ...)} each."""
        every = slice(None, None, self.decoder.every)
        frame = batch["frame"][every]
        observed = {}
        for key in self.decoder.shapes:
            values = batch["obs"][key][frame]  # uncropped
            is_image = key in self.encoder.cameras
            observed[key] = to_unit(values) if is_image else self.normalizer.normalize(key, values.float())
        first = bottleneck[:: self.timesteps_per_sample][every]
        return self.decoder(first, features[every]), self.decoder.targets(observed)

    @torch.no_grad()
    def reconstruct(self, batch, randomness):
        """{camera: (observed, reconstructed)} (B', To, 3, h, w) in [-1, 1] of a batch; {} without a decoder."""
        if self.decoder is None:
            return {}
        features = self.encoder(batch["obs"], batch.get("crop"))[batch["frame"]]
        *_, bottleneck = self._predict(batch, randomness, features)
        reconstructed, targets = self._reconstruct(batch, features, bottleneck)
        return {key: (targets[key], reconstructed[key]) for key in self.encoder.cameras if key in targets}

    def _target(self, actions, noise, steps):
        prediction = self.noise_scheduler.config.prediction_type
        if prediction == "epsilon":
            return noise
        return actions if prediction == "sample" else self.noise_scheduler.get_velocity(actions, noise, steps)

    def compile_training(self):
        """Compile what a training step spends its time in (torch.compile)."""
        self.encoder.compile_cameras()
        self.denoiser.denoise_and_bottleneck = torch.compile(self.denoiser.denoise_and_bottleneck)

    def forward(self, batch, randomness):
        """The loss; torch's and accelerate's wrappers only know ``forward``."""
        return self.loss(batch, randomness)

    # Inference ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self, obs, *, generator=None, num_inference_steps=None, previous=None, elapsed=None, warm_start=WARM_START
    ):
        """Draw action chunks: obs {key: (B, To, ...)} in raw units -> (B, T, Da) in raw units.

        Images are uint8 or float in 0..255, (C, h, w). generator: one ``torch.Generator`` or a list of B, one an
        episode. previous: a chunk (B, T, Da) that was sampled ``elapsed`` steps ago; what is left of it is noised and
        denoised with the last ``warm_start`` of the steps only (SDEdit, arXiv 2108.01073; warm starts of plans:
        Diffuser, arXiv 2205.09991). Raises ValueError for missing keys, wrong shapes or impossible step counts.
        """
        device = next(self.parameters()).device
        obs = {key: torch.as_tensor(obs[key]).to(device) for key in self.encoder.shapes if key in obs}
        batch, steps = self.encoder.check(obs)
        if steps != self.obs_steps:
            raise ValueError(f"obs: got {steps} steps, allowed: {self.obs_steps}")
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator: got a list of {len(generator)}, allowed: one, or a list of {batch} (B)")
        origin = self._origin(obs[self.relative_to][:, -1].float()) if self.relative_to else 0.0
        guess = None if previous is None else self._shifted(previous, elapsed, batch).to(device)
        count = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        steps = self._sampling_steps(self.sampler, count, first=0 if guess is None else _skipped(count, warm_start))
        start, noise = self.loop.draw((batch, self.horizon, self.action_dim), steps, generator=generator, device=device)
        if guess is not None:
            guess = self.normalizer.normalize("action", guess - origin)
            start = self.noise_scheduler.add_noise(guess, start, torch.tensor(steps[0].timestep))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            flat = {key: value.flatten(0, 1) for key, value in obs.items()}
            condition = self.encoder(flat).reshape(batch, -1)  # (B, To * K)
            chunk = self.loop(self.denoiser, condition, start, noise, steps)
        return self.normalizer.denormalize("action", chunk) + origin

    def _shifted(self, previous, elapsed, batch):
        """``previous`` (B, T, Da) without the ``elapsed`` first steps, its last one repeated."""
        previous = torch.as_tensor(previous).float()
        shape, got = (batch, self.horizon, self.action_dim), tuple(previous.shape)
        if got != shape or elapsed is None or not 0 <= elapsed < self.horizon:
            allowed = f"{shape} (B, T, Da), 0 to {self.horizon - 1}"
            raise ValueError(f"previous, elapsed: got {got}, {elapsed}, allowed: {allowed}")
        return torch.cat([previous[:, elapsed:], previous[:, -1:].expand(-1, elapsed, -1)], dim=1)

    def act(self, obs, **options):
        """The steps to execute now, from the last observed one on: (B, Ta, Da); options as ``sample``."""
        start = self.obs_steps - 1
        return self.sample(obs, **options)[:, start : start + self.action_steps]


def _skipped(count, warm_start):
    """How many of ``count`` sampling steps a warm start leaves out."""
    if not 0 < warm_start <= 1:
        raise ValueError(f"warm_start: got {warm_start}, allowed: above 0, to 1")
    return count - math.ceil(round(warm_start * count, 9))  # 7 % of 100 are 7, not 7.000000000000001
