"""Our compiled U-Net beside torch, torch.compile and onnxruntime, on a CPU; ``python -m eval.speed runtimes``.

All have the same weights, noise and number of threads, and take turns in one process. On a busy machine compare
processor time with --threads 1: threads that wait for each other lose most where others take their cores.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval.shared.machine import check_positive, interleaved_times
from eval.speed.reference import sharing
from eval.speed.sample import parse_sampler, random_observation
from policy.checkpoint import load_policy
from policy.export import export
from policy.kernels.unet1d import PackedUNet, unsupported

OURS = "ours"  # the name of the others' measure
SHIPPED = Path(__file__).parent.parent.parent / "pretrained" / "pusht_policy.safetensors"


def add_options(parser):
    parser.add_argument("--checkpoint", default=SHIPPED, help="run folder or .safetensors file; default: Push-T's")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 25], metavar="B", help="rows of a call")
    parser.add_argument("--sampler", default="ddim:10", metavar="NAME:STEPS", help="default ddim:10")


def run(args):
    """(name, title, what, settings, rows, table) of what the options ask for."""
    for batch in args.batches:
        check_positive(batches=batch, seconds=args.seconds)
    if args.device != "cpu":
        raise ValueError(f"--device: got {args.device}, allowed: cpu")
    settings = {"sampler": parse_sampler(args.sampler), "batches": sorted(set(args.batches)), "seconds": args.seconds}
    rows = measure_runtimes(args.checkpoint, **settings)
    what = f"{Path(args.checkpoint).name}, {args.sampler}; ratios are over ours"
    return "runtimes", "Speed of a policy's runtimes", what, settings, rows, cells(rows)


def measure_runtimes(checkpoint, *, sampler, batches, seconds):
    """A dictionary per batch size, part and runtime, as in runtimes.json.

    part: "step" is one prediction of the U-Net, "whole" goes from observation to chunk. "ms", "cpu_ms": medians;
    "ms_half": range of the middle half; "ratio", "cpu_ratio": time over ours; "deviation": largest difference of the
    chunk from ours, in normalised units.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        graph, policy = Path(folder) / "policy.onnx", load_policy(checkpoint)
        policy.set_sampler(*sampler)
        reason = unsupported(policy.denoiser, torch.zeros(max(batches), policy.horizon, policy.action_dim))
        if reason is not None:
            raise ValueError(f"--checkpoint, --batches: {reason}")
        export(checkpoint, graph, sampler=sampler[0], steps=sampler[1])
        torches, onnx = torch_runtimes(policy), onnx_policy(graph)
        for batch in tqdm(batches, desc="batches", leave=False, dynamic_ncols=True):
            for part, calls in both_parts(policy, torches, onnx, batch).items():
                chunks = {name: torch.as_tensor(call()) for name, call in calls.items()}
                scale = policy.normalizer.get_buffer("action_scale") if part == "whole" else 1.0
                for row in compare_times(calls, seconds):
                    deviation = ((chunks[row["runtime"]] - chunks[OURS]) * scale).abs().max().item()
                    rows.append({"batch": batch, "part": part, **row, "deviation": deviation})
    return rows


def torch_runtimes(policy):
    """{runtime: (function of one step, policy that samples with it)}, all with the same weights."""
    compiled = torch.compile(policy.denoiser.denoise, dynamic=False)
    others = {"torch": policy.denoiser.denoise, "torch.compile": compiled}
    found = {OURS: (PackedUNet(policy.denoiser).denoise, policy)}
    for name, denoise in others.items():
        other = sharing(policy)
        other.loop.packed_weights, other.denoiser.denoise = None, denoise
        found[name] = denoise, other
    return found


def onnx_policy(graph):
    """The exported policy, on as many threads as torch has."""
    import onnxruntime  # one of the packages that ``export`` names where they are missing

    from policy.onnx_runtime import OnnxPolicy

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return OnnxPolicy(graph, sess_options=options, providers=["CPUExecutionProvider"])


def both_parts(policy, torches, onnx, batch):
    """{part: {runtime: function without arguments}}; all runtimes get the same numbers."""
    obs, generator = random_observation(policy, batch), torch.Generator()
    shape = (batch, policy.horizon, policy.action_dim)
    start, draws = policy.loop.draw(shape, policy.sampling_steps(), generator=generator.manual_seed(0), device="cpu")
    frames = policy.encoder({key: value.flatten(0, 1) for key, value in obs.items()})
    ours = policy.denoiser.observation_films(frames.reshape(batch, -1))
    theirs = policy.denoiser.step_films(torch.tensor([policy.sampling_steps()[0].timestep]))
    films = [one + other for one, other in zip(ours, theirs, strict=True)]
    arrays = {"actions": start.numpy(), "films": torch.cat(ours, dim=1).numpy(), "step": np.array([0])}
    obs_arrays = {key: value.numpy() for key, value in obs.items()}
    noise = torch.cat([start[None], draws]).numpy()
    step = {name: lambda denoise=denoise: denoise(start, films) for name, (denoise, _) in torches.items()}
    whole = {
        name: lambda one=one: one.sample(obs, generator=generator.manual_seed(0)) for name, (_, one) in torches.items()
    }
    step["onnxruntime"] = lambda: onnx.denoiser.run(None, arrays)[0]
    whole["onnxruntime"] = lambda: onnx.sample(obs_arrays, noise=noise)
    return {"step": step, "whole": whole}


def compare_times(calls, seconds):
    """Rows of ``calls`` {runtime: function}: they take turns by the clock, then again by processor time."""
    wall = interleaved_times(calls, seconds=seconds / 2, device="cpu")
    processor = interleaved_times(calls, seconds=seconds / 2, device="cpu", clock=processor_seconds)
    for name in calls:
        low, middle, high = np.percentile(wall[name], [25, 50, 75]) * 1e3
        used = np.median(processor[name]) * 1e3
        yield {
            "runtime": name,
            "ms": middle,
            "ms_half": (low, high),
            "cpu_ms": used,
            "ratio": middle / (np.median(wall[OURS]) * 1e3),
            "cpu_ratio": used / (np.median(processor[OURS]) * 1e3),
        }


def processor_seconds(call, device):
    """Seconds that all threads of this process work in a ``call``."""
    start = time.process_time()
    call()
    return time.process_time() - start


def cells(rows):
    """Cells of the Markdown table, a row a measurement."""
    lines = [["batch", "what", "runtime", "ms", "middle half", "ratio", "CPU ms", "CPU ratio", "deviation"]]
    for row in rows:
        low, high = row["ms_half"]
        times = [f"{row['ms']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['ratio']:.2f}"]
        times += [f"{row['cpu_ms']:.2f}", f"{row['cpu_ratio']:.2f}"]
        lines.append([str(row["batch"]), row["part"], row["runtime"], *times, f"{row['deviation']:.1g}"])
    return lines
