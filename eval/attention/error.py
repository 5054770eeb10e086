"""How far every mechanism is from softmax attention on queries, keys and values of a trained encoder, and its maps."""

import copy
import statistics

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from envs import make_env
from eval.attention.measure import build, own_parameters
from eval.attention_map import attention_inputs, load_vit
from eval.shared.compose import ROOT
from policy.build import build_model
from policy.checkpoint import load_encoder_weights

ENCODER = ROOT / "pretrained" / "pusht_encoder.safetensors"
SIZES = (96, 224, 448)  # px; the encoder's own is 96
MAP_SIZE = 224  # px, whose patterns are neither coarse nor finer than a picture's pixels
FIRST_SEED = 100_003  # Push-T: the block is off its target there
SEEDS = range(5)


# Activations ---------------------------------------------------------------------------------------------------------


def encoder_at(image_size):
    """The shipped encoder for pictures of ``image_size`` px: its position codes are interpolated."""
    encoder, camera = load_vit(ENCODER, None)
    config = copy.deepcopy(encoder.config)
    config["task"]["shape_meta"]["obs"][camera]["shape"] = [3, image_size, image_size]
    larger = build_model(config).encoder.encoders[camera]
    load_encoder_weights(larger, encoder.state_dict(), ENCODER.name)
    return larger.eval()


def scenes(image_size, count):
    """Renderings of ``count`` random scenes of Push-T, uint8 (count, 3, s, s)."""
    env = make_env("pusht", image_size=image_size)
    pictures = []
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        env.reset(seed)
        pictures.append(np.ascontiguousarray(env.observe()["image"]))
    return torch.from_numpy(np.stack(pictures))


def geometry_of(encoder, layer):
    """The geometry of a layer of ``encoder``, for ``build``."""
    return {
        "dim": encoder.vit.embed_dim,
        "num_heads": encoder.vit.blocks[layer].attn.num_heads,
        "num_patches": encoder.grid[0] * encoder.grid[1],
        "grid": encoder.grid,
        "layer": layer,
        "depth": len(encoder.vit.blocks),
    }


# Errors --------------------------------------------------------------------------------------------------------------


def relative_error(out, expected):
    """||out - expected|| / ||expected||, Frobenius norms."""
    return ((out - expected).norm() / expected.norm()).item()


def measure_errors(configs, *, images):
    """A row for each picture size and mechanism: relative error of ``attend`` on so many pictures, mean over layers.

    Of what is random or trained the start is taken, for each of SEEDS; "std" is the deviation among these. "layers" has
    the errors layer by layer, "trainable" says whether there are parameters that training would fit.
    """
    rows = []
    with tqdm(total=len(SIZES) * len(configs), desc="errors", leave=False, dynamic_ncols=True) as bar:
        for size in SIZES:
            encoder = encoder_at(size)
            inputs = attention_inputs(encoder, scenes(size, images).float() / 127.5 - 1)
            for name, options in configs.items():
                module = build(options, **geometry_of(encoder, 0))
                errors = _seed_errors(options, encoder, inputs)
                means = [statistics.mean(layers) for layers in errors]
                rows.append(
                    {
                        "mechanism": name,
                        "image_size": size,
                        "patches": encoder.grid[0] * encoder.grid[1],
                        "error": statistics.mean(means),
                        "std": statistics.stdev(means),
                        "layers": [statistics.mean(layer) for layer in zip(*errors, strict=True)],
                        "causal": module.always_causal,
                        "trainable": bool(own_parameters(module)),
                    }
                )
                bar.update()
    return rows


def _seed_errors(options, encoder, inputs):
    """Errors of each layer for each of SEEDS, or for two of them that agree, where nothing is random."""
    errors = []
    for seed in SEEDS:
        errors.append(_layer_errors(options, encoder, inputs, seed))
        if len(errors) == 2 and errors[0] == errors[1]:
            break
    return errors


@torch.no_grad()
def _layer_errors(options, encoder, inputs, seed):
    """Error of one mechanism in each layer of ``encoder``, whose attention gets ``inputs``."""
    errors = []
    for layer, x in enumerate(inputs):
        q, k, v = encoder.vit.blocks[layer].attn.split(x)
        module = build(options, seed=seed, **geometry_of(encoder, layer))
        # What never looks ahead is measured against causal softmax attention.
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=module.always_causal)
        errors.append(relative_error(module.attend(q, k, v), expected))
    return errors


# Maps ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_maps(configs, *, layer, head):
    """(picture (s, s, 3) uint8, grid of patches, {name: weights (P+N, P+N) of one head, or why there are none}).

    All mechanisms have the queries and keys of the shipped encoder's ``layer`` and look at the same picture.
    """
    encoder = encoder_at(MAP_SIZE)
    scene = scenes(MAP_SIZE, 1)
    x = attention_inputs(encoder, scene.float() / 127.5 - 1)[layer]
    shared = encoder.vit.blocks[layer].attn.state_dict()
    maps = {}
    for name, options in configs.items():
        module = build(options, **geometry_of(encoder, layer))
        module.load_state_dict(shared, strict=False)
        try:
            maps[name] = module.attention_map(x)[0, head]
        except ValueError as error:
            maps[name] = str(error)
    return scene[0].permute(1, 2, 0).numpy(), encoder.grid, maps
