"""The trainer: exact resume, the optimizer step by hand, checkpoints, signals, and every ``training`` option."""

import copy
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from paths import ROOT
from torch import nn
from trained import assert_identical, everything, start

from policy import load_policy
from policy.build import build_model
from policy.checkpoint import load_checkpoint
from policy.dataset import FrameDataset, epoch_order
from policy.training import run_folder
from policy.training.batches import to_tensors
from policy.training.curves import read_metrics
from policy.training.optim import cosine_schedule
from policy.training.processes import uses_cpu
from policy.training.trainer import Trainer

TESTS = ROOT / "tests"
CASES = {  # what a run uses: arguments of ``start``
    "low-dim": {},
    "crop, dropout, accumulation": {
        "images": True,
        "encoder": {"drop_path": 0.3, "depth": 2},
        "attention": {"attn_drop": 0.2},
        "gradient_accumulation": 2,
    },
    "grouped, clipped, relative": {"relative": True, "windows_per_group": 3, "gradient_clip": 0.1},
    "bf16": {"precision": "bf16"},
}


@pytest.fixture(autouse=True)
def own_accelerator():
    """accelerate keeps the precision of the first trainer of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing is slow; the test of the curves calls it itself."""
    monkeypatch.setattr(run_folder, "plot_curves", lambda run_dir: None)


def weights(trained):
    return torch.cat([p.detach().flatten() for p in trained.raw_model.parameters()])


def score_of(model, epoch):
    """A number that depends on all weights and nothing else."""
    return {"score_mean": float(sum(p.double().abs().sum() for p in model.parameters())) % 1, "success_rate": 0.0}


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


# Resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact(tmp_path, case):
    """Twelve steps at once equal five, a fresh start from other weights, and seven more, bit for bit."""
    straight = start(tmp_path / "straight", evaluate=score_of, **CASES[case])
    straight.fit()
    assert straight.step == 12
    first = start(tmp_path / "parts", evaluate=score_of, **CASES[case])
    first.fit(stop_at=5)  # the middle of the second epoch
    second = start(tmp_path / "parts", fresh=99, evaluate=score_of, **CASES[case])
    torch.rand(7), np.random.rand(3)  # noqa: NPY002 (whatever the global generators are at)
    second.resume()
    assert second.step == 5
    second.fit()
    assert_identical(everything(second), everything(straight))
    assert second.folder.scores == straight.folder.scores and len(second.folder.scores) == 2
    assert not torch.equal(everything(straight)["model.denoiser.out.1.weight"], first.raw_model.denoiser.out[1].weight)
    lines = [read_metrics(tmp_path / name) for name in ("straight", "parts")]
    for one, other in zip(*lines, strict=True):
        one.pop("steps_per_second", None), other.pop("steps_per_second", None)
        assert one == other


def second_half(run_dir):
    """Run by the next test in a process of its own."""
    trained = start(Path(run_dir), fresh=5, **CASES["crop, dropout, accumulation"])
    trained.resume()
    trained.fit()


def test_resume_in_another_process_is_exact(tmp_path):
    straight = start(tmp_path / "straight", **CASES["crop, dropout, accumulation"])
    straight.fit()
    start(tmp_path / "parts", **CASES["crop, dropout, accumulation"]).fit(stop_at=5)
    code = f"import conftest, test_trainer; test_trainer.second_half({str(tmp_path / 'parts')!r})"
    path = os.pathsep.join([str(TESTS), str(Path(__file__).parent), str(ROOT)])
    # The same number of threads: it decides how a sum is cut, and so its last bit.
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    one, _, state = load_checkpoint(tmp_path / "straight" / "checkpoints" / "last.safetensors")
    other, _, again = load_checkpoint(tmp_path / "parts" / "checkpoints" / "last.safetensors")
    assert_identical(one, other)
    assert state == again and state["step"] == 12


