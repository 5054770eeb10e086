"""The one trainer: any model with ``forward(batch, randomness) -> {"loss"}``, any data with ``batch(indices)``.

Everything random is a function of (seed, step): the order of an epoch, noise, crops, dropout. A resumed run
therefore needs only weights, optimizer moments and the step to go on bit for bit.
"""

import contextlib
import functools
import math
import os
import re
import signal
import time

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from policy.checkpoint import load_weights
from policy.dataset import epoch_order
from policy.training.ema import EMA
from policy.training.hashing import hashed_uniform
from policy.training.optim import build_optimizer, check_optimizer, learning_rate, load_state, state_tensors
from policy.training.run_folder import RunFolder

VALIDATION_SEED = 1 << 40  # far from every training step


def to_tensors(batch, device):
    """Nested dictionaries of numpy arrays or tensors to tensors on ``device``."""
    if isinstance(batch, dict):
        return {key: to_tensors(value, device) for key, value in batch.items()}
    return torch.as_tensor(batch).to(device, non_blocking=True)


class Trainer:
    """Trains ``model`` and keeps the run folder: metrics.jsonl, curves.png and checkpoints.

    options: the ``training`` section of the configuration; config: all of it, as a plain dict, stored with every
    checkpoint; evaluate(model, epoch) -> {metric: number}: called every ``rollout_every`` epochs with the EMA model.
    """

    def __init__(self, model, train_data, val_data, *, options, config, run_dir, evaluate=None, device="auto"):
        _check_options(options)
        self.accelerator = _accelerator(options.precision, device)
        self.options, self.evaluate, self.val_data = options, evaluate, val_data
        self.folder = RunFolder(run_dir, config, writes=self.accelerator.is_main_process)
        shard = self.accelerator.num_processes * options.gradient_accumulation
        if options.batch_size < 1 or options.batch_size % shard:
            raise ValueError(
                f"batch_size: got {options.batch_size}, allowed: a multiple of {shard} (processes x accumulation)"
            )
        # A data set smaller than a batch still trains: its batch is then the whole of it.
        self.batch_size = min(options.batch_size, len(train_data) // shard * shard)
        if self.batch_size == 0:
            raise ValueError(f"training windows: got {len(train_data)}, allowed: at least {shard}")
        self.steps_per_epoch = len(train_data) // self.batch_size
        self.set_training_data(train_data, since=0)
        self.total_steps = options.epochs * self.steps_per_epoch
        if options.max_steps is not None:
            self.total_steps = min(self.total_steps, options.max_steps)
        if self.total_steps < 1:
            raise ValueError(f"epochs, max_steps: got {options.epochs}, {options.max_steps}, allowed: at least 1 step")

        model = model.to(self.accelerator.device)
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.trained = [p for _, p in self.named]
        optimizer = build_optimizer(model, options)
        self.ema = EMA(model, power=options.ema.power, max_decay=options.ema.max_decay)
        self.raw_model = model
        if options.compile:
            model.compile_training()  # after the copy of EMA, which would share what is compiled
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.step = 0
        self._stop = None
        self._pending = []

    def set_training_data(self, data, *, since):
        """Draw batches from ``data`` from step ``since`` on; an epoch, as a unit of time, stays what it was."""
        self.train_data, self.data_since = data, since
        self._order_epoch = self._stream = None

    # The loop ------------------------------------------------------------------------------------------------

    def fit(self, stop_at=None):
        """Train to the end, or to step ``stop_at``; a SIGTERM or SIGINT saves and then exits with its code."""
        end = self.total_steps if stop_at is None else min(stop_at, self.total_steps)
        previous = {s: signal.signal(s, self._request_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not self.accelerator.is_main_process,
            mininterval=1.0,
            dynamic_ncols=True,
        )
        started, first = time.monotonic(), self.step
        try:
            while self.step < end:
                self._train_step()
                bar.update()
                if self.step % self.options.log_every == 0:
                    rate = (self.step - first) / (time.monotonic() - started)
                    bar.set_postfix_str(f"loss {self._log_training(rate):.4f}")
                if self.step % self.steps_per_epoch == 0 or self.step == self.total_steps:
                    self._end_epoch(math.ceil(self.step / self.steps_per_epoch))
                if self._must_stop():
                    self._exit_on_signal()
        except RuntimeError as error:
            raise self._explain(error) from error
        finally:
            bar.close()
            if self._stream is not None:  # what it prepared ahead waits in processes of its own
                self._stream.close()
                self._stream = None
            for number, handler in previous.items():
                signal.signal(number, handler)
        self.save()

    def _train_step(self):
        options = self.options
        indices, own = self._rows(self.step)
        generator = torch.Generator().manual_seed(self._step_seed(self.step))
        # Drawn for the whole batch, then cut, so that neither accumulation nor the number of processes changes it.
        randomness = self.raw_model.randomness(len(indices), generator)
        torch.manual_seed(self._step_seed(self.step) + 1 + self.accelerator.process_index)  # dropout
        self._lr = learning_rate(self.step, options, total=self.total_steps, steps_per_epoch=self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * group["lr_scale"]
        for number, rows in enumerate(own):
            batch = self._training_batch(indices[rows])
            drawn = {key: value[rows].to(self.accelerator.device) for key, value in randomness.items()}
            synchronise = number == len(own) - 1
            with self.accelerator.no_sync(self.model) if not synchronise else contextlib.nullcontext():
                with self.accelerator.autocast():
                    losses = self.model(batch, drawn)
                self.accelerator.backward(losses["loss"] / len(own))
            self._pending.append({key: value.detach() for key, value in losses.items()})
        if options.gradient_clip is not None:
            self.accelerator.clip_grad_norm_(self.trained, options.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.raw_model, self.step)
        self.step += 1

    def _rows(self, step):
        """Indices of the training data in the batch of ``step``, and the rows of it in each own micro-batch."""
        epoch, position = divmod(step - self.data_since, len(self.train_data) // self.batch_size)
        indices = self._epoch_order(epoch)[position * self.batch_size : (position + 1) * self.batch_size]
        parts = np.array_split(
            np.arange(len(indices)), self.options.gradient_accumulation * self.accelerator.num_processes
        )
        return indices, parts[self.accelerator.process_index :: self.accelerator.num_processes]

    def _training_batch(self, indices):
        """Rows ``indices`` of the training data, augmented; the next of its stream, where it prepares batches ahead."""
        if not hasattr(self.train_data, "stream"):
            return self._batch(self.train_data, indices, augment=True)
        if self._stream is None:
            self._stream = self.train_data.stream(self._requests(self.step))
        return to_tensors(next(self._stream), self.accelerator.device)

    def _requests(self, step):
        """What this process trains on from ``step`` on: a list of (index, seed of its augmentation) a micro-batch."""
        for number in range(step, self.total_steps):
            indices, own = self._rows(number)
            for rows in own:
                yield [(int(index), self._step_seed(number)) for index in indices[rows]]

    def _epoch_order(self, epoch):
        if self._order_epoch != epoch:
            self._order_epoch = epoch
            self._order = epoch_order(
                len(self.train_data), seed=self.options.seed, epoch=epoch, group=self.options.windows_per_group
            )
        return self._order

    def _step_seed(self, step):
        return int(np.random.SeedSequence([self.options.seed, step]).generate_state(1, np.uint32)[0])

    def _batch(self, data, indices, augment):
        arrays = data.batch(indices)
        frame_id = arrays.pop("frame_id", None)
        if augment and frame_id is not None:
            arrays["crop"] = hashed_uniform(self.options.seed, self.step, frame_id, columns=2)
        return to_tensors(arrays, self.accelerator.device)

    # Looking at it -------------------------------------------------------------------------------------------

    def _log_training(self, rate):
        means = {key: torch.stack([p[key] for p in self._pending]).mean() for key in self._pending[0]}
        self._pending.clear()
        values = {key: self.accelerator.reduce(value, "mean").item() for key, value in means.items()}
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"loss: got {values['loss']} at step {self.step}; the last checkpoint is untouched"
            )
        self.log({**{f"train_{k}": v for k, v in values.items()}, "lr": self._lr}, rate)
        return values["loss"]

    def log(self, values, rate=None):
        """Write a line of metrics with the dictionary ``values``."""
        line = {"step": self.step, "epoch": self.step / self.steps_per_epoch, **values}
        if rate is not None:
            line["steps_per_second"] = rate
        self.folder.log(line)
        if self.accelerator.is_main_process:
            self.tracker(line)

    def tracker(self, line):
        """Also hand each line to an experiment tracker, pictures as paths; replaced by train.py when wandb is on."""

    @torch.no_grad()
    def validate(self):
        """Mean losses of the EMA model over the held-out windows, with noise that is the same every time."""
        sums, count = {}, 0
        size = self.batch_size
        for number, start in enumerate(range(0, len(self.val_data), size)):
            if number == self.options.max_val_batches:
                break
            indices = np.arange(start, min(start + size, len(self.val_data)))
            batch, randomness = self._validation_batch(number, indices)
            with self.accelerator.autocast():
                losses = self.ema.model(batch, randomness)
            for key, value in losses.items():
                sums[key] = sums.get(key, 0.0) + value.item() * len(indices)
            count += len(indices)
        return {f"val_{key}": value / count for key, value in sums.items()}

    def _validation_batch(self, number, indices):
        generator = torch.Generator().manual_seed(self._step_seed(VALIDATION_SEED + number))
        randomness = to_tensors(self.ema.model.randomness(len(indices), generator), self.accelerator.device)
        return self._batch(self.val_data, indices, augment=False), randomness

    def _draw_reconstructions(self, epoch):
        """A picture of what the decoder makes of held-out windows, {"reconstructions": path} for the tracker."""
        if not hasattr(self.ema.model, "reconstruct") or not self.folder.writes:
            return {}
        spread = np.linspace(0, len(self.val_data) - 1, min(64, len(self.val_data))).astype(int)
        with self.accelerator.autocast():
            pairs = self.ema.model.reconstruct(*self._validation_batch(0, spread))
        path = self.folder.save_reconstructions(epoch, pairs)
        return {} if path is None else {"reconstructions": path}

    def _end_epoch(self, epoch):
        """Validation, rollouts, curves and checkpoints that are due after ``epoch`` epochs."""
        self._check_finite()  # a rollout with such weights would fail in words of its own
        options, last = self.options, self.step == self.total_steps
        values, pictures = {}, {}
        if self.val_data is not None and (epoch % options.val_every == 0 or last):
            values.update(self.validate())
            pictures = self._draw_reconstructions(epoch)
        score = None
        if self.evaluate is not None and (epoch % options.rollout_every == 0 or last):
            if self.accelerator.is_main_process:
                metrics = self.evaluate(self.ema.model, epoch)
                values.update(metrics)
                if options.score not in metrics:
                    raise ValueError(f"training.score: got {options.score!r}, allowed: {', '.join(metrics)}")
                score = metrics[options.score]
            self.wait_for_everyone()
        if values:
            self.log(values)
            self.folder.plot()
        if pictures and self.accelerator.is_main_process:
            self.tracker({"step": self.step, **pictures})
        if score is not None:
            weights = functools.partial(self._weights, self.ema.model, "ema")
            self.folder.keep_best(self.step, score, weights, count=options.top_k)
        if epoch % options.checkpoint_every == 0 or last:
            self.save()

    # Checkpoints ---------------------------------------------------------------------------------------------

    def _check_finite(self):
        """Raise FloatingPointError when a weight is NaN or inf, which one bad gradient makes of all of them."""
        if not all(bool(parameter.isfinite().all()) for parameter in self.trained):
            raise FloatingPointError(f"weights: got NaN or inf at step {self.step}; the last checkpoint is untouched")

    def _weights(self, model, prefix):
        return {f"{prefix}.{name}": tensor for name, tensor in model.state_dict().items()}

    def save(self):
        """Write checkpoints/last.safetensors: all that resuming needs."""
        self._check_finite()
        self.folder.save_last(self.step, self._all_tensors)

    def _all_tensors(self):
        tensors = {**self._weights(self.raw_model, "model"), **self._weights(self.ema.model, "ema")}
        moments = state_tensors(self.optimizer, self.named)
        return tensors | {f"optimizer.{name}": value for name, value in moments.items()}

    def resume(self):
        """Continue from checkpoints/last.safetensors of the run folder; drops metrics logged after it."""
        path, tensors, state = self.folder.load_last()

        def part(prefix):
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        load_weights(self.raw_model, part("model."), str(path))
        load_weights(self.ema.model, part("ema."), str(path))
        load_state(self.optimizer, self.named, part("optimizer."), path)
        self.step, self._stream = state["step"], None

    def _request_stop(self, number, _frame):
        if self._stop is not None:  # asked twice: do not wait for the step to end
            raise SystemExit(128 + number)
        self._stop = number

    def wait_for_everyone(self):
        """Wait for the other processes; ConnectionError where one is gone."""
        try:
            self.accelerator.wait_for_everyone()
        except RuntimeError as error:
            raise self._explain(error) from error

    def _must_stop(self):
        """Whether a signal has arrived; several processes agree on it at log steps, so that all end at the same one."""
        if self.accelerator.num_processes == 1:
            return self._stop is not None
        if self.step % self.options.log_every:
            return False
        asked = torch.tensor(self._stop or 0, device=self.accelerator.device)
        self._stop = int(self.accelerator.gather(asked).max()) or None
        return self._stop is not None

    def _exit_on_signal(self):
        self.save()
        name = signal.Signals(self._stop).name
        if self.accelerator.is_main_process:
            print(f"\nstopped by {name} at step {self.step}; continue with resume={self.folder.path}, or --resume")
        raise SystemExit(128 + self._stop)

    def _explain(self, error):
        """``error``, or in its place one that says that another process is gone, if that is what it means."""
        if self.accelerator.num_processes == 1 or not re.search("connection|peer|timed out|NCCL", str(error), re.I):
            return error
        rank = self.accelerator.process_index
        return ConnectionError(
            f"process {rank} of {self.accelerator.num_processes}: another one is gone (step {self.step}; {error});"
            f" continue from the last checkpoint with resume={self.folder.path}"
        )


def _check_options(options):
    """Raise ValueError for intervals and counts that must be positive, before any work is done."""
    for key in (
        "gradient_accumulation",
        "windows_per_group",
        "log_every",
        "val_every",
        "rollout_every",
        "checkpoint_every",
    ):
        if options[key] < 1:
            raise ValueError(f"training.{key}: got {options[key]}, allowed: >= 1")
    if options.max_val_batches is not None and options.max_val_batches < 1:
        raise ValueError(f"training.max_val_batches: got {options.max_val_batches}, allowed: >= 1, or null")
    check_optimizer(options)


def uses_cpu(device):
    """Whether accelerate must be told to use the CPU: as ``device`` says, or for several processes without CUDA.

    Left to itself it would not join these: each would train alone, in the same folder.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return device == "cpu" or (several and not torch.cuda.is_available())


def _accelerator(precision, device):
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision: got {precision!r}, allowed: fp32, bf16")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: got {device!r}, allowed: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch sees no CUDA device; allowed here: auto, cpu")
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=uses_cpu(device))
