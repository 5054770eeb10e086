"""Samplers as tables: every step of DDPM, DDIM and DPM-Solver++ is the same linear update with other numbers.

With clean0 = keep x + predict y the clean actions that the model's output y means, and clean = clip(clean0),

    x <- x_weight x + clean_weight clean + raw_weight clean0 + last_weight (clean of the step before) + noise_weight z.

So a sampling loop needs no scheduler object, no branches and nothing from the host. A test compares it with diffusers'
schedulers. Sources: DDPM (arXiv 2006.11239, equations 6 and 7), DDIM (arXiv 2010.02502, equation 12, eta = 0),
DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2); v-prediction: arXiv 2202.00512, appendix D.
"""

from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from policy.registry import lookup, within

PREDICTIONS = ("epsilon", "sample", "v_prediction")  # what the U-Net predicts: noise, clean actions, velocity


class Step(NamedTuple):
    """Numbers of one step, see above; timestep: the diffusion step that the model is told."""

    timestep: int
    keep: float
    predict: float
    x_weight: float
    clean_weight: float
    raw_weight: float = 0.0
    last_weight: float = 0.0
    noise_weight: float = 0.0


def _clean(prediction, level):
    """keep and predict of clean = keep x + predict y, at signal level ``level`` (alpha-bar)."""
    if prediction == "epsilon":
        return {"keep": level**-0.5, "predict": -(((1 - level) / level) ** 0.5)}
    if prediction == "v_prediction":
        return {"keep": level**0.5, "predict": -((1 - level) ** 0.5)}
    return {"keep": 0.0, "predict": 1.0}


def ddpm_steps(timesteps, levels, after, prediction):
    """All noise that the posterior has ("fixed_small"); alpha-bar before and ``after`` each step: (S,) each."""
    for t, level, next_level in zip(timesteps, levels, after, strict=True):
        alpha = level / next_level
        variance = (1 - next_level) / (1 - level) * (1 - alpha)
        yield Step(
            timestep=int(t),
            **_clean(prediction, level),
            x_weight=alpha**0.5 * (1 - next_level) / (1 - level),
            clean_weight=next_level**0.5 * (1 - alpha) / (1 - level),
            noise_weight=max(variance, 1e-20) ** 0.5 if next_level < 1 else 0.0,
        )


def ddim_steps(timesteps, levels, after, prediction):
    """Deterministic; the noise that is kept is that of the clean actions before clipping."""
    for t, level, next_level in zip(timesteps, levels, after, strict=True):
        noise = ((1 - next_level) / (1 - level)) ** 0.5  # of x - sqrt(level) clean0, to sqrt(1 - next_level) epsilon
        yield Step(
            timestep=int(t),
            **_clean(prediction, level),
            x_weight=noise,
            clean_weight=next_level**0.5,
            raw_weight=-noise * level**0.5,
        )


def dpmpp_2m_steps(timesteps, levels, after, prediction):
    """Second-order multistep in the clean actions, first order at both ends."""
    last_width = None
    for t, level, next_level in zip(timesteps, levels, after, strict=True):
        final = next_level == 1.0
        width = np.inf if final else _log_ratio(next_level) - _log_ratio(level)
        gain = next_level**0.5 * -np.expm1(-width)
        second = 0.0 if final or last_width is None else width / last_width / 2
        yield Step(
            timestep=int(t),
            **_clean(prediction, level),
            x_weight=((1 - next_level) / (1 - level)) ** 0.5,
            clean_weight=gain * (1 + second),
            last_weight=-gain * second,
        )
        last_width = width


def _log_ratio(level):
    """lambda = log(alpha / sigma)."""
    return np.log(level / (1 - level)) / 2