def test_resume_drops_what_was_logged_later(tmp_path):
    """After a kill: lines beyond the checkpoint and a torn last line go, each step is logged once in the end."""
    run = start(tmp_path)
    run.fit(stop_at=6)
    last = tmp_path / "checkpoints" / "last.safetensors"
    shutil.copy(last, tmp_path / "copy")
    run.fit(stop_at=9)
    shutil.copy(tmp_path / "copy", last)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5}\n{"other": 1}\n{"step": 10, "train_lo')
    again = start(tmp_path, fresh=1)
    again.resume()
    assert [line["step"] for line in read_metrics(tmp_path) if "lr" in line] == [1, 2, 3, 4, 5, 6]
    again.fit()
    assert [line["step"] for line in read_metrics(tmp_path) if "lr" in line] == list(range(1, 13))


def test_resume_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="last.safetensors"):
        start(tmp_path).resume()
    start(tmp_path).fit(stop_at=2)
    with pytest.raises(ValueError, match="does not fit this configuration: .*denoiser"):
        denoiser = {"widths": [8, 24], "kernel_size": 3, "groups": 4, "step_dim": 8}
        start(tmp_path, model={"denoiser": denoiser}).resume()


def test_resume_of_a_finished_run_changes_nothing_and_may_go_further(tmp_path):
    run = start(tmp_path, epochs=1)
    run.fit()
    again = start(tmp_path, fresh=1, epochs=1)
    again.resume()
    again.fit()
    assert_identical(everything(run), everything(again))
    longer = start(tmp_path, fresh=1, epochs=2)
    longer.resume()
    longer.fit()
    assert longer.step == 6


def test_frozen_parameters_stay_and_resume(tmp_path):
    def freeze(model):
        model.encoder.encoders.requires_grad_(False)

    run = start(tmp_path, images=True, prepare=freeze)
    before = copy.deepcopy(run.raw_model.encoder.state_dict())
    run.fit(stop_at=4)
    assert not any(name.startswith("encoder.") for name, _ in run.named)
    again = start(tmp_path, images=True, prepare=freeze, fresh=3)
    again.resume()
    again.fit()
    for model in (run.raw_model, again.raw_model, again.ema.model):
        assert_identical(model.encoder.state_dict(), before)


# One step --------------------------------------------------------------------------------------------------------


def test_optimizer_and_average_by_hand(tmp_path):
    """AdamW (arXiv 1711.05101) with the schedule, and the moving average, from the gradients of each step."""
    run = start(tmp_path, lr=0.02, weight_decay=0.3, betas=[0.8, 0.95], eps=1e-3, warmup_steps=3, ema={"power": 0.6, "max_decay": 0.7})  # fmt: skip  # noqa: E501
    value = {name: p.detach().double() for name, p in run.raw_model.named_parameters()}
    mean = {name: torch.zeros_like(p) for name, p in value.items()}
    square, average = copy.deepcopy(mean), copy.deepcopy(value)
    gradients, step_of = {}, run.optimizer.step

    def step():
        gradients.update({name: p.grad.double() for name, p in run.raw_model.named_parameters()})
        step_of()

    run.optimizer.step = step
    for number in range(12):
        run.fit(stop_at=number + 1)
        lr = 0.02 * number / 3 if number < 3 else 0.02 * (1 + math.cos(math.pi * (number - 3) / 9)) / 2
        decay = min(0.7, 1 - (1 + number) ** -0.6)
        for name, p in run.raw_model.named_parameters():
            mean[name] = 0.8 * mean[name] + 0.2 * gradients[name]
            square[name] = 0.95 * square[name] + 0.05 * gradients[name] ** 2
            unbiased = mean[name] / (1 - 0.8 ** (number + 1))
            spread = (square[name] / (1 - 0.95 ** (number + 1))).sqrt() + 1e-3
            value[name] = value[name] * (1 - lr * 0.3) - lr * unbiased / spread
            average[name] = decay * average[name] + (1 - decay) * value[name]
            torch.testing.assert_close(p.detach().double(), value[name], rtol=0, atol=1e-5)
        for name, p in run.ema.model.named_parameters():
            torch.testing.assert_close(p.double(), average[name], rtol=0, atol=1e-5)


def seen_crops(run):
    """{(step, frame): crop position} of all that the model is trained on, filled in as ``run`` goes on."""
    crops, parts = {}, []

    def remember(model, arguments):
        indices, own = run.batches.rows(run.step)
        number = sum(step == run.step for step in parts)
        parts.append(run.step)
        frames = run.train_data.batch(indices[own[number]])["frame_id"].tolist()
        for frame, place in zip(frames, arguments[0]["crop"], strict=True):
            assert torch.equal(crops.setdefault((run.step, frame), place), place)  # also in another micro-batch

    run.raw_model.register_forward_pre_hook(remember)
    return crops


