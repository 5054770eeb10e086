"""Pictures of an attention: its pattern, what its heads cover together, and what a trained encoder looks at.

    python -m eval.attention_map --checkpoint RUN_OR_FILE --output DIR

Writes pattern.png, coverage.png and attention.png. Attention weights are recomputed from the queries and keys of each
layer, under the rule of its own attention.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from envs import make_env
from eval.attention.pictures import plot_attention, plot_coverage, plot_pattern
from eval.shared.command import Parser, command
from eval.shared.run_config import add_allow_import, env_of
from policy import load_encoder
from policy.attention import fibottention_mask, shuffle_heads, wythoff_offsets
from policy.attention.fibottention import VARIANTS, FibottentionAttention
from policy.encoder.observation import crop_images

SHIPPED = Path(__file__).parent.parent / "pretrained" / "pusht_policy.safetensors"
GEOMETRY = {"patches": 196, "heads": 12, "depth": 4, "variant": "paper", "modified": True}  # without a checkpoint
MAX_PATCHES = 1600  # beyond, the lines of a pattern are thinner than a picture's pixels


# Weights -------------------------------------------------------------------------------------------------------------


def pattern_of(module, tokens):
    """Pairs that an attention module looks at, bool (H, P+N, P+N); ``tokens`` = P+N."""
    if isinstance(module, FibottentionAttention):
        return module.mask  # by the published rule also pairs outside of the pattern weigh something
    with torch.no_grad():
        return module.attention_map(torch.zeros(1, tokens, module.qkv.in_features))[0] != 0


@torch.no_grad()
def attention_inputs(encoder, images):
    """What enters the attention of each layer, [(B, P+N, C)], for images (B, 3, h, w) in [-1, 1]."""
    inputs = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
        for block in encoder.vit.blocks
    ]
    try:
        encoder(images)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


@torch.no_grad()
def encoder_weights(encoder, image):
    """Attention weights of all layers, [(H, P+N, P+N)], for one image (3, h, w) in [-1, 1]."""
    inputs = attention_inputs(encoder, image[None])
    return [block.attn.attention_map(x)[0].float() for block, x in zip(encoder.vit.blocks, inputs, strict=True)]


# Command -------------------------------------------------------------------------------------------------------------


def observation(config, camera, *, image=None, seed, allow_import=False):
    """An observation of ``camera`` for the task of ``config``, uint8 (3, h, w).

    The picture file ``image``, resized, or without one what the simulator shows after ``reset(seed)``.
    """
    shape = tuple(config["task"]["shape_meta"]["obs"][camera]["shape"])
    if image is None:
        env = make_env(**env_of(config, allow_import=allow_import))
        env.reset(seed)
        return torch.from_numpy(np.ascontiguousarray(env.observe()[camera]))
    if not Path(image).is_file():
        raise FileNotFoundError(f"--image: got {image}, which is not a file")
    with Image.open(image) as file:
        picture = file.convert("RGB").resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture).transpose(2, 0, 1).copy())


def load_vit(checkpoint, camera):
    """(ViT encoder of a checkpoint, the name of its camera); raises ValueError for another kind of encoder."""
    encoder = load_encoder(checkpoint, camera=camera)
    kind = encoder.config["encoder"]["name"]
    if not hasattr(encoder, "vit"):
        raise ValueError(f"encoder: got {kind!r}, whose attention is not shown; allowed: vit")
    observed = encoder.config["task"]["shape_meta"]["obs"]
    cameras = [key for key, spec in observed.items() if spec["type"] == "rgb"]
    return encoder, camera or cameras[0]


def parse_query(text, grid):
    """(row, column) of the patch that ``text`` "row,column" means; without a text the most central one."""
    if text is None:
        return grid[0] // 2, grid[1] // 2
    parts = text.split(",")
    if len(parts) == 2 and all(part.strip().isdecimal() for part in parts):
        row, column = map(int, parts)
        if row < grid[0] and column < grid[1]:
            return row, column
    raise ValueError(f"--query: got {text!r}, allowed: ROW,COLUMN with 0 <= ROW < {grid[0]}, 0 <= COLUMN < {grid[1]}")


def geometry_patterns(*, patches, heads, depth, variant, modified):
    """Patterns of the layers of a ViT that exists on paper only, one class token."""
    if not 1 <= patches <= MAX_PATCHES:
        raise ValueError(f"--patches: got {patches}, allowed: 1 to {MAX_PATCHES}")
    if depth < 1:
        raise ValueError(f"--depth: got {depth}, allowed: >= 1")
    offsets = wythoff_offsets(patches, heads, modified=modified, variant=variant)
    return [fibottention_mask(shuffle_heads(offsets, layer), patches) for layer in range(depth)]


def _patch_side(encoder, image_size):
    """px; a convolution stem does not name it, and leaves no remainder."""
    named = getattr(encoder.vit.patch_embed, "patch_size", None)
    return named[0] if named else image_size // encoder.grid[0]


def _describe(attention):
    return ", ".join([attention["name"], *(f"{key} {value}" for key, value in attention.items() if key != "name")])


@command
def main(argv=None):
    parser = Parser("eval.attention_map", __doc__)
    shipped = f"{SHIPPED.parent.name}/{SHIPPED.name}"
    parser.add_argument(
        "--checkpoint", help=f"run folder or .safetensors file (default: {shipped}, and the geometry of --patches etc.)"
    )
    parser.add_argument("--camera", help="which one, for policies with several")
    parser.add_argument("--image", type=Path, help="picture to look at, default: the simulator after reset(--seed)")
    parser.add_argument("--seed", type=int, default=100_003, help="of the simulator")  # the block is off its target
    parser.add_argument(
        "--query", metavar="ROW,COLUMN", help="patch whose attention is shown, default: the central one"
    )
    parser.add_argument("--patches", type=int, metavar="N", help=f"default {GEOMETRY['patches']}")
    parser.add_argument("--heads", type=int, metavar="H", help=f"default {GEOMETRY['heads']}")
    parser.add_argument("--depth", type=int, metavar="L", help=f"layers, default {GEOMETRY['depth']}")
    parser.add_argument("--variant", help=f"{', '.join(VARIANTS)}; default {GEOMETRY['variant']}")
    parser.add_argument(
        "--modified", action=argparse.BooleanOptionalAction, help="two more terms in front, default yes"
    )
    parser.add_argument("--output", type=Path, default=Path("attention_map"), help="folder of the pictures")
    add_allow_import(parser)
    args = parser.parse_args(argv)

    geometry = {key: getattr(args, key) for key in GEOMETRY if getattr(args, key) is not None}
    if args.checkpoint and geometry:
        given = ", ".join(f"--{key}" for key in geometry)
        raise ValueError(f"{given}: got one with --checkpoint, allowed: without, as a checkpoint has its own geometry")
    encoder, camera = load_vit(args.checkpoint or SHIPPED, args.camera)
    grid, prefix_tokens = encoder.grid, encoder.prefix_tokens
    query = parse_query(args.query, grid)
    own = [pattern_of(block.attn, prefix_tokens + grid[0] * grid[1]) for block in encoder.vit.blocks]
    patterns = own if args.checkpoint else geometry_patterns(**{**GEOMETRY, **geometry})
    raw = observation(encoder.config, camera, image=args.image, seed=args.seed, allow_import=args.allow_import)
    if (crop := encoder.config["crop"]) is not None:
        raw = crop_images(raw[None], crop)[0]  # the centre, as in evaluation
    weights = encoder_weights(encoder, raw.float() / 127.5 - 1.0)

    args.output.mkdir(parents=True, exist_ok=True)
    plot_pattern(patterns, prefix_tokens if args.checkpoint else 1, args.output / "pattern.png")
    plot_coverage(patterns, prefix_tokens if args.checkpoint else 1, args.output / "coverage.png")
    plot_attention(
        weights,
        raw.numpy().transpose(1, 2, 0),
        grid=grid,
        patch=_patch_side(encoder, raw.shape[-1]),
        prefix_tokens=prefix_tokens,
        query=query,
        title=f"Attention of {Path(args.checkpoint or SHIPPED).name}: {_describe(encoder.config['attention'])}",
        path=args.output / "attention.png",
    )
    print(f"wrote {args.output}/pattern.png, coverage.png and attention.png")


if __name__ == "__main__":
    main()
