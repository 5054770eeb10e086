"""Every attention mechanism side by side: FLOPs, time, memory, distance to softmax attention, accuracy.

    python -m eval.attention --quick                  forward only, some minutes
    python -m eval.attention                          all sizes, forward and backward
    python -m eval.attention --train --seeds 3        also train each on the image benchmark, hours

A mechanism is a file config/attention/NAME.yaml. Writes results.json, .csv and .md, pictures and index.html.
"""

import json
import shlex
import sys
from pathlib import Path

import torch

from eval.attention.error import measure_errors, measure_maps
from eval.attention.measure import BASELINE, describe, measure, own_time, read_configs
from eval.attention.page import pages
from eval.attention.plots import plot_latency, plot_maps, plot_tradeoff, plot_training
from eval.attention.tables import COMPARED, csv_text
from eval.attention.train import FIRST_SEED, configure, train
from eval.shared.command import Parser, command
from eval.shared.machine import check_positive, choose_device, describe_machine, fix_allocation
from eval.speed.attention import DIRECTIONS
from policy.files import write_whole

PATCHES = [64, 196, 400, 784, 1568, 3136, 6272]
QUICK = [64, 196, 784, 3136]
SECONDS = {False: 60, True: 20}  # with --quick
MAP = {"layer": 1, "head": 0}  # of the shipped encoder, in the gallery


@command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    names = ("dim", "heads", "batch", "seconds", "limit", "images", "seeds", "epochs", "threads")
    check_positive(**{name: getattr(args, name) for name in names})
    for patches in args.patches or ():
        check_positive(patches=patches)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    fix_allocation()
    configs = read_configs(args.attention)
    changes = _training_changes(args, next(iter(configs)))
    settings = {
        "patches": sorted(set(args.patches or (QUICK if args.quick else PATCHES))),
        "directions": list(DIRECTIONS[:1] if args.quick else DIRECTIONS),
        "dim": args.dim,
        "heads": args.heads,
        "batch": args.batch,
        "seconds": args.seconds or SECONDS[args.quick],
        "limit": args.limit,
    }
    args.output.mkdir(parents=True, exist_ok=True)  # what is wrong with it is said before minutes of measuring, too
    mechanisms = describe(configs, patches=COMPARED[0], dim=args.dim, heads=args.heads)
    results = {
        "command": shlex.join(["python", "-m", "eval.attention", *argv]),
        "machine": describe_machine(device),
        "settings": {**settings, "images": args.images, "own_time": own_time(device)},
        "mechanisms": mechanisms,
        "rows": measure(configs, **settings, device=device),
        "errors": measure_errors(configs, images=args.images),
        "training": [],
    }
    maps = measure_maps(configs, **MAP)
    text = write(results, maps, args.output)
    if args.train:  # hours, before which the rest should be safe
        results["training"] = train(list(configs), args.output / "training", seeds=args.seeds, **changes)
        text = write(results, maps, args.output)
    print(f"{text}\nwrote {args.output}/index.html and what it shows")


def _training_changes(args, name):
    """What the options change of the training, checked with the mechanism ``name``; ValueError without --train."""
    changes = {key: getattr(args, key) for key in ("data", "preset", "epochs", "overrides")}
    if args.train:
        fixed = [change for change in args.overrides if change.split("=", 1)[0] in ("seed", "attention", "device")]
        if fixed:
            raise ValueError(f"--overrides: got {fixed[0]}, allowed: what --seeds, --attention and --device do not say")
        changes["overrides"] = [f"device={args.device}", *args.overrides]
        configure(name, FIRST_SEED, **changes)  # what is wrong is said before minutes of measuring
    elif args.seeds != 1 or any(changes.values()):
        raise ValueError("--seeds, --data, --preset, --epochs, --overrides: got one, allowed with --train alone")
    return changes


def write(results, maps, folder):
    """Write all files of ``results`` and ``maps``, as ``measure_maps`` returns them; returns results.md."""
    pictures = {
        "latency.png": plot_latency(results),
        "tradeoff.png": plot_tradeoff(results),
        "training.png": plot_training(results),
        "gallery.png": plot_maps(*maps, **MAP),
    }
    pictures = {name: png for name, png in pictures.items() if png is not None}
    html, text = pages(results, pictures)
    files = {"results.json": json.dumps(results, indent=1), "results.csv": csv_text(results), "results.md": text}
    files |= {**pictures, "index.html": html}
    for name, content in files.items():
        write_whole(folder / name, content)
    return text


def _parser():
    parser = Parser("eval.attention", __doc__)
    names = f"files of config/attention, default all; {BASELINE} is always there"
    parser.add_argument("--attention", nargs="+", default=[], metavar="NAME", help=names)
    parser.add_argument("--quick", action="store_true", help=f"forward only, N of {QUICK}, few repetitions")
    parser.add_argument(
        "--patches",
        type=int,
        nargs="+",
        metavar="N",
        help=f"default {PATCHES}; the least is never left out",
    )
    parser.add_argument("--dim", type=int, default=768, help="width of the layer, default 768")
    parser.add_argument("--heads", type=int, default=12, help="default 12")
    parser.add_argument("--batch", type=int, default=1, help="default 1")
    seconds = f"time of one N and direction, all mechanisms together, default {SECONDS[False]}, quick {SECONDS[True]}"
    parser.add_argument("--seconds", type=float, help=seconds)
    parser.add_argument("--limit", type=float, default=10, help="s, slower calls are left out; default 10")
    parser.add_argument("--images", type=int, default=8, help="pictures for the error to softmax, default 8")
    parser.add_argument("--train", action="store_true", help="train each mechanism on the image benchmark, too")
    parser.add_argument("--data", help="of the training, as of eval.classify_image; default its own")
    parser.add_argument("--preset", help="of the training, a file of config/preset; default: the one of the data")
    parser.add_argument("--seeds", type=int, default=1, help="training runs of each mechanism, default 1")
    parser.add_argument("--epochs", type=int, help="of the training, default as eval.classify_image")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="of the training configuration")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads, default as torch chooses")
    output = Path("runs") / "attention"
    parser.add_argument("--output", type=Path, default=output, help=f"folder, default {output}; training goes on there")
    return parser


if __name__ == "__main__":
    main()
