"""Every registered attention on few tokens, and options beside those of its configuration."""

import pytest
import torch
from omegaconf import OmegaConf
from paths import ROOT

from policy.attention import build_attention, list_attentions

CONFIGS = ROOT / "config" / "attention"
# Options beside those of the configuration, on few tokens: small windows and groups, and what else is to be seen.
OPTIONS = {
    "bigbird": [{"window_radius": 1, "random_keys": 2, "global_tokens": 1}],
    "causal_eva": [{"window_size": 4, "overlap": True, "chunk_size": 2, "use_t5_rpe": True}],
    "eva": [
        {"window_size": 2, "num_landmarks": 4, "overlap": True, "use_t5_rpe": True},
        {"num_landmarks": 4, "attn_2d": False, "adaptive_proj": "none", "relative_position_bias": True},
    ],
    "fibottention": [{}, {"masked_score": "exclude"}],
    "hybrid": [{"window_size": 2, "dilations": (1, 2)}, {"attn_2d": False}],
    "lara": [{"num_landmarks": 4}, {"num_landmarks": 4, "mix": "vmixed", "proposal": "adaptive_1d"}],
    "linformer": [{"rank": 8}],
    "local": [{"window_size": 2}, {"window_size": 3, "overlap": True, "attn_2d": True, "relative_position_bias": True}],
    "nystromformer": [{"num_landmarks": 4}, {"num_landmarks": 4, "conv_kernel": 3}],
    "performer": [{}, {"num_features": 8, "proj_method": "relu", "cos_weighting": True}],
    "ra": [{}, {"num_samples": 0}],
    "scatterbrain": [{"window_size": 2}, {"attn_2d": True, "overlap": True, "relative_position_bias": True}],
}
DIM, HEADS = 24, 3

every_name = pytest.mark.parametrize("name", list_attentions())
every_attention = pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in list_attentions() for options in OPTIONS.get(name, [{}])], ids=str
)


def configured(name):
    """The options of config/attention/NAME.yaml, none where there is no such file."""
    path = CONFIGS / f"{name}.yaml"
    options = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {"name": name}
    assert options.pop("name") == name  # the others in the folder are variants
    return options


def build(name, options=None, *, grid=(4, 4), prefix=1, seed=0):
    torch.manual_seed(seed)
    geometry = {"num_patches": grid[0] * grid[1], "grid": grid, "layer": 1, "depth": 3, "prefix_tokens": prefix}
    options = {"dim": DIM, "num_heads": HEADS, **configured(name), **(options or OPTIONS.get(name, [{}])[0])}
    return build_attention(name, **geometry, **options).eval()


def seeded(attention, *args, **switches):
    """A call that draws the same numbers every time."""
    torch.manual_seed(5)
    return attention(*args, **switches)


def padding(*samples, tokens=17):
    """key_padding_mask whose row for each of ``samples`` marks these tokens."""
    mask = torch.zeros(len(samples), tokens, dtype=torch.bool)
    for row, places in zip(mask, samples, strict=True):
        row[places] = True
    return mask
