"""Speed of one training step beside the plain way with diffusers and timm; ``python -m eval.speed train``."""

import functools
import time

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from eval.shared.compose import locate_data
from eval.shared.machine import check_positive, compare, multiply_rate
from eval.shared.tables import show
from eval.speed.reference import PlainDataset, plain_loss, plain_policy, plain_training_step, sharing
from eval.speed.sample import PRECISIONS, random_policy, share_cell, time_cells
from policy.build import datasets_of
from policy.dataset import epoch_order
from policy.dataset.features import cache_features, place_buffer
from policy.training.batches import to_tensors
from policy.training.ema import EMA
from policy.training.hashing import hashed_uniform

EPISODES = 40  # hold windows enough for a batch, and a frozen encoder has seen them soon
PROFILED = 5  # steps


def add_options(parser):
    parser.add_argument("--task", default="pusht", help="a folder of config/, default pusht")
    parser.add_argument("--preset", default="paper", help="paper (default), small, cpu, smoke")
    parser.add_argument("--data", help="as task.data: a name or the path of a zarr; default that of the task")
    parser.add_argument("--batch", type=int, default=8, help="windows a step, default 8")
    parser.add_argument("--windows-per-group", type=int, default=4, help="of the grouped method, default 4")
    parser.add_argument("--timesteps-per-sample", type=int, default=4, help="of the method with several, default 4")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile, too; minutes on a CPU")


def run(args):
    """(name, title, what, settings, rows, table) of what the options ask for."""
    keys = ("batch", "windows_per_group", "timesteps_per_sample", "seconds")
    settings = {key: getattr(args, key) for key in keys}
    check_positive(**settings)
    policy = random_policy(args.task, [f"preset={args.preset}", *args.overrides], args.device).train()
    config = policy.config
    config["task"]["data"] = args.data or config["task"]["data"]
    if config["encoder"].get("freeze", False):
        policy.encoder.encoders.requires_grad_(False)
    config["data"]["max_train_episodes"] = min(config["data"]["max_train_episodes"] or EPISODES, EPISODES)
    data, _ = datasets_of(config, locate_data(config["task"], config["cache_dir"]))
    if args.batch > len(data):
        raise ValueError(f"--batch: got {args.batch}, allowed: 1 to {len(data)} windows of {EPISODES} episodes")
    policy.fit_normalizer(data)
    rows = measure_train(policy, data, **settings, compiled=args.compile, device=args.device)
    what = f"{args.task}, preset {args.preset}, batches of {args.batch} windows"
    return "train", "Speed of a training step", what, {**settings, "preset": args.preset}, rows, cells(rows)


# What is compared ----------------------------------------------------------------------------------------------------


