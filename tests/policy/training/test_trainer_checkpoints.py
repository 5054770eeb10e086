"""Which checkpoints a run keeps, and what signals and numbers that are not finite leave of it."""

import math
import os
import shutil
import signal

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from trained import assert_identical, everything, start

from policy import load_policy
from policy.checkpoint import load_checkpoint
from policy.training import run_folder
from policy.training.curves import read_metrics
from policy.training.optim import OPTIMIZERS
from policy.training.processes import SIGNALS
from policy.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("runs")


class Problem(nn.Module):
    """A model of one weight whose loss is ``losses[step]`` times it; what the trainer does is easy to follow."""

    def __init__(self, losses):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.losses, self.calls = losses, 0

    def randomness(self, count, generator):
        return {"noise": torch.rand(count, generator=generator)}

    def forward(self, batch, randomness):
        factor = self.losses[min(self.calls, len(self.losses) - 1)]
        self.calls += 1
        return {"loss": self.weight * factor}


class Numbers:
    """A data set of ``count`` numbers."""

    def __init__(self, count=8, hook=None):
        self.count, self.hook = count, hook

    def __len__(self):
        return self.count

    def batch(self, indices):
        if self.hook:
            self.hook()
        return {"x": np.asarray(indices, dtype=np.float32)}


def problem(run_dir, losses=(1.0,), *, count=8, hook=None, evaluate=None, val=None, **changes):
    options = tiny.training_options(**{"batch_size": 4, "epochs": 5, "warmup_steps": 0, **changes})
    run_dir.mkdir(parents=True, exist_ok=True)
    return Trainer(
        Problem(losses), Numbers(count, hook), val, options=options, config={"model": {"name": "none"}},
        run_dir=run_dir, evaluate=evaluate, device="cpu",
    )  # fmt: skip


# The best checkpoints ------------------------------------------------------------------------------------------------


def best(run_dir):
    """{step: score} of the kept best checkpoints, from their file names."""
    names = [file.stem for file in (run_dir / "checkpoints").glob("step=*.safetensors")]
    return {int(name.split("_")[0][5:]): float(name.rsplit("=")[-1]) for name in names}


SCORES = [0.3, 0.9, 0.5, 0.7, 0.9, 0.1]


def judge(model, epoch):
    return {"score_mean": SCORES[epoch - 1], "success_rate": 1 - SCORES[epoch - 1]}


@pytest.mark.parametrize(
    ("top_k", "kept"), [(0, {}), (1, {6: 0.9}), (2, {6: 0.9, 15: 0.9}), (3, {6: 0.9, 12: 0.7, 15: 0.9})]
)
def test_top_k(tmp_path, top_k, kept):
    """The highest scores stay, an earlier one before a later equal one."""

    def evaluate(model, epoch):
        seen[3 * epoch] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return judge(model, epoch)

    seen = {}
    run = start(tmp_path, evaluate=evaluate, epochs=6, top_k=top_k)
    run.fit()
    assert best(tmp_path) == kept and sorted(run.folder.scores.values()) == sorted(kept.values())
    for file in (tmp_path / "checkpoints").glob("step=*.safetensors"):
        policy = load_policy(file)
        step = int(file.stem[5:13])
        assert_identical(policy.state_dict(), seen[step])
        tensors, config, state = load_checkpoint(file)
        assert all(name.startswith("ema.") for name in tensors) and config == run.folder.config
        assert state == {"step": step, "score": kept[step]}
    assert (tmp_path / "checkpoints" / "last.safetensors").exists()


def test_score_names_the_metric(tmp_path):
    start(tmp_path, evaluate=judge, top_k=1, score="success_rate").fit(stop_at=9)
    assert best(tmp_path) == {3: 0.7}


@pytest.mark.parametrize("evaluate", [None, judge])
def test_the_lowest_loss_is_the_best(tmp_path, evaluate):
    """Held-out losses rank checkpoints where there is no simulator, and where there is one, if asked for."""
    start(tmp_path, evaluate=evaluate, epochs=6, lr=0.3, warmup_steps=0, top_k=2, score="val_loss").fit()
    losses = {line["step"]: line["val_loss"] for line in read_metrics(tmp_path) if "val_loss" in line}
    lowest = sorted(losses, key=losses.get)[:2]
    assert len(losses) == 6 and sorted(best(tmp_path)) == sorted(lowest)
    for file in (tmp_path / "checkpoints").glob("step=*.safetensors"):
        assert load_checkpoint(file)[2] == {"step": int(file.stem[5:13]), "score": losses[int(file.stem[5:13])]}


