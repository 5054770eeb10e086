"""Run a policy that ``python -m policy.export RUN OUTPUT.onnx`` wrote, with numpy and onnxruntime alone.

This file needs nothing else of the repository: copy it to the robot, ``pip install numpy onnxruntime``.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime

FORMAT = "fibottention-graphs-2"


class OnnxPolicy:
    """The policy in STEM.encoder.onnx, STEM.denoiser.onnx and STEM.onnx.json; ``path`` is STEM.onnx.

    session: options of ``onnxruntime.InferenceSession``, such as providers. Raises OSError for missing files and
    ValueError for a JSON of another format.
    """

    def __init__(self, path, **session):
        path = Path(path)
        self.numbers = json.loads(path.with_suffix(".onnx.json").read_text())
        if self.numbers.get("format") != FORMAT:
            raise ValueError(f"{path}: got format {self.numbers.get('format')!r}, allowed: {FORMAT!r}")
        self.encoder = onnxruntime.InferenceSession(path.with_suffix(".encoder.onnx"), **session)
        self.denoiser = onnxruntime.InferenceSession(path.with_suffix(".denoiser.onnx"), **session)

    def sample(self, obs, *, rng=None, noise=None):
        """Draw action chunks: obs {key: (B, To, ...)} in raw units, images of 0..255 (C, h, w) -> (B, T, Da) raw.

        noise (1 + draws, B, T, Da): the start, then what the steps add; drawn from the numpy generator ``rng`` if None.
        """
        obs = {key: np.asarray(obs[key], np.float32) for key in self.numbers["obs"]}
        (films,) = self.encoder.run(None, obs)
        if noise is None:
            noise = self._draw(len(films), rng or np.random.default_rng())
        scale, offset = (np.array(self.numbers["action"][name], np.float32) for name in ("scale", "offset"))
        actions = (self._denoise(films, iter(noise)) - offset) / scale
        if self.numbers["relative_to"]:
            actions[..., : self.numbers["relative_columns"]] += obs[self.numbers["relative_to"]][:, -1:]
        return actions

    def act(self, obs, **options):
        """The steps to execute now, from the last observed one on: (B, Ta, Da); options as ``sample``."""
        start = self.numbers["obs_steps"] - 1
        return self.sample(obs, **options)[:, start : start + self.numbers["action_steps"]]

    def _draw(self, batch, rng):
        draws = 1 + sum(step["noise_weight"] > 0 for step in self.numbers["steps"])
        shape = (draws, batch, self.numbers["horizon"], self.numbers["action_dim"])
        return rng.standard_normal(shape, np.float32)

    def _denoise(self, films, noise):
        """films (B, F), noise: iterator of (B, T, Da) -> normalised actions (B, T, Da)."""
        x, last = next(noise), 0.0
        for number, step in enumerate(self.numbers["steps"]):
            (predicted,) = self.denoiser.run(None, {"actions": x, "films": films, "step": np.array([number], np.int64)})
            raw = step["keep"] * x + step["predict"] * predicted
            clean = np.clip(raw, -1, 1) if self.numbers["clip"] else raw
            x = step["x_weight"] * x + step["clean_weight"] * clean + step["raw_weight"] * raw
            x = x + step["last_weight"] * last
            if step["noise_weight"]:
                x = x + step["noise_weight"] * next(noise)
            last = clean
        return x
