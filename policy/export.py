"""Write a trained policy for others to run: its weights, or graphs that need none of this code.

python -m policy.export RUN_OR_CHECKPOINT OUTPUT [options]; the ending of OUTPUT says what is written:

.safetensors  EMA weights and configuration in one file for ``load_policy``. Loading it executes no code.
.onnx         STEM.encoder.onnx (observations -> films), STEM.denoiser.onnx (actions, films, step -> prediction) and
              STEM.onnx.json, the numbers of the sampling loop around them; JSON beside the graphs, and not inside,
              because any runtime reads it, for either format. policy/onnx_runtime.py needs no torch.
.pt2          the same as programs of torch.export. ``torch.export.load`` unpickles what ``weights_only`` refuses, so
              load such files only from people you trust.
"""

import argparse
import json
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from policy.attention.fibottention import FibottentionAttention
from policy.checkpoint import find_checkpoint, load_checkpoint, load_policy, save_checkpoint
from policy.files import whole
from policy.registry import within

GRAPHS_FORMAT = "fibottention-graphs-2"
MOST_ROWS = 4096  # of a graph for a fixed number, which is traced with as many
HALF_SIZE = 4096  # entries from which a tensor is stored in half precision; ranges of the normaliser stay exact


def export(run_or_checkpoint, output, **options):
    """Write a run folder or checkpoint to ``output`` as its ending says; returns the files that were written.

    options: of ``export_weights`` for .safetensors, of ``export_graphs`` for .onnx and .pt2. Raises ValueError or
    OSError, or ImportError where a package for .onnx is missing.
    """
    output = Path(output)
    if output.suffix not in EXPORTERS:
        raise ValueError(f"output: got {str(output)!r}, allowed: a name that ends in {', '.join(EXPORTERS)}")
    exporter, allowed = EXPORTERS[output.suffix]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise ValueError(f"options for {output.suffix}: got {', '.join(unknown)}, allowed: {', '.join(allowed)}")
    return exporter(run_or_checkpoint, output, **options)


# Weights ---------------------------------------------------------------------------------------------------------


def export_weights(run_or_checkpoint, output, *, half=False, keep_decoder=False):
    """Write EMA weights and configuration to one checkpoint, without the decoder, which only training uses.

    half: large tensors as float16; they are float32 again once loaded.
    """
    tensors, config, state = load_checkpoint(find_checkpoint(run_or_checkpoint), prefix="ema.")
    if "decoder" in config["model"] and not keep_decoder:
        config["model"]["decoder"] = {"name": "none"}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")}
    if half:
        tensors = {k: v.to(torch.float16) if v.numel() >= HALF_SIZE else v for k, v in tensors.items()}
    save_checkpoint(output, {f"ema.{k}": v for k, v in tensors.items()}, config=config, state={"step": state["step"]})
    return [output]


# Graphs ----------------------------------------------------------------------------------------------------------


class FilmEncoder(nn.Module):
    """obs {key: (B, To, ...)} float32 in raw units, images in 0..255 -> the observation's part of all films (B, F)."""

    def __init__(self, policy):
        super().__init__()
        self.encoder, self.obs_steps = policy.encoder, policy.obs_steps
        self.observation_films = policy.denoiser.observation_films
        condition = torch.zeros(1, self.obs_steps * self.encoder.out_dim)
        self.weights = _weights_read(policy.denoiser, self.observation_films(condition))

    def forward(self, obs):
        frames = self.encoder({key: values.flatten(0, 1) for key, values in obs.items()})
        condition = frames.unflatten(0, (-1, self.obs_steps)).flatten(1)  # (B, To * K)
        return torch.cat([film.flatten(1) for film in self.observation_films(condition)], dim=1)


class LoopStep(nn.Module):
    """actions (B, T, Da), films (B, F), number (1,) of a step of the loop -> prediction (B, T, Da).

    The steps' part of the films does not depend on the observation, so the graph holds a table of it, a row a step.
    """

    def __init__(self, denoiser, timesteps, action_shape):
        super().__init__()
        self.denoise = denoiser.denoise
        films = denoiser.step_films(torch.tensor(timesteps))
        self.shapes = [film.shape[1:] for film in films]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.register_buffer("table", torch.cat([film.flatten(1) for film in films], dim=1).detach())  # (S, F)
        first = [film[:1].detach() for film in films]
        self.weights = _weights_read(denoiser, [self.denoise(torch.zeros(1, *action_shape), first)])

    def forward(self, actions, films, step):
        films = (films + self.table.index_select(0, step)).split(self.sizes, dim=1)
        return self.denoise(actions, [film.unflatten(1, s) for film, s in zip(films, self.shapes, strict=True)])


def _weights_read(denoiser, outputs):
    """The parameters that ``outputs`` were made of; the denoiser's others then stay out of a part's file."""
    parameters = list(denoiser.parameters())
    gradients = torch.autograd.grad(sum(out.sum() for out in outputs), parameters, allow_unused=True)
    return nn.ParameterList(p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None)


