"""The trainer: exact resume, the optimizer step by hand, checkpoints, signals, and every ``training`` option."""

import copy
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from heads import assert_resumes_exactly
from paths import ROOT
from trained import assert_identical, everything, score_of, start

from policy.build import build_model
from policy.checkpoint import load_checkpoint
from policy.dataset import FrameDataset, epoch_order
from policy.training.batches import to_tensors
from policy.training.curves import read_metrics

TESTS = ROOT / "tests"
pytestmark = pytest.mark.usefixtures("runs")
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


@pytest.mark.slow
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


def gradients_of(run):
    """{parameter: gradient} of each step of the optimizer, filled in as ``run`` goes on."""
    gradients, step_of = {}, run.optimizer.step

    def step():
        gradients.update({name: p.grad.clone() for name, p in run.raw_model.named_parameters()})
        step_of()

    run.optimizer.step = step
    return gradients


def test_optimizer_and_average_by_hand(tmp_path):
    """AdamW (arXiv 1711.05101) with the schedule, and the moving average, from the gradients of each step."""
    optimizer = {"lr": 0.02, "weight_decay": 0.3, "betas": [0.8, 0.95], "eps": 1e-3, "warmup_steps": 3}
    run = start(tmp_path, **optimizer, ema={"power": 0.6, "max_decay": 0.7})
    value = {name: p.detach().double() for name, p in run.raw_model.named_parameters()}
    mean = {name: torch.zeros_like(p) for name, p in value.items()}
    square, average = copy.deepcopy(mean), copy.deepcopy(value)
    rates, gradients = [], gradients_of(run)
    for number in range(12):
        run.fit(stop_at=number + 1)
        lr = 0.02 * number / 3 if number < 3 else 0.02 * (1 + math.cos(math.pi * (number - 3) / 9)) / 2
        rates.append(lr)
        decay = min(0.7, 1 - (1 + number) ** -0.6)
        for name, p in run.raw_model.named_parameters():
            gradient = gradients[name].double()
            mean[name] = 0.8 * mean[name] + 0.2 * gradient
            square[name] = 0.95 * square[name] + 0.05 * gradient**2
            unbiased = mean[name] / (1 - 0.8 ** (number + 1))
            spread = (square[name] / (1 - 0.95 ** (number + 1))).sqrt() + 1e-3
            value[name] = value[name] * (1 - lr * 0.3) - lr * unbiased / spread
            average[name] = decay * average[name] + (1 - decay) * value[name]
            torch.testing.assert_close(p.detach().double(), value[name], rtol=0, atol=1e-5)
        for name, p in run.ema.model.named_parameters():
            torch.testing.assert_close(p.double(), average[name], rtol=0, atol=1e-5)
    assert [line["lr"] for line in read_metrics(tmp_path) if "lr" in line] == pytest.approx(rates)


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


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_gradients_are_those_of_the_whole_batch(tmp_path, accumulation):
    """One step's gradient equals that of the loss of the same windows, noise and crops, taken at once."""
    run = start(tmp_path, images=True, gradient_accumulation=accumulation, lr=0.0)
    model = copy.deepcopy(run.raw_model)
    drawn, gradients, crops, randomness = {}, gradients_of(run), seen_crops(run), run.raw_model.randomness

    def remember_randomness(count, generator):
        assert count == 4
        drawn.update(randomness(count, generator))
        return drawn

    run.raw_model.randomness = remember_randomness
    run.fit(stop_at=1)
    indices = epoch_order(15, seed=0, epoch=0)[:4]
    batch = run.train_data.batch(indices)
    position = torch.stack([crops[0, frame] for frame in batch.pop("frame_id").tolist()])
    assert ((position >= 0) & (position < 1)).all() and len(set(position.flatten().tolist())) > 4
    loss = model({**to_tensors(batch, "cpu"), "crop": position}, drawn)["loss"]
    loss.backward()
    assert read_metrics(tmp_path)[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6)


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
    config["task"]["shape_meta"]["keypoint"] = {"type": "low_dim", "shape": [6]}
    config["encoder"]["out_dim"] = 6
    buffer = tiny.replay_buffer()
    buffer.arrays["keypoint"] = np.random.default_rng(0).uniform(-1, 1, (31, 6)).astype(np.float32)
    frames = FrameDataset(buffer, obs_keys=["image"], target_key="keypoint", frames=range(31))
    assert_resumes_exactly(config, frames, tmp_path)
    lines = read_metrics(tmp_path / "whole")
    losses = [line["train_loss"] for line in lines if "train_px" in line]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) and {"val_loss", "val_px"} <= set(lines[-1])


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
    batches.clear()
    run.validation.max_batches = 1
    run.validation.losses()
    assert len(batches) == 1


def test_looking_does_not_change_training(tmp_path):
    """Validation, rollouts, logging and checkpoints leave the weights as they would be without."""

    def evaluate(model, epoch):
        torch.manual_seed(epoch), torch.rand(epoch)
        return score_of(model, epoch)

    plain = start(tmp_path / "a", images=True, val=False, log_every=1000, attention={"attn_drop": 0.5})
    busy = start(tmp_path / "b", images=True, evaluate=evaluate, checkpoint_every=1, attention={"attn_drop": 0.5})
    plain.fit(), busy.fit()
    assert_identical(everything(plain), everything(busy))