class Step:
    """What the steps of all methods share: data, weights, EMA, moments of the optimizer, and the random numbers.

    Every method is a function (policy) -> loss of one whole step, the move of its batch to the device included. The
    plain one gets a batch that a DataLoader would have made meanwhile, ours makes its own.
    """

    def __init__(self, policy, data, *, batch, group):
        self.data, self.device = data, next(policy.parameters()).device
        self.options, self.seed = policy.config["training"], policy.config["seed"]
        self.ema = EMA(policy, power=self.options["ema"]["power"], max_decay=self.options["ema"]["max_decay"])
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        moments = [{key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")} for p in trained]
        self.plain_optimizer = self._optimizer(trained, moments)
        self.optimizer = self._optimizer(trained, moments, fused=True)
        self.indices = epoch_order(len(data), seed=self.seed, epoch=0)[:batch]
        self.grouped = epoch_order(len(data), seed=self.seed, epoch=0, group=group)[:batch]
        plain = PlainDataset(data.buffer.arrays, data.windows, policy.config["task"]["shape_meta"]["obs"])
        self.plain_batch = default_collate([plain[index] for index in self.indices])
        if self.device.type == "cuda":
            self.plain_batch = pinned(self.plain_batch)

    def _optimizer(self, trained, moments, **options):
        keys = ("lr", "betas", "eps", "weight_decay")
        optimizer = torch.optim.AdamW(trained, **{key: self.options[key] for key in keys}, **options)
        for parameter, shared in zip(trained, moments, strict=True):
            count = torch.zeros((), device=parameter.device if options else "cpu")  # as torch has it
            optimizer.state[parameter] = {"step": count, **shared}
        return optimizer

    def randomness(self, policy):
        drawn = policy.randomness(len(self.indices), torch.Generator().manual_seed(self.seed))
        return to_tensors(drawn, self.device)

    def crop(self, frame_id):
        return hashed_uniform(self.seed, 0, frame_id, columns=2)

    # Plain ---------------------------------------------------------------------------------------------------

    def plain_inputs(self, policy):
        """What ``plain_loss`` takes of the step's windows."""
        drawn = self.randomness(policy)
        frames = self.data.windows[self.indices][:, : policy.obs_steps].flatten()
        noise, steps = drawn["noise"].flatten(0, 1), drawn["steps"].flatten()
        crop = to_tensors(self.crop(frames), self.device)
        return {"batch": to_tensors(self.plain_batch, self.device), "noise": noise, "steps": steps, "crop": crop}

    def plain(self, policy):
        return plain_training_step(
            policy,
            **self.plain_inputs(policy),
            optimizer=self.plain_optimizer,
            average=self.ema.model,
            decay=self.ema.decay(0),
            gradient_clip=self.options["gradient_clip"],
        )

    # Ours ----------------------------------------------------------------------------------------------------

    def loss(self, policy, precision, indices):
        """The loss as the trainer computes it."""
        batch = self.data.batch(indices)
        batch["crop"] = self.crop(batch.pop("frame_id"))
        batch, drawn = to_tensors(batch, self.device), self.randomness(policy)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return policy(batch, drawn)["loss"]

    def ours(self, policy, precision, indices):
        loss = self.loss(policy, precision, indices)
        loss.backward()
        if self.options["gradient_clip"] is not None:
            nn.utils.clip_grad_norm_(policy.parameters(), self.options["gradient_clip"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(policy, 0)
        return loss.detach()


def pinned(batch):
    """Nested dictionaries of tensors in memory that a GPU can read by itself."""
    return {key: pinned(value) if isinstance(value, dict) else value.pin_memory() for key, value in batch.items()}


def our_methods(policy, step, *, group, timesteps, compiled):
    """{method: (policy, precision, indices)}, all with the same weights."""
    several = sharing(policy)
    several.timesteps_per_sample = timesteps
    found = {f"ours {precision}": (policy, precision, step.indices) for precision in PRECISIONS}
    if compiled:
        one = sharing(policy)
        one.compile_training()
        found["ours bf16, compiled"] = (one, "bf16", step.indices)
    found[f"ours bf16, {group} windows a group"] = (policy, "bf16", step.grouped)
    found[f"ours bf16, {timesteps} timesteps a sample"] = (several, "bf16", step.indices)
    return found


# Measurement ---------------------------------------------------------------------------------------------------------


def measure_train(policy, data, *, batch, windows_per_group, timesteps_per_sample, seconds, device, compiled=False):
    """A dictionary per method, as in train.json.

    share_of_multiplying: the operations of the plain step over the time, relative to matrix products by themselves
    (None with several timesteps a sample, which are more operations);
    gpu_busy: share of the time that the GPU works (None on a CPU). The losses are those of the same weights.
    """
    plain = plain_policy(policy)
    step = Step(policy, data, batch=batch, group=windows_per_group)
    if policy.config["encoder"].get("freeze", False):
        cache_features(policy, [data], device=device)
    place_buffer(data.buffer, policy.config["storage"], device)
    ours = our_methods(policy, step, group=windows_per_group, timesteps=timesteps_per_sample, compiled=compiled)
    with torch.no_grad():
        losses = {method: step.loss(*settings).item() for method, settings in ours.items()}
    with FlopCounterMode(display=False) as counter:
        loss = plain_loss(plain, **step.plain_inputs(plain))
        loss.backward()
    losses["plain"] = loss.item()
    del loss
    policy.zero_grad(set_to_none=True)
    rates = {name: multiply_rate(device, kind) for name, kind in PRECISIONS.items()}
    calls = {"plain": functools.partial(step.plain, plain)}
    calls |= {method: functools.partial(step.ours, *settings) for method, settings in ours.items()}
    rows = []
    for row in compare(calls, {}, baseline="plain", seconds=seconds, device=device):
        method = row["method"]
        row |= {"loss": losses[method], "gpu_busy": None, "samples_per_s": None, "share_of_multiplying": None}
        if row["ms"]:
            rate = rates["bf16" if "bf16" in method else "fp32"]
            row["samples_per_s"] = batch / row["ms"] * 1e3
            if "timesteps" not in method:
                row["share_of_multiplying"] = counter.get_total_flops() / row["ms"] * 1e3 / rate
            row["gpu_busy"] = busy_share(calls[method]) if device == "cuda" else None
        rows.append(row)
    return rows


def busy_share(call):
    """Share of the time of some calls in which the GPU runs kernels."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        start = time.perf_counter()
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6 / seconds


def cells(rows):
    """Cells of the Markdown table, a row a method."""
    lines = [["method", "ms", "times faster", "MB", "samples/s", "of GEMM rate", "GPU busy", "loss"]]
    for row in rows:
        rate = show(row["samples_per_s"], ",.1f")
        shares = [share_cell(row[key]) for key in ("share_of_multiplying", "gpu_busy")]
        lines.append([row["method"], *time_cells(row), rate, *shares, f"{row['loss']:.5f}"])
    return lines