def export_graphs(run_or_checkpoint, output, *, sampler=None, steps=None, batch=None):
    """Write encoder and denoiser as ``output``'s kind of graph, and the loop as JSON.

    sampler, steps: those of the policy if None; batch: rows of every call, any number if None.
    """
    if output.suffix == ".onnx":
        _check_packages()
    if batch is not None:
        within(1, MOST_ROWS, batch=batch)
    policy = load_policy(run_or_checkpoint)
    policy.set_sampler(sampler, steps)
    for module in policy.modules():
        if isinstance(module, FibottentionAttention):
            module.backend = "dense"  # the sparse kernels are operators that no other runtime knows
    parts = _parts(policy, batch or 2)  # an example of one row would fix the number at one
    policy.requires_grad_(False)
    return _write_together(output, parts, {**loop_numbers(policy), "batch": batch}, dynamic=batch is None)


def loop_numbers(policy):
    """Everything about ``policy`` that is not in its graphs, JSON-able."""
    action = {name: policy.normalizer.get_buffer(f"action_{name}").tolist() for name in ("scale", "offset")}
    relative = policy.relative_to
    return {
        "format": GRAPHS_FORMAT,
        "obs": {
            key: {"type": "rgb" if key in policy.encoder.cameras else "low_dim", "shape": shape, "dtype": "float32"}
            for key, shape in policy.encoder.shapes.items()
        },
        "obs_steps": policy.obs_steps,
        "horizon": policy.horizon,
        "action_steps": policy.action_steps,
        "action_dim": policy.action_dim,
        "action": action,  # raw = (normalised - offset) / scale
        "relative_to": relative,  # its value at the last observed step is added to the first columns
        "relative_columns": policy.encoder.shapes[relative][0] if relative else 0,
        "clip": policy.loop.clip,
        "sampler": policy.sampler,
        "steps": [step._asdict() for step in policy.sampling_steps()],
    }


@torch.enable_grad()  # gradients tell which weights a part reads
def _parts(policy, batch):
    """{part: (module, example inputs, names of the inputs, name of the output)}."""
    obs = {key: torch.zeros(batch, policy.obs_steps, *shape) for key, shape in policy.encoder.shapes.items()}
    timesteps = [step.timestep for step in policy.sampling_steps()]
    step = LoopStep(policy.denoiser, timesteps, (policy.horizon, policy.action_dim))
    films = torch.zeros(batch, sum(step.sizes))
    actions = torch.zeros(batch, policy.horizon, policy.action_dim)
    inputs = {"actions": actions, "films": films, "step": torch.zeros(1, dtype=torch.long)}
    return {
        "encoder": (FilmEncoder(policy), (obs,), list(obs), "films"),
        "denoiser": (step, tuple(inputs.values()), list(inputs), "prediction"),
    }


def _trace(module, arguments, *, dynamic):
    rows = {0: torch.export.Dim("batch", min=1)}
    shapes = [dict.fromkeys(x, rows) if isinstance(x, dict) else rows if len(x) > 1 else None for x in arguments]
    program = torch.export.export(module, arguments, dynamic_shapes=tuple(shapes) if dynamic else None)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # or the files would tell where this code lies on this machine
    return program


def _check_packages():
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error}; for ONNX files: pip install -e ".[export]"') from error


def _write_graph(path, program, inputs, output):
    if path.suffix == ".pt2":
        torch.export.save(program, path)
        return
    options = {"external_data": False, "verbose": False}
    torch.onnx.export(program, (), path, input_names=inputs, output_names=[output], **options)


def _write_together(output, parts, numbers, *, dynamic):
    """Write the graphs and the numbers, all or none of them; returns the files."""
    files = {part: output.with_suffix(f".{part}{output.suffix}") for part in parts}
    loop = output.with_name(f"{output.name}.json")
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own classes
        place = stack.enter_context(whole(loop))  # moves last, so that graphs of two policies never look like one
        for part in tqdm(parts, desc="tracing", unit="graph", leave=False, dynamic_ncols=True):
            module, arguments, *names = parts[part]
            program = _trace(module, arguments, dynamic=dynamic)
            _write_graph(stack.enter_context(whole(files[part])), program, *names)
        place.write_text(json.dumps(numbers, indent=1))
        loop.unlink(missing_ok=True)
    return [*files.values(), loop]


EXPORTERS = {  # ending of the output: function, its options
    ".safetensors": (export_weights, ("half", "keep_decoder")),
    ".onnx": (export_graphs, ("sampler", "steps", "batch")),
    ".pt2": (export_graphs, ("sampler", "steps", "batch")),
}


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m policy.export", description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS
    )
    parser.add_argument("run_or_checkpoint", help="run folder or checkpoint")
    parser.add_argument("output", help="file to write, .safetensors, .onnx or .pt2")
    weights = parser.add_argument_group(".safetensors")
    weights.add_argument("--half", action="store_true", help="large tensors as float16, half the size")
    weights.add_argument("--keep-decoder", action="store_true", help="keep the decoder, which only training uses")
    graphs = parser.add_argument_group(".onnx and .pt2")
    graphs.add_argument("--sampler", help="ddpm, ddim or dpmpp_2m; default: the policy's")
    graphs.add_argument("--steps", type=int, help="denoising steps; default: the policy's")
    graphs.add_argument("--batch", type=int, help="rows of every call; default: any number")
    try:
        files = export(**vars(parser.parse_args(argv)))
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None
    for file in files:
        print(f"wrote {file}, {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
