"""Every ``training`` option changes what it says; impossible ones are refused by name."""

import numpy as np
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from paths import ROOT
from trained import everything, score_of, start, weights

from policy.training.curves import read_metrics
from policy.training.processes import uses_cpu

pytestmark = pytest.mark.usefixtures("runs")


def test_no_option_is_forgotten_here():
    """The tests below go through the options of tiny.TRAINING one by one; the command line has the same ones."""
    config = OmegaConf.load(ROOT / "config" / "base" / "run.yaml")
    assert set(config.training) == set(tiny.TRAINING) and set(config.training.ema) == set(tiny.TRAINING["ema"])


@pytest.fixture(scope="module")
def default_weights(tmp_path_factory):
    """After six steps with the default options, twice the same."""
    runs = [start(tmp_path_factory.mktemp("run"), val=False) for _ in range(2)]
    runs[0].fit(stop_at=6), runs[1].fit(stop_at=6)
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    AcceleratorState._reset_state(reset_partial_state=True)
    return weights(runs[0])


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"lr": 2e-2}, {"min_lr": 5e-3}, {"optimizer": "sgd"}, {"schedule": "steps"}, {"betas": [0.8, 0.999]},
     {"betas": [0.95, 0.9]}, {"eps": 1e-2}, {"weight_decay": 0.5}, {"warmup_steps": 4}, {"epochs": 5}, {"max_steps": 8},
     {"batch_size": 5}, {"gradient_clip": 0.01}, {"windows_per_group": 4}, {"precision": "bf16"}],
    ids=str,
)  # fmt: skip
def test_option_changes_the_weights(tmp_path, default_weights, change):
    """After six steps; the length of the run matters through the schedule."""
    changed = start(tmp_path, val=False, **change)
    changed.fit(stop_at=6)
    assert (weights(changed) - default_weights).abs().max() > 1e-6


@pytest.mark.parametrize("ema", [{"power": 0.5, "max_decay": 0.9999}, {"power": 0.75, "max_decay": 0.5}])
def test_ema_options_change_the_average_alone(tmp_path, ema):
    base, changed = start(tmp_path / "a"), start(tmp_path / "b", ema=ema)
    base.fit(stop_at=6), changed.fit(stop_at=6)
    assert torch.equal(weights(base), weights(changed))
    averages = [torch.cat([p.flatten() for p in run.ema.model.parameters()]) for run in (base, changed)]
    assert (averages[0] - averages[1]).abs().max() > 1e-5


def test_bf16_computes_in_bf16_and_keeps_fp32(tmp_path):
    run, seen = start(tmp_path, precision="bf16"), []
    run.raw_model.denoiser.down[0][0].first[0].register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    run.fit(stop_at=1)
    assert seen == [torch.bfloat16]
    assert {tensor.dtype for tensor in everything(run).values()} == {torch.float32}


def test_intervals(tmp_path):
    """log_every in steps, the others in epochs and at the end; max_steps cuts the run; the tracker gets every line."""
    epochs = []

    def evaluate(model, epoch):
        epochs.append(epoch)
        return score_of(model, epoch)

    intervals = {"log_every": 4, "val_every": 2, "rollout_every": 3, "checkpoint_every": 2}
    run, tracked, saved = start(tmp_path, evaluate=evaluate, epochs=6, max_steps=16, **intervals), [], []
    run.tracker, save = tracked.append, run.save
    run.save = lambda: saved.append(run.step) or save()
    run.fit()
    lines = read_metrics(tmp_path)
    assert tracked == lines and saved == [6, 9, 12, 16, 16]
    assert run.step == 16 and run.steps_per_epoch == 3
    assert [line["step"] for line in lines if "train_loss" in line] == [4, 8, 12, 16]
    assert [line["step"] for line in lines if "val_loss" in line] == [6, 12, 16]
    assert epochs == [3, 6] and [line["step"] for line in lines if "score_mean" in line] == [9, 16]
    assert all(line["epoch"] == pytest.approx(line["step"] / 3) for line in lines)
    assert all(line["steps_per_second"] > 0 for line in lines if "train_loss" in line)


def test_training_loss_is_the_mean_since_the_last_line(tmp_path):
    start(tmp_path / "each").fit(stop_at=6)
    start(tmp_path / "third", log_every=3).fit(stop_at=6)
    each = [line["train_loss"] for line in read_metrics(tmp_path / "each") if "train_loss" in line]
    third = [line["train_loss"] for line in read_metrics(tmp_path / "third") if "train_loss" in line]
    assert third == pytest.approx([np.mean(each[:3]), np.mean(each[3:])])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6, "gradient_accumulation": 4}, "batch_size: got 6, allowed: a multiple of 4"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 32, "gradient_accumulation": 16}, "training windows"),
        ({"epochs": 0}, "training.epochs"),
        ({"max_steps": 0}, "training.max_steps"),
        ({"device": "tpu"}, "device: got 'tpu'"),
        ({"device": "cuda"}, "device: got 'cuda'"),  # where torch sees none
    ],
)
def test_impossible_options(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        start(tmp_path, **changes)


def test_a_small_data_set_is_one_batch(tmp_path):
    run = start(tmp_path, batch_size=64, gradient_accumulation=2)
    assert run.batch_size == 14 and run.steps_per_epoch == 1
    run.fit(stop_at=1)


@pytest.mark.parametrize(
    ("device", "processes", "cuda", "expected"),
    [("cpu", 1, True, True), ("auto", 1, False, False), ("auto", 2, False, True), ("auto", 2, True, False)],
)
def test_several_processes_without_cuda_are_told_to_meet_on_the_cpu(monkeypatch, device, processes, cuda, expected):
    """accelerate would otherwise let each of them train alone, in the same folder."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert uses_cpu(device) == expected
