"""Feature maps whose products stand for exp(q k / sqrt(D)) or another kernel, random ones and others.

A map of x (B, H, T, D) is a pair (log, base) that stands for the features exp(log) * base: log and base are
(B, H, T, M) or broadcast to it, so that whoever multiplies features may first subtract what cancels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from policy.registry import at_least, choose, lookup

SCHEMES = ("resample", "fixed", "learnable")
RELU_SHIFT, PLAIN_SHIFT = 1e-3, 0.1  # keep features above zero


def layer_generator(seed, layer):
    """The generator of a layer's initial values."""
    return torch.Generator().manual_seed(1000 * seed + layer)


def orthogonal_gaussian(heads, rows, width, *, generator=None, device=None, dtype=torch.float32):
    """Gaussian vectors (heads, rows, width), orthogonal in blocks of ``width`` (arXiv 2009.14794, section 2.4)."""
    options = {"generator": generator, "device": device, "dtype": dtype}
    blocks = -(-rows // width)
    directions, triangle = torch.linalg.qr(torch.randn(heads, blocks, width, width, **options))
    # QR alone prefers some directions; with these signs all are equally likely and the kernel is unbiased.
    directions = directions * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    lengths = torch.randn(heads, rows, width, **options).norm(dim=-1, keepdim=True)
    return directions.transpose(-2, -1).flatten(1, 2)[:, :rows] * lengths


def _scaled(x):
    """x over D^(1/4): products are then scores."""
    return x * x.shape[-1] ** -0.25


def favorp(x, projection):
    """Positive features of the softmax kernel (arXiv 2009.14794, lemma 1): exp(w x - |x|^2 / 2)."""
    x = _scaled(x)
    return x @ projection.transpose(-2, -1) - x.square().sum(-1, keepdim=True) / 2, x.new_ones(1, 1, 1, 1)


def fourier(x, projection):
    """Trigonometric features of the softmax kernel (arXiv 2103.02143, section 2.2): exp(|x|^2 / 2) (sin, cos)(w x)."""
    x = _scaled(x)
    angle = x @ projection.transpose(-2, -1)
    base = torch.cat([angle.sin(), angle.cos()], dim=-1) * projection.shape[1] ** -0.5
    return x.square().sum(-1, keepdim=True) / 2, base


def relu(x, projection):
    """Generalised features (arXiv 2009.14794, section 2.2): relu(w x) / sqrt(M), shifted."""
    return _plain((_scaled(x) @ projection.transpose(-2, -1) * projection.shape[1] ** -0.5).relu() + RELU_SHIFT)


def dpfp(x, rolls):
    """Deterministic features (arXiv 2102.11174, section 5.3) of width 2 D rolls: relu(+-x) times itself rolled."""
    both = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return _plain(torch.cat([both * both.roll(shift, dims=-1) for shift in range(1, rolls + 1)], dim=-1))


def _plain(base):
    return base.new_zeros(1, 1, 1, 1), base


RANDOM = {"favorp": favorp, "fourier": fourier, "relu": relu}
ELEMENTWISE = {"relu_only": torch.relu, "sigmoid_only": torch.sigmoid}
PROJ_METHODS = (*RANDOM, *ELEMENTWISE, "dpfp", "mlp_fourier")


class FeatureMap(nn.Module):
    """Features of queries and keys, each (B, H, T, D) -> (log, base) as the module says; PROJ_METHODS names them.

    The "random" ones project on num_features vectors for each head: "favorp", "relu" (num_features features) and
    "fourier" (twice as many). sample_scheme: "resample" draws these anew at every training forward, from torch's
    global generator, and evaluates with the buffer; "fixed" always takes the buffer; "learnable" makes it a parameter.
    The buffer is drawn from ``seed`` and ``layer``. "dpfp" has num_features, a multiple of 2 D. "mlp_fourier" learns
    num_features / 2 frequencies and one layer on their sines and cosines. "relu_only" and "sigmoid_only" have D
    features and no use for num_features. Raises ValueError for other options.
    """

    def __init__(self, num_heads, width, *, proj_method, num_features, sample_scheme, seed, layer):
        super().__init__()
        lookup("proj_method", proj_method, dict.fromkeys(PROJ_METHODS))
        choose("sample_scheme", sample_scheme, SCHEMES)
        if sample_scheme == "learnable" and proj_method not in RANDOM:
            allowed = "resample, fixed (nothing is drawn)"
            raise ValueError(f"sample_scheme: got 'learnable', allowed with {proj_method}: {allowed}")
        at_least(1, num_features=num_features)
        unit = {"dpfp": 2 * width, "mlp_fourier": 2}.get(proj_method, 1)
        if num_features % unit:
            allowed = f"multiples of {unit}"
            raise ValueError(f"num_features: got {num_features}, allowed with proj_method {proj_method!r}: {allowed}")
        self.proj_method, self.num_features, self.sample_scheme = proj_method, num_features, sample_scheme
        generator = layer_generator(seed, layer)
        if proj_method == "mlp_fourier":
            self.projection = nn.Parameter(0.02 * torch.randn(num_heads, num_features // 2, width, generator=generator))
            self.layer = nn.Linear(num_features, num_features)
        elif proj_method in RANDOM:
            drawn = orthogonal_gaussian(num_heads, num_features, width, generator=generator)
            if sample_scheme == "learnable":
                self.projection = nn.Parameter(drawn)
            else:
                self.register_buffer("projection", drawn)

    @torch.no_grad()
    def resample(self, generator):
        """Draw the random projection anew; raises ValueError where there is none."""
        if self.proj_method not in RANDOM:
            raise ValueError(f"resample: got proj_method {self.proj_method!r}, allowed: {', '.join(RANDOM)}")
        self.projection.copy_(orthogonal_gaussian(*self.projection.shape, generator=generator))

    def forward(self, q, k):
        """q, k (B, H, T, D) -> their (log, base)."""
        if self.proj_method in RANDOM:
            projection = self._projection(q)
            return tuple(RANDOM[self.proj_method](x, projection) for x in (q, k))
        return self._deterministic(q), self._deterministic(k)

    def _projection(self, q):
        if self.training and self.sample_scheme == "resample":
            return orthogonal_gaussian(*self.projection.shape, device=q.device, dtype=q.dtype)
        return self.projection.to(q.dtype)

    def _deterministic(self, x):
        if self.proj_method in ELEMENTWISE:
            return _plain(ELEMENTWISE[self.proj_method](x) + PLAIN_SHIFT)
        if self.proj_method == "dpfp":
            return dpfp(x, self.num_features // (2 * x.shape[-1]))
        angle = x @ self.projection.to(x.dtype).transpose(-2, -1)
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1) * x.shape[-1] ** -0.5
        return _plain(F.linear(waves, self.layer.weight.to(x.dtype), self.layer.bias.to(x.dtype)).relu())