def test_gradients_are_those_of_the_whole_batch(tmp_path):
    """One step's gradient equals that of the loss of the same windows, noise and crops, taken at once."""
    run = start(tmp_path, images=True, gradient_accumulation=2, lr=0.0)
    model = copy.deepcopy(run.raw_model)
    drawn, gradients = {}, {}
    randomness, step_of, crops = run.raw_model.randomness, run.optimizer.step, seen_crops(run)

    def remember_randomness(count, generator):
        assert count == 4
        drawn.update(randomness(count, generator))
        return drawn

    def step():
        gradients.update({name: p.grad.clone() for name, p in run.raw_model.named_parameters()})
        step_of()

    run.raw_model.randomness, run.optimizer.step = remember_randomness, step
    run.fit(stop_at=1)
    indices = epoch_order(15, seed=0, epoch=0)[:4]
    batch = run.train_data.batch(indices)
    position = torch.stack([crops[0, frame] for frame in batch.pop("frame_id").tolist()])
    assert ((position >= 0) & (position < 1)).all() and len(set(position.flatten().tolist())) > 4
    model({**to_tensors(batch, "cpu"), "crop": position}, drawn)["loss"].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6)


def test_accumulation_changes_nothing_but_memory(tmp_path):
    """Random crops included, because they belong to frames, not to batches."""
    runs = []
    for number in (1, 2, 4):
        # A large eps, so that Adam does not blow up rounding where a gradient is zero.
        runs.append(start(tmp_path / str(number), images=True, gradient_accumulation=number, eps=1e-3))
        runs[-1].fit(stop_at=6)
    for run in runs[1:]:
        torch.testing.assert_close(weights(run), weights(runs[0]), rtol=0, atol=2e-5)
    one, two = (read_metrics(tmp_path / name) for name in ("1", "2"))
    for a, b in zip(one, two, strict=True):
        if "train_loss" in a:
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)


def test_gradient_clipping(tmp_path):
    """The first moment after one step is (1 - beta) times the gradient: scaled down to the norm asked for."""
    runs = {clip: start(tmp_path / str(clip), gradient_clip=clip) for clip in (None, 0.01, 1e6)}
    moments = {}
    for clip, run in runs.items():
        run.fit(stop_at=1)
        moments[clip] = torch.cat([run.optimizer.state[p]["exp_avg"].flatten() for p in run.trained]) / 0.05
    assert moments[None].norm() > 0.1
    assert moments[0.01].norm() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(moments[0.01] / 0.01, moments[None] / moments[None].norm(), rtol=1e-3, atol=1e-6)
    assert torch.equal(moments[1e6], moments[None])


def test_learning_rate_follows_the_schedule(tmp_path):
    start(tmp_path, lr=0.5, warmup_steps=4).fit()
    rates = [line["lr"] for line in read_metrics(tmp_path) if "lr" in line]
    assert rates == pytest.approx([0.5 * cosine_schedule(step, total=12, warmup=4) for step in range(12)])


def test_epochs_see_every_window_in_another_order(tmp_path):
    run, seen = start(tmp_path, batch_size=5, val=False), []
    batch_of = run.train_data.batch
    run.train_data.batch = lambda indices: seen.append(list(indices)) or batch_of(indices)
    run.fit()
    assert run.steps_per_epoch == 3 and len(seen) == 12
    epochs = [sum(seen[3 * epoch : 3 * epoch + 3], []) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(15)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_crops_belong_to_seed_step_and_frame(tmp_path):
    """Another place for every frame and every step, the same again for the same seed, all places alike."""

    def crops(name, **changes):
        run = start(tmp_path / name, images=True, val=False, epochs=12, **changes)
        places = seen_crops(run)
        run.fit()
        return {key: tuple(place.tolist()) for key, place in places.items()}

    first = crops("a", gradient_accumulation=2)
    assert crops("b") == first
    other = crops("c", seed=1)
    assert len(first) > 200 and len(set(first.values())) > 0.99 * len(first)
    assert not set(first.values()) & set(other.values())
    places = np.array(list(first.values()))
    for axis in (0, 1):  # five places of a corner: each a fifth, within four standard deviations
        share = np.bincount((places[:, axis] * 5).astype(int), minlength=5) / len(places)
        assert np.abs(share - 0.2).max() < 4 * math.sqrt(0.2 * 0.8 / len(places))
    assert abs(np.corrcoef(places.T)[0, 1]) < 4 / math.sqrt(len(places))


def test_training_learns(tmp_path):
    start(tmp_path, batch_size=15, epochs=60, val=False, lr=5e-3).fit()
    losses = [line["train_loss"] for line in read_metrics(tmp_path)]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])