def test_top_k_goes_on_after_resume(tmp_path):
    start(tmp_path, evaluate=judge, epochs=6).fit(stop_at=9)
    assert best(tmp_path) == {6: 0.9, 9: 0.5}
    again = start(tmp_path, evaluate=judge, epochs=6)
    again.resume()
    again.fit(stop_at=12)
    assert best(tmp_path) == {6: 0.9, 12: 0.7}


def test_top_k_after_a_kill_between_checkpoints(tmp_path):
    """The best file of the last checkpoint was replaced by one that the resumed run does not reach again."""
    scores = {1: 0.5, 2: 0.6}

    def evaluate(model, epoch):
        return {"score_mean": scores[epoch]}

    run = start(tmp_path, evaluate=evaluate, top_k=1, epochs=6)
    run.fit(stop_at=3)
    shutil.copy(tmp_path / "checkpoints" / "last.safetensors", tmp_path / "copy")
    run.fit(stop_at=6)
    assert best(tmp_path) == {6: 0.6}
    shutil.copy(tmp_path / "copy", tmp_path / "checkpoints" / "last.safetensors")
    scores[2] = 0.4  # as another number of rollout episodes might give
    again = start(tmp_path, evaluate=evaluate, top_k=1, epochs=6)
    again.resume()
    again.fit(stop_at=6)
    assert best(tmp_path) == {6: 0.4}


# Trouble -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_the_run(tmp_path, bad):
    run = problem(tmp_path, [1.0] * 6 + [bad], log_every=4)
    with pytest.raises(FloatingPointError, match="loss: got (nan|inf) at step 8"):
        run.fit()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """A checkpoint falls due between the bad step and the next line of the log."""
    rollouts = []

    def evaluate(model, epoch):
        rollouts.append(epoch)
        return {"score_mean": 0.5}

    run = problem(tmp_path, [1.0] * 5 + [math.nan], log_every=1000, checkpoint_every=1, evaluate=evaluate)
    with pytest.raises(FloatingPointError, match="weights: got NaN or inf at step 6"):
        run.fit()
    assert rollouts == [1, 2]
    tensors, _, state = load_checkpoint(tmp_path / "checkpoints" / "last.safetensors")
    assert state["step"] == 4 and all(torch.isfinite(tensor).all() for tensor in tensors.values())
    with pytest.raises(FloatingPointError, match="weights"):
        run.save()


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_saves_and_exits(tmp_path, capsys, number):
    """In the middle of a step; the run then goes on as if nothing had happened."""
    straight = start(tmp_path / "straight", images=True)
    straight.fit()
    run = start(tmp_path / "run", images=True)
    batch_of, handlers = run.train_data.batch, signal.getsignal(number)

    def batch(indices):
        if run.step == 4:
            os.kill(os.getpid(), number)
        return batch_of(indices)

    run.train_data.batch = batch
    with pytest.raises(SystemExit) as stop:
        run.fit()
    assert stop.value.code == 128 + number and signal.getsignal(number) is handlers
    assert f"stopped by {number.name} at step 5; continue with resume={tmp_path / 'run'}" in capsys.readouterr().out
    again = start(tmp_path / "run", images=True, fresh=1)
    again.resume()
    assert again.step == 5
    again.fit()
    assert_identical(everything(again), everything(straight))


class Killed(BaseException):
    """As little comes after it as after SIGKILL."""


def comparable(run_dir):
    return [{k: v for k, v in line.items() if k != "steps_per_second"} for line in read_metrics(run_dir)]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_rollout_at_once(tmp_path, number):
    """What was trained is saved before; the resumed run judges it, and then ends as if nothing had happened."""

    def stopped(model, epoch):
        if epoch == 2:
            os.kill(os.getpid(), number)
            pytest.fail("still there")
        return judge(model, epoch)

    start(tmp_path / "straight", evaluate=judge, log_every=2).fit()
    run = start(tmp_path / "run", evaluate=stopped, log_every=2)
    with pytest.raises(SystemExit) as stop:
        run.fit()
    assert stop.value.code == 128 + number and best(tmp_path / "run") == {3: 0.3}
    again = start(tmp_path / "run", evaluate=judge, log_every=2, fresh=1)
    again.resume()
    assert again.step == 6
    again.fit()
    assert comparable(tmp_path / "run") == comparable(tmp_path / "straight")
    assert best(tmp_path / "run") == best(tmp_path / "straight")


