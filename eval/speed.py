"""How fast the parts of the toolkit are, each beside what a user would otherwise run, as ratios.

    python -m eval.speed attention
    python -m eval.speed encoder

What is compared is measured in the same run, in turns: two runs on one machine can differ by more than two methods.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from eval.attention_speed import markdown, markdown_table, measure_attention, plot
from eval.command import command
from eval.encoder_speed import cells, measure_encoder
from eval.machine import choose_device, copy_bandwidth, describe_machine, fix_allocation
from policy.attention.fibottention import BACKENDS, VARIANTS

DTYPES = ("float32", "bfloat16", "float16")
PATCHES = [100, 196, 576, 784, 1568, 3136, 6272]
TOKENS = {"cpu": 1600, "cuda": 25_088}  # patch tokens of a batch


def attention(args):
    """Measure Fibottention and its alternatives; writes attention.json, attention.md and attention.png."""
    _check_choices(backend=(args.backend, BACKENDS), dtype=(args.dtype, DTYPES), variant=(args.variant, VARIANTS))
    _check_positive(heads=args.heads, head_dim=args.head_dim, tokens=args.tokens, seconds=args.seconds)
    for patches in args.patches:
        _check_positive(patches=patches)
    tokens = args.tokens or TOKENS[args.device]
    bandwidth = copy_bandwidth(args.device)
    patches = sorted(set(args.patches))
    rows = measure_attention(
        patches=patches,
        tokens=tokens,
        heads=args.heads,
        head_dim=args.head_dim,
        variant=args.variant,
        backend=args.backend,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        seconds=args.seconds,
        bandwidth=bandwidth,
        check=args.check,
    )
    settings = {key: getattr(args, key) for key in ("backend", "dtype", "variant", "heads", "head_dim", "seconds")}
    results = {
        "command": args.command,
        "machine": describe_machine(args.device),
        "settings": {**settings, "tokens": tokens, "patches": patches},
        "copy_gb_per_s": bandwidth / 1e9,
        "rows": rows,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "attention.json").write_text(json.dumps(results, indent=1))
    (args.output / "attention.md").write_text(markdown(results))
    plot(results, args.output / "attention.png")
    print(markdown(results))
    print(f"wrote {args.output}/attention.json, attention.md and attention.png")


def encoder(args):
    """Measure whole ViTs; writes encoder.json and encoder.md."""
    _check_choices(dtype=(args.dtype, DTYPES), variant=(args.variant, VARIANTS))
    _check_positive(tokens=args.tokens, seconds=args.seconds, patch_size=args.patch_size)
    for image in args.images:
        if image < args.patch_size:
            raise ValueError(f"--images: got {image}, allowed: the patch size {args.patch_size} or more")
    settings = {key: getattr(args, key) for key in ("images", "patch_size", "arch", "variant", "seconds")}
    settings["tokens"] = args.tokens or TOKENS[args.device]
    rows = measure_encoder(**settings, device=args.device, dtype=getattr(torch, args.dtype))
    machine = describe_machine(args.device)
    results = {"command": args.command, "machine": machine, "settings": {**settings, "dtype": args.dtype}, "rows": rows}
    where = (
        f"{machine['name']}, {machine['threads']} of {machine['cores']} cores, torch {machine['torch']}, {args.dtype}"
    )
    lines = [
        "# Speed of a ViT encoder",
        "",
        f"{where}, commit {machine['commit']}. {args.arch}, patch {args.patch_size}, all parameters trained.",
        "",
        f"`{args.command}`",
        "",
        *markdown_table(cells(rows)),
        "",
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "encoder.json").write_text(json.dumps(results, indent=1))
    (args.output / "encoder.md").write_text("\n".join(lines))
    print("\n".join(lines))
    print(f"wrote {args.output}/encoder.json and encoder.md")


def _check_choices(**options):
    for name, (value, allowed) in options.items():
        if value not in allowed:
            raise ValueError(f"--{name.replace('_', '-')}: got {value!r}, allowed: {', '.join(allowed)}")


def _check_positive(**options):
    for name, value in options.items():
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')}: got {value}, allowed: > 0")


@command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m eval.speed", description=__doc__.split("\n")[0])
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    common.add_argument("--dtype", default="float32", help=", ".join(DTYPES))
    common.add_argument("--seconds", type=float, default=3, help="time of one comparison, roughly; default 3")
    common.add_argument("--variant", default="paper", help=", ".join(VARIANTS))
    tokens = "patch tokens a batch, default {cpu:,} (cpu), {cuda:,} (cuda)".format(**TOKENS)
    common.add_argument("--tokens", type=int, help=tokens)
    common.add_argument("--threads", type=int, help="CPU threads, default as torch chooses")
    commands = parser.add_subparsers(title="what is measured", metavar="WHAT", required=True)

    sub = commands.add_parser("attention", parents=[common], help="Fibottention beside dense attention")
    sub.set_defaults(run=attention)
    sub.add_argument("--backend", default="auto", help=", ".join(BACKENDS))
    sub.add_argument("--patches", type=int, nargs="+", default=PATCHES, metavar="N", help=f"default {PATCHES}")
    sub.add_argument("--heads", type=int, default=12, help="default 12")
    sub.add_argument("--head-dim", type=int, default=64, help="width of a head, default 64")
    check = "compare results with a float64 formula, up to 1568 patches"
    sub.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help=check)
    sub.add_argument("--output", type=Path, default=Path("speed/attention"), help="folder, default speed/attention")

    sub = commands.add_parser("encoder", parents=[common], help="a whole ViT beside timm's")
    sub.set_defaults(run=encoder)
    images = [84, 448]  # the crop of Push-T; 56 x 56 patches
    sub.add_argument("--images", type=int, nargs="+", default=images, metavar="PX", help=f"sizes, default {images}")
    sub.add_argument("--arch", default="vit_base_patch8_224", help="a plain timm ViT, default vit_base_patch8_224")
    sub.add_argument("--patch-size", type=int, default=8, help="px, default 8")
    sub.add_argument("--output", type=Path, default=Path("speed/encoder"), help="folder, default speed/encoder")

    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "-m", "eval.speed", *argv])
    args.device = choose_device(args.device)
    _check_positive(threads=args.threads)
    if args.threads:
        torch.set_num_threads(args.threads)
    fix_allocation()
    args.run(args)


if __name__ == "__main__":
    main()