def test_keypoint_regression_trains_and_resumes(tmp_path):
    """Single frames without crops and noise: the other kind of model and data set."""
    config = tiny.policy_config(images=True, crop=None)
    config["model"] = {"name": "keypoints", "px_per_unit": 256}
    config["task"]["shape_meta"]["keypoint"] = {"type": "low_dim", "shape": [5]}
    config["encoder"] = {**config["encoder"], "out_dim": 6}
    config["task"]["shape_meta"]["keypoint"]["shape"] = [6]
    buffer = tiny.replay_buffer()
    buffer.arrays["keypoint"] = np.random.default_rng(0).uniform(-1, 1, (31, 6)).astype(np.float32)
    frames = FrameDataset(buffer, obs_keys=["image"], target_key="keypoint", frames=range(24))
    held_out = FrameDataset(buffer, obs_keys=["image"], target_key="keypoint", frames=range(24, 31))

    def begin(seed):
        torch.manual_seed(seed)
        options = tiny.training_options(epochs=10)
        return Trainer(build_model(config), frames, held_out, options=options, config=config, run_dir=tmp_path, device="cpu")  # fmt: skip  # noqa: E501

    run = begin(0)
    run.fit()
    lines = [line for line in read_metrics(tmp_path) if "train_px" in line]
    assert np.mean([line["train_loss"] for line in lines[-5:]]) < np.mean([line["train_loss"] for line in lines[:5]])
    assert {"val_loss", "val_px"} <= set(read_metrics(tmp_path)[-1])
    again = begin(1)
    again.resume()
    assert_identical(everything(run), everything(again))


# Validation --------------------------------------------------------------------------------------------------------


