"""Diffusion policy: a DDPM over action chunks, conditioned on encoded observations; how it is built and trained.

Sources: Diffusion Policy (arXiv 2303.04137), DDPM (arXiv 2006.11239), and Crossway (arXiv 2307.01849) for the decoder.
Sampling: policy/denoiser/inference.py; time table of a chunk: policy/dataset/windows.py.
"""

import torch
import torch.nn.functional as F

from policy.decoder import build_decoder
from policy.denoiser import build_denoiser
from policy.denoiser.inference import ChunkSampler
from policy.encoder.observation import ObservationEncoder, to_unit
from policy.normalizer import Normalizer
from policy.registry import at_least


class DiffusionPolicy(ChunkSampler):
    """Observations of To steps -> actions of T steps, of which Ta are executed.

    shape_meta: {"obs": {key: {"type", "shape"}}, "action": {"shape": [Da], "relative_to": low-dim key or null}}.
    relative_to predicts offsets from that key (D,) at the last observed step in the first D entries of the action, such
    as the position of a gripper's pose; actions are then normalised per step of the chunk. An action may also name the
    "scaled" columns: only these are normalised, all by default.
    noise, sampler: see ``ChunkSampler``. decoder: {"name", options} of policy.decoder; it takes part in training only.
    timesteps_per_sample: S, diffusion steps that an encoded observation is trained on at once.
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
        obs_meta = shape_meta["obs"]
        action_dim, relative_to, scaled = _read_action(shape_meta)
        normalizer = Normalizer(
            {key: spec["shape"] for key, spec in obs_meta.items() if spec["type"] == "low_dim"}
            | {"action": (horizon, action_dim) if relative_to else (action_dim,)}
        )
        encoder = ObservationEncoder(
            shape_meta=obs_meta, crop=crop, encoder=encoder, attention=attention, normalizer=normalizer
        )
        denoiser = build_denoiser(**denoiser, action_dim=action_dim, condition_dim=obs_steps * encoder.out_dim)
        if horizon % denoiser.multiple:
            raise ValueError(f"horizon: got {horizon}, allowed: a multiple of {denoiser.multiple} (denoiser)")
        at_least(1, timesteps_per_sample=timesteps_per_sample)
        super().__init__(
            encoder=encoder,
            denoiser=denoiser,
            horizon=horizon,
            obs_steps=obs_steps,
            action_steps=action_steps,
            action_dim=action_dim,
            relative_to=relative_to,
            noise=noise,
            sampler=sampler,
        )
        self.scaled, self.timesteps_per_sample = scaled, timesteps_per_sample
        self.decoder = build_decoder(
            **(decoder or {"name": "none"}),
            shape_meta=obs_meta,
            obs_steps=obs_steps,
            bottleneck=(denoiser.widths[-1], horizon // denoiser.multiple),
            condition_dim=encoder.out_dim,
        )

    def forward(self, batch, randomness):
        """The loss; torch's and accelerate's wrappers only know ``forward``."""
        return self.loss(batch, randomness)

    def loss(self, batch, randomness):
        """{"loss": total, ...parts} of a batch of ``WindowDataset`` as tensors, with "crop" (U, 2) in [0, 1) or None.

        "diffusion" is the noise-prediction loss of DDPM, equation 14 of arXiv 2006.11239, or the same error of the
        clean actions or of the velocity (arXiv 2202.00512, section 4), as the scheduler's prediction_type says;
        "decode_KEY" the weighted error of a reconstructed key (arXiv 2307.01849, section 3.3).
        """
        self.loop.clear()  # fused optimizers change weights without counting it
        features = self._features(batch)
        predicted, target, bottleneck = self._predict(batch, randomness, features)
        parts = {"diffusion": F.mse_loss(predicted, target)}
        if self.decoder is not None:
            reconstructed, targets = self._reconstruct(batch, features, bottleneck)
            losses = self.decoder.losses(reconstructed, targets)
            parts |= {f"decode_{key}": value for key, value in losses.items()}
        return {"loss": sum(parts.values()), **{key: value.detach() for key, value in parts.items()}}

    def _features(self, batch):
        """Encoded observations (B, To, K); a frame that several windows share is encoded once."""
        return self.encoder(batch["obs"], batch.get("crop"))[batch["frame"]]

    def _predict(self, batch, randomness, features):
        """(prediction, its target) (B * S, T, Da) and the bottleneck (B * S, C, T') of noisy actions."""
        actions = batch["action"]
        if self.relative_to:
            actions = actions - self.origin(batch["obs"][self.relative_to][batch["frame"][:, -1]])
        actions = self.normalizer.normalize("action", actions).repeat_interleave(self.timesteps_per_sample, dim=0)
        noise, steps = randomness["noise"].flatten(0, 1), randomness["steps"].flatten()
        noisy = self.noise_scheduler.add_noise(actions, noise, steps)
        films = self.denoiser.films(randomness["steps"], features.flatten(1))
        predicted, bottleneck = self.denoiser.denoise_and_bottleneck(noisy, films)
        return predicted.float(), self._target(actions, noise, steps), bottleneck

    def _target(self, actions, noise, steps):
        prediction = self.noise_scheduler.config.prediction_type
        if prediction == "epsilon":
            return noise
        return actions if prediction == "sample" else self.noise_scheduler.get_velocity(actions, noise, steps)

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
        features = self._features(batch)
        *_, bottleneck = self._predict(batch, randomness, features)
        reconstructed, targets = self._reconstruct(batch, features, bottleneck)
        return {key: (targets[key], reconstructed[key]) for key in self.encoder.cameras if key in targets}

    def randomness(self, count, generator):
        """What the loss of ``count`` samples draws: {"noise": (B, S, T, Da), "steps": (B, S)} on the CPU."""
        steps = (count, self.timesteps_per_sample)
        train_steps = self.noise_scheduler.config.num_train_timesteps
        return {
            "noise": torch.randn(*steps, self.horizon, self.action_dim, generator=generator),
            "steps": torch.randint(train_steps, steps, generator=generator),
        }

    def fit_normalizer(self, dataset):
        """Take the ranges of the training windows of ``dataset`` (policy.dataset.WindowDataset).

        ``normalizer.constant`` then names the columns that do not move. Raises ValueError for NaN or inf, by key.
        """
        arrays = dataset.buffer.arrays
        for key in self.encoder.low_dim:
            self.normalizer.fit(key, torch.from_numpy(arrays[key][dataset.windows[:, : self.obs_steps]]).flatten(0, 1))
        actions = torch.from_numpy(arrays["action"][dataset.windows])  # (W, T, Da)
        if self.relative_to:
            now = torch.from_numpy(arrays[self.relative_to][dataset.windows[:, self.obs_steps - 1]])
            actions = actions - self.origin(now)
        else:
            actions = actions.flatten(0, 1)
        self.normalizer.fit("action", actions, self.scaled)

    def compile_training(self):
        """Compile what a training step spends its time in (torch.compile)."""
        self.encoder.compile_cameras()
        self.denoiser.denoise_and_bottleneck = torch.compile(self.denoiser.denoise_and_bottleneck)


def _read_action(shape_meta):
    """(Da, relative_to, scaled) of the task's action; ValueError for keys or columns that there are not."""
    meta = shape_meta["action"]
    (size,), relative_to, scaled = meta["shape"], meta.get("relative_to"), meta.get("scaled")
    if scaled is not None and not set(scaled) <= set(range(size)):
        raise ValueError(f"action.scaled: got {scaled}, allowed: null or columns below {size}")
    keys = [k for k, spec in shape_meta["obs"].items() if spec["type"] == "low_dim" and spec["shape"][0] <= size]
    if relative_to is not None and relative_to not in keys:
        raise ValueError(f"action.relative_to: got {relative_to!r}, allowed: null or one of {keys}")
    return size, relative_to, scaled