@pytest.mark.parametrize("dies", ["evaluate", "keep_best", "log"])
def test_a_kill_while_it_looks_loses_nothing(tmp_path, monkeypatch, dies):
    """Between saving and the line of metrics, wherever; the resumed run looks again."""
    start(tmp_path / "straight", evaluate=judge).fit()
    run = start(tmp_path / "run", evaluate=judge)
    owner = run if dies != "keep_best" else run.folder
    original = getattr(owner, dies)

    def kill(*arguments, **options):
        if run.step == 6 and (dies != "log" or "score_mean" in arguments[0]):
            raise Killed
        return original(*arguments, **options)

    monkeypatch.setattr(owner, dies, kill)
    with pytest.raises(Killed):
        run.fit()
    again = start(tmp_path / "run", evaluate=judge, fresh=1)
    again.resume()
    again.fit()
    assert comparable(tmp_path / "run") == comparable(tmp_path / "straight")
    assert best(tmp_path / "run") == best(tmp_path / "straight")


def test_a_rollout_that_fails_does_not_end_the_run(tmp_path, capsys):
    def evaluate(model, epoch):
        if epoch in (2, 4):
            raise RuntimeError("no display")
        return judge(model, epoch)

    run = start(tmp_path, evaluate=evaluate)
    run.fit()
    error = capsys.readouterr().err
    assert run.step == 12 and error.count("warning: evaluation: failed after epoch") == 2 and "no display" in error
    assert [line["step"] for line in read_metrics(tmp_path) if "score_mean" in line] == [3, 9]
    again = start(tmp_path, evaluate=judge)
    again.resume()
    again.fit()  # the last one is made up for
    assert [line["step"] for line in read_metrics(tmp_path) if "score_mean" in line] == [3, 9, 12]


# Resuming with other options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_every_optimizer_resumes(tmp_path, optimizer, momentum):
    options = {"optimizer": optimizer, "momentum": momentum}
    straight = start(tmp_path / "straight", **options)
    straight.fit()
    start(tmp_path / "run", **options).fit(stop_at=5)
    again = start(tmp_path / "run", fresh=1, **options)
    assert again.resume() == {}
    again.fit()
    assert_identical(everything(again), everything(straight))


@pytest.mark.parametrize("change", [{"max_steps": 5}, {"max_steps": 6}, {"epochs": 1}, {"batch_size": 15}])
def test_options_that_leave_nothing_to_train_are_refused(tmp_path, change):
    start(tmp_path, log_every=1).fit(stop_at=6)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="max_steps.*more than the 6 done"):
        start(tmp_path, **change).resume()
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_finished_run_may_be_resumed(tmp_path):
    start(tmp_path).fit()
    again = start(tmp_path)
    assert again.resume() == {}
    again.fit()
    assert again.step == 12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 8}, ["24 steps, 12 before", "learning rate jumps"]),
        ({"batch_size": 5}, []),
        ({"batch_size": 3}, ["5 steps an epoch, 3 before", "20 steps, 12 before", "learning rate jumps"]),
        ({"lr": 1.0}, ["learning rate jumps"]),
    ],
)
def test_what_changes_with_the_schedule_is_said(tmp_path, change, words):
    start(tmp_path).fit(stop_at=6)
    changed = start(tmp_path, **change).resume().get("changed", "")
    assert all(word in changed for word in words) and bool(changed) == bool(words)


# Signals ------------------------------------------------------------------------------------------------------------


def test_second_signal_does_not_wait(tmp_path):
    def hook():
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    run = problem(tmp_path, hook=hook)
    with pytest.raises(SystemExit) as stop:
        run.fit()
    assert stop.value.code == 143 and run.step == 3
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_draws_its_curves(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(run_folder, "plot_curves", drawn.append)
    start(tmp_path).fit(stop_at=6)
    assert drawn == [tmp_path, tmp_path]
