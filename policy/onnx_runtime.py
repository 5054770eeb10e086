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
    ValueError for a JSON of another format and for graphs that cannot be read.
    """

    def __init__(self, path, **session):
        path = Path(path)
        self.numbers = _read_numbers(path.with_suffix(".onnx.json"))
        self.encoder = _read_graph(path.with_suffix(".encoder.onnx"), session)
        self.denoiser = _read_graph(path.with_suffix(".denoiser.onnx"), session)

    def sample(self, obs, *, rng=None, noise=None):
        """Draw action chunks: obs {key: (B, To, ...)} in raw units, images of 0..255 (C, h, w) -> (B, T, Da) raw.

        noise (1 + draws, B, T, Da): the start, then what the steps add; drawn from the numpy generator ``rng`` if None.
        Raises ValueError for missing keys, wrong shapes, what is no number, NaN and inf, and images in another range.
        """
        obs = self._checked(obs)
        shape = self._noise_shape(len(next(iter(obs.values()))))
        if noise is None:
            noise = (rng or np.random.default_rng()).standard_normal(shape, np.float32)
        noise = _array("noise", noise, shape)
        (films,) = self.encoder.run(None, obs)
        scale, offset = (np.array(self.numbers["action"][name], np.float32) for name in ("scale", "offset"))
        actions = (self._denoise(films, iter(noise)) - offset) / scale
        if self.numbers["relative_to"]:
            actions[..., : self.numbers["relative_columns"]] += obs[self.numbers["relative_to"]][:, -1:]
        return actions

    def act(self, obs, **options):
        """The steps to execute now, from the last observed one on: (B, Ta, Da); options as ``sample``."""
        start = self.numbers["obs_steps"] - 1
        return self.sample(obs, **options)[:, start : start + self.numbers["action_steps"]]

    def _checked(self, obs):
        """What the encoder reads of ``obs``, as float32."""
        wanted, found, rows = self.numbers["obs"], {}, self.numbers.get("batch")
        missing = [key for key in wanted if key not in obs]
        if missing:
            raise ValueError(f"obs: got keys {sorted(obs)}, allowed: {sorted(wanted)} (missing {missing})")
        for key, about in wanted.items():
            image, shape = about["type"] == "rgb", (rows, self.numbers["obs_steps"], *about["shape"])
            found[key] = _array(f"obs {key!r}", obs[key], shape, kinds="uif" if image else "buif")
            rows = len(found[key])  # those of the first key hold for all
            if image:
                _check_image(key, found[key])
        return found

    def _noise_shape(self, batch):
        draws = 1 + sum(step["noise_weight"] > 0 for step in self.numbers["steps"])
        return draws, batch, self.numbers["horizon"], self.numbers["action_dim"]

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


def _array(key, values, shape, kinds="f"):
    """``values`` as float32; ValueError unless they are finite, of numpy's ``kinds`` and ``shape`` (None: any rows)."""
    try:
        values = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: got no array of numbers ({error})") from error
    if values.dtype.kind not in kinds:
        raise ValueError(f"{key}: got {values.dtype}, allowed: real numbers")
    rows, *others = shape
    if list(values.shape[1:]) != others or values.ndim == 0 or len(values) == 0 or rows not in (None, len(values)):
        allowed = ", ".join(map(str, ("B" if rows is None else rows, *others)))
        raise ValueError(f"{key}: got shape {values.shape}, allowed: ({allowed})")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{key}: got NaN or inf, allowed: finite numbers")
    return values


def _check_image(key, values):
    """Raise ValueError for values (B, To, C, h, w) beyond 0..255, or that look like 0 to 1."""
    low, high = values.min(), values.max()
    if low < -0.5 or high > 255.5 or high <= 1 and (values % 1 != 0).any():
        got = f"values in [{low:.3g}, {high:.3g}]"
        raise ValueError(f"obs {key!r}: got {got}, allowed: 0..255, uint8 or float (multiply 0 to 1 by 255)")


def _read_numbers(path):
    try:
        numbers = json.loads(path.read_text())
    except ValueError as error:  # no text, or no JSON
        raise ValueError(f"{path}: got no JSON ({error})") from error
    found = numbers.get("format") if isinstance(numbers, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: got format {found!r}, allowed: {FORMAT!r}")
    return numbers


def _read_graph(path, session):
    if not path.is_file():
        raise FileNotFoundError(f"{path}: got no such file, allowed: the three that were exported together")
    try:
        return onnxruntime.InferenceSession(path, **session)
    except Exception as error:  # onnxruntime's have no class in common
        raise ValueError(f"{path}: got no graph that onnxruntime reads ({' '.join(str(error).split())})") from error