def test_validation_by_hand(tmp_path):
    """The averaged weights on centre crops of all held-out windows, in evaluation mode, with fixed noise."""
    run = start(tmp_path, **CASES["crop, dropout, accumulation"], max_val_batches=None)
    run.fit(stop_at=4)
    batches, drawn = [], []
    forward, randomness = run.ema.model.forward, run.ema.model.randomness

    def remember(batch, random):
        batches.append(batch)
        return forward(batch, random)

    def remember_randomness(count, generator):
        drawn.append(randomness(count, generator))
        return drawn[-1]

    run.ema.model.forward, run.ema.model.randomness = remember, remember_randomness
    first = run.validation.losses()
    assert [len(batch["action"]) for batch in batches] == [4, 3]
    assert not any("crop" in batch for batch in batches) and not run.ema.model.training
    assert not torch.equal(drawn[0]["noise"][:3], drawn[1]["noise"])
    model = build_model(run.folder.config)
    model.load_state_dict(run.ema.model.state_dict())
    model.eval()
    total = 0.0
    for window in range(7):
        batch = to_tensors(run.validation.data.batch(np.array([window])), "cpu")
        random = {key: value[window % 4 : window % 4 + 1] for key, value in drawn[window // 4].items()}
        total += model(batch, random)["loss"].item() / 7
    assert set(first) == {"val_loss", "val_diffusion"}
    assert first["val_loss"] == pytest.approx(total, rel=1e-4)
    assert run.validation.losses() == first
    with torch.no_grad():  # the weights in training do not matter, the averaged ones do
        for p in run.raw_model.parameters():
            p.add_(1.0)
    assert run.validation.losses() == first
    run.step += 100
    assert run.validation.losses() == first
    with torch.no_grad():
        run.ema.model.denoiser.out[1].bias.add_(1.0)
    assert run.validation.losses() != first


def test_max_val_batches(tmp_path):
    run = start(tmp_path, max_val_batches=1)
    sizes = []
    batch_of = run.validation.data.batch
    run.validation.data.batch = lambda indices: sizes.append(len(indices)) or batch_of(indices)
    run.validation.losses()
    assert sizes == [4]


def test_looking_does_not_change_training(tmp_path):
    """Validation, rollouts, logging and checkpoints leave the weights as they would be without."""

    def evaluate(model, epoch):
        torch.manual_seed(epoch), torch.rand(epoch)
        return score_of(model, epoch)

    plain = start(tmp_path / "a", images=True, val=False, log_every=1000, attention={"attn_drop": 0.5})
    busy = start(tmp_path / "b", images=True, evaluate=evaluate, checkpoint_every=1, attention={"attn_drop": 0.5})
    plain.fit(), busy.fit()
    assert_identical(everything(plain), everything(busy))


# Options -----------------------------------------------------------------------------------------------------------


def test_no_option_is_forgotten_here():
    """The tests below go through the options of tiny.TRAINING one by one; the command line has the same ones."""
    config = OmegaConf.load(ROOT / "config" / "base" / "run.yaml")
    assert set(config.training) == set(tiny.TRAINING) and set(config.training.ema) == set(tiny.TRAINING["ema"])


@pytest.fixture(scope="module")
def default_weights(tmp_path_factory):
    """After six steps with the default options, twice the same."""
    runs = [start(tmp_path_factory.mktemp("run")) for _ in range(2)]
    runs[0].fit(stop_at=6), runs[1].fit(stop_at=6)
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    AcceleratorState._reset_state(reset_partial_state=True)
    return weights(runs[0])


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"lr": 2e-2},
        {"min_lr": 5e-3},
        {"optimizer": "sgd"},
        {"schedule": "steps"},
        {"betas": [0.8, 0.999]},
        {"betas": [0.95, 0.9]},
        {"eps": 1e-2},
        {"weight_decay": 0.5},
        {"warmup_steps": 4},
        {"epochs": 5},
        {"max_steps": 8},
        {"batch_size": 5},
        {"gradient_clip": 0.01},
        {"windows_per_group": 4},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_option_changes_the_weights(tmp_path, default_weights, change):
    """After six steps; the length of the run matters through the schedule."""
    changed = start(tmp_path, **change)
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
    """log_every in steps; val_every and rollout_every in epochs, and at the end; max_steps cuts the run."""
    epochs = []

    def evaluate(model, epoch):
        epochs.append(epoch)
        return score_of(model, epoch)

    run = start(tmp_path, evaluate=evaluate, epochs=6, max_steps=16, log_every=4, val_every=2, rollout_every=3)
    run.fit()
    lines = read_metrics(tmp_path)
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


def test_checkpoint_every(tmp_path, monkeypatch):
    saved = []
    save = run_folder.save_checkpoint

    def remember(path, *arguments, **options):
        saved.append(options["state"]["step"])
        save(path, *arguments, **options)

    monkeypatch.setattr(run_folder, "save_checkpoint", remember)
    start(tmp_path, checkpoint_every=3, epochs=7).fit()
    assert saved == [9, 18, 21]


def test_the_tracker_gets_every_line(tmp_path):
    run, lines = start(tmp_path), []
    run.tracker = lines.append
    run.fit()
    assert lines == read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6, "gradient_accumulation": 4}, "batch_size: got 6, allowed: a multiple of 4"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 32, "gradient_accumulation": 16}, "training windows: got 15, allowed: at least 16"),
        ({"epochs": 0}, "epochs, max_steps: got 0, None, allowed: at least 1 step"),
        ({"max_steps": 0}, "epochs, max_steps: got 4, 0"),
        ({"precision": "fp16"}, "precision: got 'fp16', allowed: fp32, bf16"),
        ({"betas": [0.9, 1.0]}, r"betas: got \[0.9, 1.0\], allowed: two numbers from 0 to below 1"),
        ({"betas": [0.9]}, r"betas: got \[0.9\]"),
        *(
            ({key: 0}, f"training.{key}: got 0, allowed: >= 1")
            for key in tiny.TRAINING
            if key.endswith("_every") or key in ("gradient_accumulation", "windows_per_group")
        ),
        ({"device": "tpu"}, "device: got 'tpu', allowed: auto, cpu, cuda"),
    ],
)
def test_impossible_options(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        start(tmp_path, **changes)


def test_cuda_is_refused_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: got 'cuda', but torch sees no CUDA device; allowed here: auto, cpu"):
        start(tmp_path, device="cuda")


def test_a_small_data_set_is_one_batch(tmp_path):
    run = start(tmp_path, batch_size=64, gradient_accumulation=2)
    assert run.batch_size == 14 and run.steps_per_epoch == 1
    run.fit(stop_at=1)


# The best checkpoints ------------------------------------------------------------------------------------------------


def best(run_dir):
    """{step: score} of the kept best checkpoints, from their file names."""
    names = [file.stem for file in (run_dir / "checkpoints").glob("step=*.safetensors")]
    return {int(name.split("_")[0][5:]): float(name.split("score=")[1]) for name in names}


SCORES = [0.3, 0.9, 0.5, 0.7, 0.9, 0.1]


@pytest.mark.parametrize(
    ("top_k", "kept"), [(0, {}), (1, {6: 0.9}), (2, {6: 0.9, 15: 0.9}), (3, {6: 0.9, 12: 0.7, 15: 0.9})]
)
def test_top_k(tmp_path, top_k, kept):
    """The highest scores stay, an earlier one before a later equal one."""

    def evaluate(model, epoch):
        seen[3 * epoch] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        return {"score_mean": SCORES[epoch - 1], "success_rate": 1 - SCORES[epoch - 1]}

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
    def evaluate(model, epoch):
        return {"score_mean": SCORES[epoch - 1], "success_rate": 1 - SCORES[epoch - 1]}

    start(tmp_path / "a", evaluate=evaluate, top_k=1, score="success_rate").fit(stop_at=9)
    assert best(tmp_path / "a") == {3: 0.7}
    with pytest.raises(ValueError, match="training.score: got 'success', allowed: score_mean, success_rate"):
        start(tmp_path / "b", evaluate=evaluate, score="success").fit()


def test_top_k_goes_on_after_resume(tmp_path):
    def evaluate(model, epoch):
        return {"score_mean": SCORES[epoch - 1]}

    start(tmp_path, evaluate=evaluate, epochs=6).fit(stop_at=9)
    assert best(tmp_path) == {6: 0.9, 9: 0.5}
    again = start(tmp_path, evaluate=evaluate, epochs=6)
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
    with pytest.raises(FloatingPointError, match="loss: got (nan|inf) at step 8; the last checkpoint is untouched"):
        run.fit()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """A checkpoint falls due between the bad step and the next line of the log."""
    rollouts = []

    def evaluate(model, epoch):
        rollouts.append(epoch)
        return {"score_mean": 0.5}

    run = problem(tmp_path, [1.0] * 5 + [math.nan], log_every=1000, checkpoint_every=1, evaluate=evaluate)
    with pytest.raises(FloatingPointError, match="weights: got NaN or inf at step 6; the last checkpoint is untouched"):
        run.fit()
    assert rollouts == [1, 2]
    tensors, _, state = load_checkpoint(tmp_path / "checkpoints" / "last.safetensors")
    assert state["step"] == 4 and all(torch.isfinite(tensor).all() for tensor in tensors.values())
    with pytest.raises(FloatingPointError, match="weights: got NaN or inf"):
        run.save()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_exits(tmp_path, capsys, number, code):
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
    assert stop.value.code == code and signal.getsignal(number) is handlers
    assert f"stopped by {number.name} at step 5; continue with resume={tmp_path / 'run'}" in capsys.readouterr().out
    again = start(tmp_path / "run", images=True, fresh=1)
    again.resume()
    assert again.step == 5
    again.fit()
    assert_identical(everything(again), everything(straight))


def test_signal_during_a_rollout_saves_after_it(tmp_path):
    def evaluate(model, epoch):
        if epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"score_mean": epoch / 10}

    run = start(tmp_path, evaluate=evaluate)
    with pytest.raises(SystemExit) as stop:
        run.fit()
    assert stop.value.code == 143 and best(tmp_path) == {3: 0.1, 6: 0.2}
    _, _, state = load_checkpoint(tmp_path / "checkpoints" / "last.safetensors")
    assert state["step"] == 6 and sorted(state["scores"].values()) == [0.1, 0.2]
    assert read_metrics(tmp_path)[-1]["score_mean"] == 0.2


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


@pytest.mark.parametrize(
    ("device", "processes", "cuda", "expected"),
    [("cpu", 1, True, True), ("auto", 1, False, False), ("auto", 2, False, True), ("auto", 2, True, False)],
)
def test_several_processes_without_cuda_are_told_to_meet_on_the_cpu(monkeypatch, device, processes, cuda, expected):
    """accelerate would otherwise let each of them train alone, in the same folder."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert uses_cpu(device) == expected
