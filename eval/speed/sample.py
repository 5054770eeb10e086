"""Speed of drawing action chunks beside a plain loop over diffusers' scheduler; ``python -m eval.speed sample``."""

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from eval.shared.compose import compose
from eval.shared.machine import check_positive, compare, multiply_rate, read_bandwidth
from eval.shared.tables import show
from eval.speed.reference import plain_condition, plain_loop, plain_policy, plain_sample, sharing
from policy.build import build_model
from policy.checkpoint import load_policy
from policy.denoiser.samplers import sampling_steps

SAMPLERS = {"ddpm": 100, "ddim": 10, "dpmpp_2m": 8}  # steps of each
OURS = {"ours fp32": {}, "ours bf16": {"precision": "bf16"}}
GRAPHS = {f"{name} graph": {**options, "cuda_graph": True} for name, options in OURS.items()}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARTS = ("encoder", "loop", "whole")


def add_options(parser):
    parser.add_argument("--checkpoint", help="run folder or .safetensors file, instead of random weights")
    parser.add_argument("--task", default="pusht", help="a folder of config/, default pusht")
    parser.add_argument("--preset", default="paper", help="paper (default), small, cpu, smoke")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], metavar="B", help="rows of a call, default 1")
    samplers = [f"{name}:{steps}" for name, steps in SAMPLERS.items()]
    parser.add_argument("--samplers", nargs="+", default=samplers, metavar="NAME:STEPS", help=f"default {samplers}")


def run(args):
    """(name, title, what, settings, rows, table) of what the options ask for."""
    check_positive(seconds=args.seconds)
    for batch in args.batches:
        check_positive(batches=batch)
    samplers = dict(map(parse_sampler, args.samplers))
    if args.checkpoint is None:
        policy = random_policy(args.task, [f"preset={args.preset}", *args.overrides], args.device)
        what = f"{args.task}, preset {args.preset}, random weights"
    else:
        policy = load_policy(args.checkpoint, args.device)
        what = f"{policy.config['task']['name']}, {Path(args.checkpoint).name}"
    limits = machine_limits(args.device)
    settings = {"batches": sorted(set(args.batches)), "samplers": samplers, "seconds": args.seconds}
    rows = measure_sample(policy, **settings, device=args.device, limits=limits)
    return "sample", "Speed of sampling", what, {**settings, "limits": limits}, rows, cells(rows)


def parse_sampler(text):
    """ "ddim:10" -> ("ddim", 10)."""
    name, _, steps = text.partition(":")
    if name not in SAMPLERS or not steps.isdecimal():
        raise ValueError(f"--samplers: got {text!r}, allowed: NAME:STEPS with a name of {', '.join(SAMPLERS)}")
    return name, int(steps)


# What is compared ----------------------------------------------------------------------------------------------------


def random_policy(task, overrides, device):
    """The policy that train.py would start from, in evaluation mode, with random weights; its ``config`` is a dict."""
    config = compose(task, overrides)
    torch.manual_seed(config["seed"])
    policy = build_model(config).to(device).eval()
    policy.config = config
    return policy


def random_observation(policy, batch):
    """obs {key: (B, To, ...)} as ``policy.sample`` takes them: noise in the range of the normaliser."""
    generator = torch.Generator().manual_seed(0)
    device = next(policy.parameters()).device
    obs = {}
    for key, shape in policy.encoder.shapes.items():
        noise = torch.rand((batch, policy.obs_steps, *shape), generator=generator).to(device)
        is_image = key in policy.encoder.cameras
        obs[key] = (noise * 255).byte() if is_image else policy.normalizer.denormalize(key, noise * 2 - 1)
    return obs


def methods(policy):
    """{method: policy}, all with the same weights: plain, and ours under each of its options."""
    options = OURS | (GRAPHS if next(policy.parameters()).is_cuda else {})
    found = {"plain": plain_policy(policy)}
    for name, inference in options.items():
        found[name] = sharing(policy)
        found[name].set_inference(**inference)
    return found


def plain_parts(policy, obs):
    """{part of drawing chunks: function without arguments} of a ``plain_policy``."""
    generator, condition = torch.Generator(), plain_condition(policy, obs)
    return {
        "encoder": lambda: plain_condition(policy, obs),
        "loop": lambda: plain_loop(policy, condition, generator.manual_seed(0)),
        "whole": lambda: plain_sample(policy, obs, generator=generator.manual_seed(0)),
    }


