"""The one trainer of everything: its model, its data and its judge keep the contracts of policy/training/protocols.py.

Everything random is a function of (seed, step): the order of an epoch, noise, crops, dropout. A resumed run
therefore needs only weights, optimizer moments and the step to go on bit for bit.
"""

import contextlib
import functools
import math
import sys
import time
import traceback

import torch
from tqdm import tqdm

from policy.checkpoint import load_weights
from policy.training.batches import Batches, make_batch, step_seed, to_tensors
from policy.training.ema import EMA
from policy.training.optim import build_optimizer, learning_rate, load_state, state_tensors
from policy.training.options import check_training
from policy.training.processes import Stopped, StopSignals, explain, make_accelerator
from policy.training.run_folder import RunFolder
from policy.training.validation import Validation


class Trainer:
    """Trains ``model`` and keeps the run folder: metrics.jsonl, curves.png and checkpoints.

    options: the ``training`` section of the configuration; config: all of it, as a plain dict, stored with every
    checkpoint; evaluate(model, epoch) -> {metric: number}: called every ``rollout_every`` epochs with the EMA model;
    tracker(line): also gets each line of metrics, pictures as paths.
    """

    def __init__(
        self, model, train_data, val_data, *, options, config, run_dir, evaluate=None, tracker=None, device="auto"
    ):
        check_training(options)
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
        self._pending, self._lr, self._unseen = [], 0.0, False
        self._stop = StopSignals(self.accelerator)

    def _count_steps(self, samples):
        """Sizes of batches, epochs and the run, of ``samples`` training samples."""
        options, self.samples = self.options, samples
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
        """Train to the end, or to step ``stop_at``; a signal of ``StopSignals`` saves and then exits with its code."""
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
            with self._stop as stop:
                if self._unseen:
                    self._end_epoch(self.epochs)
                while self.step < end:
                    self._train_step()
                    bar.update()
                    logs = self.step % self.options.log_every == 0
                    if logs:
                        rate = (self.step - first) / (time.monotonic() - started)
                        bar.set_postfix_str(f"loss {self._log_training(rate):.4f}")
                    if self._at_end_of_epoch():
                        self._end_epoch(self.epochs)
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
        self._lr = self._learning_rate(self.step)
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

    def _learning_rate(self, step):
        return learning_rate(step, self.options, total=self.total_steps, steps_per_epoch=self.steps_per_epoch)

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

    @property
    def epochs(self):
        """Epochs done, the last one perhaps cut short."""
        return math.ceil(self.step / self.steps_per_epoch)

    def _at_end_of_epoch(self):
        return self.step > 0 and (self.step % self.steps_per_epoch == 0 or self.step == self.total_steps)

    def _due(self, every):
        """Whether what happens each ``every`` epochs does so now."""
        return self.epochs % every == 0 or self.step == self.total_steps

    def _left_unseen(self):
        """Whether a resumed run was stopped after it saved, before it looked at what is due at this step."""
        if not self._at_end_of_epoch():
            return False
        judged = self.evaluate is not None and self._due(self.options.rollout_every)
        validated = self.validation is not None and self._due(self.options.val_every)
        return not self.folder.looked_at(self.step, judged=judged, validated=validated)

    def _end_epoch(self, epoch):
        """Save, then look: validation, evaluation and pictures that are due after ``epoch`` epochs.

        Nothing that fails or is stopped while it looks costs a step of training.
        """
        self._check_finite()  # an evaluation with such weights would fail in words of its own
        self._unseen = False
        judges = self.evaluate is not None and self._due(self.options.rollout_every)
        if judges or self._due(self.options.checkpoint_every):
            self.save()
        values, picture = {}, None
        if self.validation is not None and self._due(self.options.val_every):
            values.update(self.validation.losses())
            if self.folder.writes:
                picture = self.folder.save_reconstructions(epoch, self.validation.reconstructions())
        if judges:
            values.update(self._judge(epoch))
        if self.options.score in values:
            weights = functools.partial(self._weights, self.ema.model, "ema")
            self.folder.keep_best(self.step, self.options.score, values, weights, count=self.options.top_k)
        if values:
            self.log(values)
            self.folder.plot()
        if picture is not None:
            self._track({"step": self.step, "reconstructions": picture})

    def _judge(self, epoch):
        """Metrics of the first process's evaluation, {} in the others and where it fails; a signal ends it at once."""
        metrics = {}
        if self.accelerator.is_main_process:
            try:
                with self._stop.at_once():
                    metrics = self.evaluate(self.ema.model, epoch)
            except Stopped:
                self._exit_on_signal(self._stop.number)
            except Exception:  # of a simulator, say; hours of training are worth more than a number
                traceback.print_exc()
                print(f"warning: evaluation: failed after epoch {epoch}, as above; training goes on", file=sys.stderr)
        self.wait_for_everyone()
        return metrics

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
        # Losses that the next line of metrics is the mean of; those of the first process stand for all.
        pending = [{key: value.item() for key, value in losses.items()} for losses in self._pending]
        self.folder.save_last(self.step, self._all_tensors, {**self._state(), "pending": pending})

    def _state(self):
        """What resuming compares."""
        return {
            "samples": self.samples,
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
            "lr": self._lr,
        }

    def _all_tensors(self):
        tensors = {**self._weights(self.raw_model, "model"), **self._weights(self.ema.model, "ema")}
        moments = state_tensors(self.optimizer, self.named)
        return tensors | {f"optimizer.{name}": value for name, value in moments.items()}

    def resume(self):
        """Continue from checkpoints/last.safetensors of the run folder; drops metrics logged after it.

        Returns {heading: text}, what changed since. Raises ValueError where the options leave no step to train.
        """
        path, tensors, state = self.folder.load_last()
        self._check_rest(state)

        def part(prefix):
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        load_weights(self.raw_model, part("model."), str(path))
        load_weights(self.ema.model, part("ema."), str(path))
        load_state(self.optimizer.optimizer, self.named, part("optimizer."), path)
        self.folder.rewind(state["step"])
        self.step, self._lr = state["step"], state.get("lr", 0.0)
        self._pending = [to_tensors(losses, self.accelerator.device) for losses in state.get("pending", [])]
        self._unseen = self._left_unseen()
        self.batches.close()
        return self._changes(state)

    def _check_rest(self, state):
        step, total = state["step"], self.total_steps
        finished = step == total == state.get("total_steps", total)
        if step >= total and not finished:
            raise ValueError(
                f"epochs, max_steps, batch_size: got {total} steps with resume, allowed: more than the {step} done"
            )

    def _changes(self, state):
        """What a resumed run does otherwise than it began: {} or one line of the plan."""
        now, found = self._state(), []
        for key, what in {
            "samples": "training samples",
            "steps_per_epoch": "steps an epoch",
            "total_steps": "steps",
        }.items():
            if state.get(key, now[key]) != now[key]:
                found.append(f"{now[key]:,} {what}, {state[key]:,} before")
        if "lr" in state and 0 < self.step < self.total_steps:
            rate = self._learning_rate(self.step - 1)
            if not math.isclose(rate, state["lr"], rel_tol=1e-6, abs_tol=1e-12):
                found.append(f"so the learning rate jumps from {state['lr']:.3g} to {rate:.3g}")
        return {"changed": "; ".join(found)} if found else {}

    def wait_for_everyone(self):
        """Wait for the other processes; ConnectionError where one is gone."""
        try:
            self.accelerator.wait_for_everyone()
        except RuntimeError as error:
            if self._stop.number is not None:  # the first process heard it, too, and did not wait
                raise SystemExit(128 + self._stop.number) from error
            raise explain(error, self.accelerator, self.step, self.folder.path) from error

    def _exit_on_signal(self, number):
        self.save()
        if self.accelerator.is_main_process:
            name = StopSignals.name(number)
            print(f"\nstopped by {name} at step {self.step}; continue with resume={self.folder.path}")
        raise SystemExit(128 + number)
