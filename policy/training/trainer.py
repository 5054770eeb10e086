"""The one trainer of everything: its model, its data and its judge keep the contracts of policy/training/protocols.py.

Everything random is a function of (seed, step): the order of an epoch, noise, crops, dropout. A resumed run
therefore needs only weights, optimizer moments and the step to go on bit for bit.
"""

import contextlib
import functools
import math
import time

import torch
from tqdm import tqdm

from policy.checkpoint import load_weights
from policy.training.batches import Batches, make_batch, step_seed, to_tensors
from policy.training.ema import EMA
from policy.training.optim import build_optimizer, check_optimizer, learning_rate, load_state, state_tensors
from policy.training.processes import StopSignals, explain, make_accelerator
from policy.training.run_folder import RunFolder
from policy.training.validation import Validation

POSITIVE = (
    "gradient_accumulation",
    "windows_per_group",
    "log_every",
    "val_every",
    "rollout_every",
    "checkpoint_every",
)


class Trainer:
    """Trains ``model`` and keeps the run folder: metrics.jsonl, curves.png and checkpoints.

    options: the ``training`` section of the configuration; config: all of it, as a plain dict, stored with every
    checkpoint; evaluate(model, epoch) -> {metric: number}: called every ``rollout_every`` epochs with the EMA model;
    tracker(line): also gets each line of metrics, pictures as paths.
    """

    def __init__(
        self, model, train_data, val_data, *, options, config, run_dir, evaluate=None, tracker=None, device="auto"
    ):
        _check_options(options)
        self.accelerator = make_accelerator(options.precision, device)
        self.options, self.evaluate, self.tracker = options, evaluate, tracker
        self.folder = RunFolder(run_dir, config, writes=self.accelerator.is_main_process)
        self._count_steps(len(train_data))
        self.set_training_data(train_data, since=0)

        model = model.to(self.accelerator.device)
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.trained = [p for _, p in self.named]
        optimizer = build_optimizer(model, options)
        self.ema = EMA(model, power=options.ema.power, max_decay=options.ema.max_decay)
        self.raw_model = model
        if options.compile:
            model.compile_training()  # after the copy of EMA, which would share what is compiled
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.validation = None
        if val_data is not None:
            self.validation = Validation(
                self.ema.model,
                val_data,
                batch_size=self.batch_size,
                max_batches=options.max_val_batches,
                accelerator=self.accelerator,
                seed_of=functools.partial(step_seed, options.seed),
                make_batch=functools.partial(make_batch, device=self.accelerator.device),
            )
        self.step = 0
        self._pending = []

    def _count_steps(self, samples):
        """Sizes of batches, epochs and the run, of ``samples`` training samples."""
        options = self.options
        shard = self.accelerator.num_processes * options.gradient_accumulation
        if options.batch_size < 1 or options.batch_size % shard:
            raise ValueError(
                f"batch_size: got {options.batch_size}, allowed: a multiple of {shard} (processes x accumulation)"
            )
        # A data set smaller than a batch still trains: its batch is then the whole of it.
        self.batch_size = min(options.batch_size, samples // shard * shard)
        if self.batch_size == 0:
            raise ValueError(f"training windows: got {samples}, allowed: at least {shard}")
        self.steps_per_epoch = samples // self.batch_size
        self.total_steps = options.epochs * self.steps_per_epoch
        if options.max_steps is not None:
            self.total_steps = min(self.total_steps, options.max_steps)
        if self.total_steps < 1:
            raise ValueError(f"epochs, max_steps: got {options.epochs}, {options.max_steps}, allowed: at least 1 step")

    def set_training_data(self, data, *, since):
        """Draw batches from ``data`` from step ``since`` on; an epoch, as a unit of time, stays what it was."""
        accelerator, options = self.accelerator, self.options
        self.train_data = data
        self.batches = Batches(
            data,
            size=self.batch_size,
            seed=options.seed,
            group=options.windows_per_group,
            parts=options.gradient_accumulation * accelerator.num_processes,
            processes=accelerator.num_processes,
            own=accelerator.process_index,
            device=accelerator.device,
            since=since,
            end=self.total_steps,
        )

    # The loop ------------------------------------------------------------------------------------------------

    def fit(self, stop_at=None):
        """Train to the end, or to step ``stop_at``; a SIGTERM or SIGINT saves and then exits with its code."""
        end = self.total_steps if stop_at is None else min(stop_at, self.total_steps)
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
            with StopSignals(self.accelerator) as stop:
                while self.step < end:
                    self._train_step()
                    bar.update()
                    logs = self.step % self.options.log_every == 0
                    if logs:
                        rate = (self.step - first) / (time.monotonic() - started)
                        bar.set_postfix_str(f"loss {self._log_training(rate):.4f}")
                    if self.step % self.steps_per_epoch == 0 or self.step == self.total_steps:
                        self._end_epoch(math.ceil(self.step / self.steps_per_epoch))
                    # Several processes ask each other at log steps, so that all end at the same one.
                    if number := stop.agreed(logs):
                        self._exit_on_signal(number)
        except RuntimeError as error:
            raise explain(error, self.accelerator, self.step, self.folder.path) from error
        finally:
            bar.close()
            self.batches.close()
        self.save()

    def _train_step(self):
        options = self.options
        indices, own = self.batches.rows(self.step)
        seed = step_seed(options.seed, self.step)
        # Drawn for the whole batch, then cut, so that neither accumulation nor the number of processes changes it.
        randomness = self.raw_model.randomness(len(indices), torch.Generator().manual_seed(seed))
        torch.manual_seed(seed + 1 + self.accelerator.process_index)  # dropout
        self._lr = learning_rate(self.step, options, total=self.total_steps, steps_per_epoch=self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * group["lr_scale"]
        for number, rows in enumerate(own):
            batch = self.batches.training_batch(self.step, indices[rows])
            drawn = to_tensors({key: value[rows] for key, value in randomness.items()}, self.accelerator.device)
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
        self._track(line)

    def _track(self, line):
        if self.tracker is not None and self.accelerator.is_main_process:
            self.tracker(line)

    def _end_epoch(self, epoch):
        """Validation, evaluation, curves and checkpoints that are due after ``epoch`` epochs."""
        self._check_finite()  # an evaluation with such weights would fail in words of its own
        options, last = self.options, self.step == self.total_steps
        values, picture = {}, None
        if self.validation is not None and (epoch % options.val_every == 0 or last):
            values.update(self.validation.losses())
            if self.folder.writes:
                picture = self.folder.save_reconstructions(epoch, self.validation.reconstructions())
        score = None
        if self.evaluate is not None and (epoch % options.rollout_every == 0 or last):
            score = self._judge(epoch, values)
        if values:
            self.log(values)
            self.folder.plot()
        if picture is not None:
            self._track({"step": self.step, "reconstructions": picture})
        if score is not None:
            weights = functools.partial(self._weights, self.ema.model, "ema")
            self.folder.keep_best(self.step, score, weights, count=options.top_k)
        if epoch % options.checkpoint_every == 0 or last:
            self.save()

    def _judge(self, epoch, values):
        """Add the metrics of the first process's evaluation to ``values``; returns the score, None in the others."""
        score, name = None, self.options.score
        if self.accelerator.is_main_process:
            metrics = self.evaluate(self.ema.model, epoch)
            values.update(metrics)
            if name not in metrics:
                raise ValueError(f"training.score: got {name!r}, allowed: {', '.join(metrics)}")
            score = metrics[name]
        self.wait_for_everyone()
        return score

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
        self.step = state["step"]
        self.batches.close()

    def wait_for_everyone(self):
        """Wait for the other processes; ConnectionError where one is gone."""
        try:
            self.accelerator.wait_for_everyone()
        except RuntimeError as error:
            raise explain(error, self.accelerator, self.step, self.folder.path) from error

    def _exit_on_signal(self, number):
        self.save()
        if self.accelerator.is_main_process:
            name = StopSignals.name(number)
            print(f"\nstopped by {name} at step {self.step}; continue with resume={self.folder.path}")
        raise SystemExit(128 + number)


def _check_options(options):
    """Raise ValueError for intervals and counts that must be positive, before any work is done."""
    for key in POSITIVE:
        if options[key] < 1:
            raise ValueError(f"training.{key}: got {options[key]}, allowed: >= 1")
    if options.max_val_batches is not None and options.max_val_batches < 1:
        raise ValueError(f"training.max_val_batches: got {options.max_val_batches}, allowed: >= 1, or null")
    check_optimizer(options)