def our_parts(policy, obs):
    """As ``plain_parts``, of the policy itself."""
    generator, device = torch.Generator(), next(policy.parameters()).device
    steps = sampling_steps(policy.sampler, policy.noise_scheduler.config, policy.num_inference_steps)
    batch, _ = policy.encoder.check(obs)

    def precision():
        return torch.autocast(device.type, torch.bfloat16, enabled=policy.precision == "bf16")

    @torch.no_grad()
    def encode():
        with precision():
            return policy.encoder({key: value.flatten(0, 1) for key, value in obs.items()}).reshape(batch, -1)

    @torch.no_grad()
    def denoise():
        shape = (batch, policy.horizon, policy.action_dim)
        drawn = policy.loop.draw(shape, steps, generator=generator.manual_seed(0), device=device)
        with precision():
            return policy.loop(policy.denoiser, condition, *drawn, steps)

    condition = encode()
    return {
        "encoder": encode,
        "loop": denoise,
        "whole": lambda: policy.sample(obs, generator=generator.manual_seed(0)),
    }


# Limits --------------------------------------------------------------------------------------------------------------


def machine_limits(device):
    """{"read": bytes a second, "fp32", "bf16": operations a second of matrix products} that ``device`` reaches."""
    return {"read": read_bandwidth(device)} | {name: multiply_rate(device, kind) for name, kind in PRECISIONS.items()}


@torch.no_grad()
def step_needs(policy, batch):
    """(weights to read, operations) of one denoising step: the U-Net without FiLM, which does not depend on it."""
    unet, parameter = policy.denoiser, next(policy.parameters())
    needless = [unet.step_embedding, *(block.film for block in unet.blocks())]
    weights = sum(p.numel() for p in unet.parameters()) - sum(p.numel() for part in needless for p in part.parameters())
    actions = parameter.new_zeros(batch, policy.horizon, policy.action_dim)
    films = [parameter.new_zeros(batch, block.film[1].out_features) for block in unet.blocks()]
    with FlopCounterMode(display=False) as counter:
        unet.denoise(actions, films)
    return weights, counter.get_total_flops()


def limit_shares(needs, method, milliseconds, steps, limits):
    """How much of the machine's reading and multiplying a loop of ``steps`` in as many ``milliseconds`` is."""
    precision = "bf16" if "bf16" in method else "fp32"
    weights, operations = needs
    size = PRECISIONS[precision].itemsize
    rate = steps / milliseconds * 1e3
    return {
        "share_of_reading": weights * size * rate / limits["read"],
        "share_of_multiplying": operations * rate / limits[precision],
    }


# Measurement ---------------------------------------------------------------------------------------------------------


def measure_sample(policy, *, batches, samplers, seconds, device, limits):
    """A dictionary per batch size, sampler, part and method, as in sample.json; samplers: {name: steps}.

    "deviation" is the largest difference of the chunk from the plain one, for the same noise, in normalised units.
    """
    policies, rows = methods(policy), []
    with tqdm(total=len(batches) * (1 + 2 * len(samplers)), leave=False, dynamic_ncols=True) as bar:
        for batch in batches:
            obs, needs = random_observation(policy, batch), step_needs(policy, batch)
            encoded = False  # the samplers share it
            for sampler, steps in samplers.items():
                for one in policies.values():
                    one.set_sampler(sampler, steps)
                parts = {m: (plain_parts if m == "plain" else our_parts)(one, obs) for m, one in policies.items()}
                chunks = {m: policy.normalizer.normalize("action", calls["whole"]()) for m, calls in parts.items()}
                for part in PARTS[encoded:]:
                    size = {"batch": batch, "part": part}
                    size |= (
                        {"sampler": None, "steps": None} if part == "encoder" else {"sampler": sampler, "steps": steps}
                    )
                    bar.set_description(" ".join(str(value) for value in size.values() if value))
                    calls = {m: functions[part] for m, functions in parts.items()}
                    for row in compare(calls, {}, baseline="plain", seconds=seconds, device=device):
                        row = {**size, **row}
                        if part == "whole":
                            row["deviation"] = (chunks[row["method"]] - chunks["plain"]).abs().max().item()
                        if part == "loop" and row["ms"]:
                            row |= limit_shares(needs, row["method"], row["ms"], steps, limits)
                        rows.append(row)
                    bar.update()
                encoded = True
    return rows


def cells(rows):
    """Cells of the Markdown table, a row a measurement."""
    lines = [["batch", "what", "method", "ms", "times faster", "MB", "of read rate", "of GEMM rate", "deviation"]]
    for row in rows:
        what = row["part"] if row["sampler"] is None else f"{row['part']}, {row['sampler']} {row['steps']}"
        shares = [share_cell(row.get(key)) for key in ("share_of_reading", "share_of_multiplying")]
        deviation = "" if "deviation" not in row else f"{row['deviation']:.1g}"
        lines.append([str(row["batch"]), what, row["method"], *time_cells(row), *shares, deviation])
    return lines


def time_cells(row):
    """[ms, times faster, MB] of a row of ``compare``."""
    return [show(row[key], form) for key, form in (("ms", ",.1f"), ("ratio", ",.2f"), ("memory_mb", ",.0f"))]


def share_cell(share):
    return "" if share is None else f"{share:.0%}"
