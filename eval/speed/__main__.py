"""How fast the parts of the toolkit are, each beside what a user would otherwise run, as ratios.

    python -m eval.speed attention
    python -m eval.speed encoder
    python -m eval.speed rollout --checkpoint RUN_OR_FILE
    python -m eval.speed sample                          (or --checkpoint RUN_OR_FILE)
    python -m eval.speed runtimes                        (minutes of compiling)
    python -m eval.speed train
    python -m eval.speed load --data human
    python -m eval.speed decode                          pictures and videos of the classification benchmarks

What is compared is measured in the same run, in turns: two runs on one machine can differ by more than two methods.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from eval.rollout.loop import loop_options
from eval.shared.command import Parser, command
from eval.shared.machine import (
    check_choices,
    check_positive,
    choose_device,
    copy_bandwidth,
    describe_machine,
    fix_allocation,
)
from eval.shared.pages import markdown_page
from eval.shared.run_config import add_allow_import, env_of
from eval.shared.tables import markdown_table
from eval.speed import decode as decode_speed
from eval.speed import load as load_speed
from eval.speed import runtimes as runtimes_speed
from eval.speed import sample as sample_speed
from eval.speed import train as train_speed
from eval.speed.attention import markdown, measure_attention, plot
from eval.speed.encoder import cells, measure_encoder
from eval.speed.rollout import cells as rollout_cells
from eval.speed.rollout import measure_rollout
from policy.attention.fibottention import BACKENDS, VARIANTS
from policy.checkpoint import load_policy

PLAIN = ("sample", "train", "load")  # beside the plain way of eval/speed/reference.py
ON_CPU = ("runtimes", "decode")
WITH_OPTIONS = {
    "sample": (sample_speed, "drawing action chunks, beside a plain loop over diffusers' scheduler"),
    "runtimes": (runtimes_speed, "a policy on a CPU, beside torch, torch.compile and onnxruntime"),
    "train": (train_speed, "a training step, beside the plain way with diffusers and timm"),
    "load": (load_speed, "loading demonstrations, beside a DataLoader"),
    "decode": (decode_speed, "decoding and augmentation by the number of processes"),
}
DTYPES = ("float32", "bfloat16", "float16")
PATCHES = [100, 196, 576, 784, 1568, 3136, 6272]
TOKENS = {"cpu": 1600, "cuda": 25_088}  # patch tokens of a batch


def attention(args):
    """Measure Fibottention and its alternatives; writes attention.json, attention.md and attention.png."""
    check_choices(backend=(args.backend, BACKENDS), dtype=(args.dtype, DTYPES), variant=(args.variant, VARIANTS))
    check_positive(heads=args.heads, head_dim=args.head_dim, tokens=args.tokens, seconds=args.seconds)
    for patches in args.patches:
        check_positive(patches=patches)
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
    check_choices(dtype=(args.dtype, DTYPES), variant=(args.variant, VARIANTS))
    check_positive(tokens=args.tokens, seconds=args.seconds, patch_size=args.patch_size)
    for image in args.images:
        if image < args.patch_size:
            raise ValueError(f"--images: got {image}, allowed: the patch size {args.patch_size} or more")
    settings = {key: getattr(args, key) for key in ("images", "patch_size", "arch", "variant", "seconds")}
    settings["tokens"] = args.tokens or TOKENS[args.device]
    rows = measure_encoder(**settings, device=args.device, dtype=getattr(torch, args.dtype))
    what = f"{args.dtype}. {args.arch}, patch {args.patch_size}, all parameters trained"
    _write(args, "encoder", "Speed of a ViT encoder", what, {**settings, "dtype": args.dtype}, rows, cells(rows))


def rollouts(args):
    """Measure the rollouts of a policy; writes rollout.json and rollout.md."""
    policy = load_policy(args.checkpoint, args.device)
    loop = loop_options(policy, num_envs=args.num_envs, workers=args.workers, batch=None)
    settings = {**loop, "episodes": args.episodes, "seed": args.seed}
    env = env_of(policy.config, allow_import=args.allow_import)
    rows = measure_rollout(policy, env, **settings)
    what = f"{policy.config['task']['name']}, the same {args.episodes} seeds twice"
    _write(args, "rollout", "Speed of rollouts", what, settings, rows, rollout_cells(rows))


def _write(args, name, title, what, settings, rows, table):
    """NAME.json with everything and NAME.md with the ``table``, which is printed too."""
    machine = describe_machine(args.device)
    results = {"command": args.command, "machine": machine, "settings": settings, "rows": rows}
    where = f"{machine['name']}, {machine['threads']} of {machine['cores']} cores, torch {machine['torch']}"
    where = f"{where}, commit {machine['commit']}, {what}."
    text = markdown_page(title, [], intro=[where], command=args.command) + "\n".join(["", *markdown_table(table), ""])
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{name}.json").write_text(json.dumps(results, indent=1))
    (args.output / f"{name}.md").write_text(text)
    print(f"{text}\nwrote {args.output}/{name}.json and {name}.md")


@command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser("eval.speed", __doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    common.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)}; default float32")
    common.add_argument("--seconds", type=float, default=3, help="time of one comparison, roughly; default 3")
    common.add_argument("--variant", default="paper", help=f"{', '.join(VARIANTS)}; default paper")
    tokens = "patch tokens a batch, default {cpu:,} (cpu), {cuda:,} (cuda)".format(**TOKENS)
    common.add_argument("--tokens", type=int, help=tokens)
    common.add_argument("--threads", type=int, help="CPU threads, default as torch chooses")
    parts = {"title": "what is measured", "metavar": "WHAT", "required": True}
    commands = parser.add_subparsers(**parts, parser_class=argparse.ArgumentParser)

    def part(name, title, **options):
        return commands.add_parser(name, help=title, description=title, **options)

    sub = part("attention", "Fibottention beside dense attention", parents=[common])
    sub.set_defaults(run=attention)
    sub.add_argument("--backend", default="auto", help=f"{', '.join(BACKENDS)}; default auto")
    sub.add_argument("--patches", type=int, nargs="+", default=PATCHES, metavar="N", help=f"default {PATCHES}")
    sub.add_argument("--heads", type=int, default=12, help="default 12")
    sub.add_argument("--head-dim", type=int, default=64, help="width of a head, default 64")
    check = "compare results with a float64 formula, up to 1568 patches; default yes"
    sub.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help=check)
    sub.add_argument("--output", type=Path, default=Path("speed/attention"), help="folder, default speed/attention")

    sub = part("encoder", "a whole ViT beside timm's", parents=[common])
    sub.set_defaults(run=encoder)
    images = [84, 448]  # the crop of Push-T; 56 x 56 patches
    sub.add_argument("--images", type=int, nargs="+", default=images, metavar="PX", help=f"sizes, default {images}")
    sub.add_argument("--arch", default="vit_base_patch8_224", help="a plain timm ViT, default vit_base_patch8_224")
    sub.add_argument("--patch-size", type=int, default=8, help="px, default 8")
    sub.add_argument("--output", type=Path, default=Path("speed/encoder"), help="folder, default speed/encoder")

    sub = part("rollout", "rollouts side by side, beside one that draws at every step")
    sub.set_defaults(run=rollouts)
    sub.add_argument("--checkpoint", required=True, help="run folder or .safetensors file of a policy")
    sub.add_argument("--episodes", type=int, default=50, help="default 50")
    sub.add_argument("--seed", type=int, default=100_000, help="first of consecutive test seeds, default 100000")
    sub.add_argument("--num-envs", type=int, help="environments at a time, default as in training")
    sub.add_argument("--workers", type=int, help="processes that hold them, default as in training")
    sub.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    sub.add_argument("--threads", type=int, help="CPU threads, default as torch chooses")
    sub.add_argument("--output", type=Path, default=Path("speed/rollout"), help="folder, default speed/rollout")
    add_allow_import(sub)

    for name, (module, title) in WITH_OPTIONS.items():
        sub = part(name, title)
        sub.set_defaults(run=lambda args, module=module: _write(args, *module.run(args)))
        module.add_options(sub)
        if name in PLAIN:
            sub.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of the configuration")
        sub.add_argument("--seconds", type=float, default=10, help="time of one comparison, roughly; default 10")
        device = "cpu" if name in ON_CPU else "auto"
        sub.add_argument("--device", default=device, help=f"{device} (default), cpu or cuda")
        sub.add_argument("--threads", type=int, help="CPU threads, default as torch chooses")
        sub.add_argument("--output", type=Path, default=Path("speed") / name, help=f"folder, default speed/{name}")

    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "-m", "eval.speed", *argv])
    args.device = choose_device(args.device)
    check_positive(threads=args.threads)
    if args.threads:
        torch.set_num_threads(args.threads)
    fix_allocation()
    args.run(args)


if __name__ == "__main__":
    main()
