"""Every option of every mechanism changes what it says it changes, and refuses what it cannot do."""

import pytest
import torch
from fibottention_reference import GEOMETRY

from policy.attention import ATTENTIONS, build_attention, list_attentions

# What each change is compared with, where the defaults would hide it: windows or groups of all tokens.
DEFAULTS = {
    "causal_eva": {"window_size": 4},
    "eva": {"num_landmarks": 4},
    "lara": {"num_landmarks": 4},
    "linformer": {"rank": 5},
    "nystromformer": {"num_landmarks": 5},
    "performer": {"num_features": 6},
    "scatterbrain": {"num_features": 6},
}
WINDOWS = [{"window_size": 3}, {"attn_2d": True}, {"overlap": True}, {"relative_position_bias": True}]
DRAWN = [{"seed": 1}, {"layer": 2}]
CHANGES = {
    "bigbird": [{"window_radius": 3}, {"random_keys": 2}, {"global_tokens": 1}, *DRAWN],
    "causal_eva": [
        *({"window_size": 2}, {"overlap": True}, {"chunk_size": 2}, {"num_chunks": 37}),
        *({"adaptive_proj": "no_ln"}, {"use_t5_rpe": True}),
    ],
    "eva": [
        *WINDOWS,
        {"num_landmarks": 2},
        {"adaptive_proj": "no_ln"},
        {"adaptive_proj": "none"},
        {"use_t5_rpe": True},
    ],
    "fibottention": [{"variant": "robot"}, {"modified": False}, {"masked_score": "exclude"}, {"shuffle": False}],
    "hybrid": [{"window_size": 3}, {"attn_2d": False}, {"dilations": (1, 2)}, {"gate_init": 1.0}],
    "lara": [
        *({"num_landmarks": 9}, {"proposal": "no_param_pool"}, {"proposal": "adaptive_1d"}, {"pool_module": "dense"}),
        *({"mix": "mixed"}, {"mix": "vmixed"}, {"mis_type": "mis_biased"}, {"mis_type": "mis_bh"}, {"alpha": 5.0}),
        *({"sampling": "multisample"}, {"sampling": "antithetics"}, {"noise": 0.5}),
    ],
    "linformer": [{"rank": 4}, {"share": "none"}, {"share": "kv"}, {"init": "mean"}, *DRAWN],
    "local": WINDOWS,
    "nystromformer": [{"num_landmarks": 4}, {"iterations": 2}, {"conv_kernel": 3}],
    "performer": [
        *({"num_features": 5}, {"cos_weighting": True}, {"sample_scheme": "fixed"}, *DRAWN),
        *({"proj_method": name} for name in ("fourier", "relu", "relu_only", "sigmoid_only", "mlp_fourier")),
        {"proj_method": "dpfp", "num_features": 16},
    ],
    "ra": [{"num_samples": 2}, {"num_samples": 0}, {"num_samples": -1}, {"noise": 0.5}]
    + [{"evaluation": "expectation"}, {"evaluation": "sample"}],
    "scatterbrain": [*WINDOWS, {"num_features": 7}, {"sample_scheme": "fixed"}, *DRAWN],
}
IN_TRAINING = ("sampling", "noise", "sample_scheme", "num_samples", "attn_drop")  # what evaluation need not know