def spaced_timesteps(total, count):
    """``count`` of ``total`` diffusion steps, from late to early, of which the first is in the last tenth.

    Those are the multiples of total // count, as published, where they begin so late ("leading" spacing). Else they go
    evenly from the last step on ("trailing"): noise alone is no sample of an earlier step (arXiv 2305.08891, sec. 3.4).
    """
    stride = total // count
    leading = [stride * number for number in reversed(range(count))]
    if 10 * leading[0] >= 9 * total:
        return leading
    return [round(total * number / count) - 1 for number in range(count, 0, -1)]


class _Spaced:
    """A scheduler of diffusers that takes ``spaced_timesteps``, each to the next."""

    def set_timesteps(self, num_inference_steps):
        self.num_inference_steps = num_inference_steps
        steps = spaced_timesteps(self.config.num_train_timesteps, num_inference_steps)
        self.timesteps = torch.tensor(steps, device="cpu")


class SpacedDDPM(_Spaced, DDPMScheduler):
    """diffusers' DDPM, see ``_Spaced``; by itself it ends without noise at step 0 only, at others with 1e-10 of it."""

    def _get_variance(self, t, **options):
        return super()._get_variance(t, **options) * (t != self.timesteps[-1])


class SpacedDDIM(_Spaced, DDIMScheduler):
    """diffusers' DDIM, see ``_Spaced``; by itself it goes on by total // count, whatever its steps are."""

    def step(self, model_output, timestep, sample, **options):
        later = self.timesteps[self.timesteps < timestep]
        width = int(timestep) - (int(later[0]) if len(later) else -1)
        self.num_inference_steps = Fraction(self.config.num_train_timesteps, width)
        return super().step(model_output, timestep, sample, **options)


SAMPLERS = {  # name: steps, the scheduler of diffusers that they equal
    "ddpm": (ddpm_steps, SpacedDDPM),
    "ddim": (ddim_steps, SpacedDDIM),
    "dpmpp_2m": (dpmpp_2m_steps, DPMSolverMultistepScheduler),
}


def diffusers_scheduler(name, noise_config):
    """The scheduler of diffusers that the sampler ``name`` equals, for the training noise ``noise_config``."""
    _, kind = lookup("sampler", name, SAMPLERS)
    if kind is not DPMSolverMultistepScheduler:
        return kind.from_config(noise_config)
    # It does not know clip_sample, but thresholding at a largest value of 1 is the same.
    return kind.from_config(
        noise_config,
        final_sigmas_type="zero",
        thresholding=noise_config.get("clip_sample", False),
        sample_max_value=1.0,
    )


NOISE_OPTIONS = {  # of diffusers' schedulers, with the only value that the tables are for
    "variance_type": "fixed_small",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "thresholding": False,
    "clip_sample_range": 1.0,
    "rescale_betas_zero_snr": False,
}


def sampling_steps(name, noise_config, num_steps, *, first=0):
    """``num_steps`` steps of the sampler ``name`` without the ``first`` ones, as a list of ``Step``.

    noise_config: configuration of diffusers' ``DDPMScheduler`` that the model was trained with. Raises ValueError for
    an unknown sampler, an impossible number, or options of the noise that these tables do not know.
    """
    steps, _ = lookup("sampler", name, SAMPLERS)
    for option, allowed in NOISE_OPTIONS.items():
        if noise_config.get(option, allowed) != allowed:
            raise ValueError(f"noise.{option}: got {noise_config[option]!r}, allowed: {allowed!r}")
    with torch.device("cpu"):  # whatever the default is, as where a model is built without memory
        scheduler = diffusers_scheduler(name, noise_config)
    levels = scheduler.alphas_cumprod.double().numpy()
    within(1, len(levels), num_inference_steps=num_steps)
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.tolist()
    if len(set(timesteps)) < num_steps:  # diffusers' rounding has made two of them one
        raise ValueError(f"num_inference_steps: got {num_steps}, allowed with {name}: fewer than {len(levels)}")
    after = [*levels[timesteps[1:]], 1.0]
    taken = slice(first, None)
    return list(steps(timesteps[taken], levels[timesteps[taken]], after[taken], noise_config["prediction_type"]))
