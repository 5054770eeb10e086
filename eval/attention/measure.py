"""Time and memory of every attention mechanism, in turns in one process; ``python -m eval.attention``."""

import itertools
import math
import statistics
import time

import hydra
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from eval.attention.flops import attention_flops
from eval.shared.machine import free_memory, interleaved_times, peak_memory, timed
from eval.shared.overrides import CONFIG
from policy.attention import build_attention
from policy.registry import lookup

BASELINE = "softmax"
PREFIX = 1  # a class token, as encoders here have one
OF_ALL = ("qkv", "proj")  # layers that every mechanism has


# Mechanisms ----------------------------------------------------------------------------------------------------------


def read_configs(names=()):
    """{name: its options} of config/attention/NAME.yaml, all or those of ``names`` and the baseline.

    Raises ValueError for an unknown name.
    """
    known = sorted(
        (path.stem for path in (CONFIG / "attention").glob("*.yaml")), key=lambda name: (name != BASELINE, name)
    )
    for name in names:
        lookup("--attention", name, dict.fromkeys(known))
    chosen = [name for name in known if not names or name in names or name == BASELINE]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONFIG)):
        configs = {name: hydra.compose(overrides=[f"+attention={name}"]).attention for name in chosen}
    return {name: OmegaConf.to_container(config, resolve=True) for name, config in configs.items()}


def build(options, *, seed=0, **geometry):
    """The module that ``options`` describe, in evaluation; ``seed`` decides what is random at its start."""
    options = {**options, "seed": seed} if "seed" in options else dict(options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_attention(options.pop("name"), prefix_tokens=PREFIX, **geometry, **options).eval()


def layer_geometry(patches, *, dim, heads):
    """Geometry of one layer whose grid is as square as can be."""
    rows = next(size for size in range(math.isqrt(patches), 0, -1) if patches % size == 0)
    grid = (rows, patches // rows)
    return {"dim": dim, "num_heads": heads, "num_patches": patches, "grid": grid, "layer": 0, "depth": 1}


def own_parameters(module):
    """Parameters that a mechanism has beside the layers of all."""
    return [parameter for name, parameter in module.named_parameters() if name.split(".")[0] not in OF_ALL]


def describe(configs, *, patches, dim, heads):
    """{name: its options, class and number of parameters in a layer of ``patches``}."""
    described = {}
    for name, options in configs.items():
        module = build(options, **layer_geometry(patches, dim=dim, heads=heads))
        described[name] = {
            "options": options,
            "class": type(module).__name__,
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "own_parameters": sum(parameter.numel() for parameter in own_parameters(module)),
        }
    return described


# Measurement ---------------------------------------------------------------------------------------------------------


def measure(configs, *, patches, directions, dim, heads, batch, seconds, limit, device):
    """A row for each number of patches, direction and mechanism, as in results.json.

    seconds: time of one number of patches and direction, all mechanisms together, roughly. limit: a call that would
    take longer is left out, and one that would not fit into memory; both are foretold from the size before.
    """
    rows, last = [], {}
    sizes = list(itertools.product(sorted(set(patches)), directions))
    for count, direction in tqdm(sizes, desc="time and memory", unit="size", leave=False, dynamic_ncols=True):
        inputs = layer_inputs(batch, PREFIX + count, dim, heads, device)
        calls, skipped, flops = {}, {}, {}
        for name, options in configs.items():
            module = build(options, **layer_geometry(count, dim=dim, heads=heads))
            flops[name] = batch * attention_flops(module, PREFIX + count)
            reason = refusal(last.get((name, direction)), flops[name], limit=limit, device=device)
            if reason:
                skipped[name] = reason
            else:
                calls[name] = make_call(module.to(device), direction, inputs)
        numbers = _run(calls, skipped, seconds, device)
        base = numbers[BASELINE]["ms"]
        for name in configs:
            row = {"mechanism": name, "direction": direction, "patches": count, "batch": batch, "flops": flops[name]}
            row |= numbers[name]
            row["ratio"] = base / row["ms"] if base and row["ms"] else None  # times faster
            rows.append(row)
            last[name, direction] = row
    return rows


def layer_inputs(batch, tokens, dim, heads, device):
    """q, k, v (B, H, T, D) and a gradient of the output, lying in memory as qkv and proj leave and take them."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(batch, tokens, 3, heads, dim // heads, generator=generator).to(device)
    d_out = torch.randn(batch, tokens, heads, dim // heads, generator=generator).to(device)
    return *packed.permute(2, 0, 3, 1, 4).unbind(0), d_out.transpose(1, 2)


def make_call(module, direction, inputs):
    """A function that attends once; forward+backward is in training mode, with the gradients of own parameters."""
    q, k, v, d_out = inputs
    module.train(direction != "forward")
    if direction == "forward":

        @torch.inference_mode()
        def call():
            return module.attend(q, k, v)

        return call
    wanted = [x.detach().requires_grad_() for x in (q, k, v)]
    own = own_parameters(module)

    def call():
        return torch.autograd.grad(module.attend(*wanted), [*wanted, *own], d_out, allow_unused=True)

    return call


def refusal(last, flops, *, limit, device):
    """Why a call of so many ``flops`` is left out, or None; last: the mechanism's row of the size before, if any.

    Time and memory are taken to grow as the FLOPs do.
    """
    if last is None:
        return None
    if last["skipped"]:
        return last["skipped"]
    factor = flops / last["flops"]
    if last["ms"] * factor > 1e3 * limit:
        return f"skipped (> {limit:g} s)"
    free = free_memory(device)
    if free and last["memory_mb"] and 1e6 * last["memory_mb"] * factor > 0.8 * free:
        return f"skipped (> {0.8 * free / 1e9:.1f} GB)"
    return None


def own_time(device):
    """Whether time is that of this process alone, which other programs do not lengthen: one thread on a CPU."""
    return device == "cpu" and torch.get_num_threads() == 1


def call_times(calls, *, seconds, device):
    """{name: [seconds of each call]} of ``calls`` {name: function}, in turns; about ``seconds`` in all."""
    clock = processor_time if own_time(device) else timed
    return interleaved_times(calls, seconds=seconds, device=device, clock=clock)


def processor_time(call, _device):
    """Seconds of processor time of one ``call``."""
    start = time.process_time()
    call()
    return time.process_time() - start


def _run(calls, skipped, seconds, device):
    """{name: numbers of its row} of ``calls`` {name: function} and of those ``skipped`` {name: reason}."""
    for name, call in list(calls.items()):
        try:
            call()  # compiles and warms up
        except RuntimeError as error:  # out of memory: the others go on
            skipped[name] = f"failed: {' '.join(str(error).split())[:80]}"
            del calls[name]
    numbers = {}
    for name, times in call_times(calls, seconds=seconds, device=device).items():
        low, middle, high = (1e3 * value for value in statistics.quantiles(times, n=4, method="inclusive"))
        memory = peak_memory(calls[name], device)
        numbers[name] = {
            "ms": middle,
            "quartiles_ms": [low, high],
            "repeats": len(times),
            "memory_mb": None if memory is None else memory / 1e6,
            "skipped": None,
        }
    nothing = {"ms": None, "quartiles_ms": [None, None], "repeats": 0, "memory_mb": None}
    return numbers | {name: {**nothing, "skipped": reason} for name, reason in skipped.items()}