WRONG = {
    "bigbird": [{"window_radius": -1}, {"random_keys": -2}, {"global_tokens": 37}, {"global_tokens": -1}],
    "causal_eva": [
        *({"adaptive_proj": "default"}, {"window_size": 0}, {"chunk_size": 3}, {"chunk_size": 0}),
        *({"num_chunks": 2}, {"num_chunks": 0}, {"chunk_size": 2, "num_chunks": 2}),
    ],
    "eva": [
        *({"adaptive_proj": "qk"}, {"relative_position_bias": True, "use_t5_rpe": True}, {"num_landmarks": 0}),
        *({"num_landmarks": 5, "attn_2d": True}, {"window_size": 0}),
    ],
    "fibottention": [{"variant": "image"}, {"masked_score": "inf"}, {"backend": "fast"}],
    "hybrid": [{"window_size": 0}, {"dilations": ()}, {"dilations": (1, 2, 3, 4)}],
    "lara": [
        *({"num_landmarks": 5}, {"num_landmarks": 0}, {"proposal": "pol"}, {"mix": "both"}, {"pool_module": "wide"}),
        *({"pool_module": "dense", "proposal": "no_param_pool"}, {"mis_type": "mis"}, {"sampling": "two"}),
        *({"alpha": 2.0, "mis_type": "mis_bh"}, {"noise": -0.1}),
    ],
    "linformer": [{"rank": 0}, {"share": "all"}, {"init": "zeros"}],
    "local": [{"window_size": 0}],
    "nystromformer": [{"num_landmarks": 0}, {"iterations": 0}, {"conv_kernel": 4}],
    "performer": [
        *({"num_features": 0}, {"proj_method": "favor"}, {"sample_scheme": "default"}),
        {"sample_scheme": "learnable", "proj_method": "relu_only"},
        *({"num_features": 6, "proj_method": "dpfp"}, {"num_features": 5, "proj_method": "mlp_fourier"}),
    ],
    "ra": [
        *({"num_samples": -2}, {"evaluation": "max"}, {"evaluation": "expectation", "num_samples": 0}),
        *({"evaluation": "sample", "num_samples": -1}, {"noise": -1.0}, {"noise": 0.5, "num_samples": -1}),
    ],
    "scatterbrain": [{"window_size": 0}, {"sample_scheme": "default"}],
}
OF_ALL = [{"qkv_bias": False}, {"attn_drop": 0.5}]


def build(name, options):
    torch.manual_seed(0)
    geometry = {**GEOMETRY, "num_patches": 36, "grid": (6, 6)}
    return build_attention(name, **{**geometry, **DEFAULTS.get(name, {}), **options})


def cases(table, common=()):
    return [(name, options) for name in list_attentions() for options in [*table.get(name, []), *common]]


@pytest.mark.parametrize(("name", "change"), cases(CHANGES, OF_ALL), ids=str)
@pytest.mark.filterwarnings("ignore:Fibottention is evaluated densely")
def test_every_option_changes_the_output(name, change):
    if "attn_drop" in change and not ATTENTIONS[name].drops:
        return
    x, outs = 3 * torch.randn(1, 37, 24, generator=torch.Generator().manual_seed(1)), []
    for options in ({}, change):
        module = build(name, options).train(not set(change).isdisjoint(IN_TRAINING))
        torch.manual_seed(2)
        outs.append(module(x))
    assert (outs[0] - outs[1]).abs().max() > 1e-4


KEY_BY_KEY = {  # options with which every weight is that of one key
    "bigbird": {"window_radius": 1, "random_keys": 2},
    "causal_eva": {"window_size": 37},
    "eva": {"window_size": 6, "attn_2d": True},
    "local": {"attn_2d": True, "overlap": True},
    "softmax": {},
}


@pytest.mark.parametrize(("name", "options"), KEY_BY_KEY.items())
def test_dropout_acts_on_the_weights(name, options):
    """A weight is dropped, or it grows by as much as is lost; of the prefix token's row, too."""
    module = build(name, {**options, "attn_drop": 0.25}).double()
    x = torch.randn(4, 37, 24, dtype=torch.float64)
    plain, (q, k, _) = module.attention_map(x), module.split(x)
    units = torch.eye(37, dtype=torch.float64).expand(4, 3, -1, -1)
    torch.manual_seed(0)
    dropped = module.attend(q, k, units)
    gone = dropped == 0
    torch.testing.assert_close(dropped[~gone], plain[~gone] / 0.75)
    assert 0.22 < gone[plain > 0].double().mean() < 0.28  # of some thousand weights
    assert gone[:, :, 0][plain[:, :, 0] > 0].any()
    assert not torch.equal(module.attend(q, k, units), dropped)


@pytest.mark.parametrize(("name", "options"), cases(WRONG), ids=str)
def test_wrong_options_are_named(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(name, options)
