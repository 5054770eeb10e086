"""Training on several processes (torchrun, gloo): the same run as on one, and nothing lost when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from paths import ROOT

from policy import load_policy
from policy.build import build_model
from policy.checkpoint import load_checkpoint
from policy.training.trainer import Trainer

pytestmark = pytest.mark.slow

DECODER = {**tiny.DECODER, "name": "b"}
STEPS = 12


def train(run_dir, *, stop_at=None, resume=False, die_at=None, pause=0.0, seconds=None):
    """A run of a tiny Crossway policy with crops and accumulation; what ``torchrun`` below and the tests both call."""
    config = tiny.policy_config(images=True, model={"decoder": DECODER, "timesteps_per_sample": 2})
    buffer = tiny.replay_buffer()
    torch.manual_seed(3)
    model = build_model(config)
    data = tiny.window_data(config, buffer)
    model.fit_normalizer(data)
    # A bias before a normalisation has no gradient but rounding errors; a large eps keeps Adam from blowing them up.
    options = tiny.training_options(
        epochs=100, max_steps=STEPS, batch_size=8, gradient_accumulation=2, gradient_clip=1.0, log_every=2, eps=1e-3
    )
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model, data, data, options=options, config=config, run_dir=run_dir, device="cpu", evaluate=score)
    if resume:
        trainer.resume()
    original = trainer._train_step

    def step():
        if die_at is not None and trainer.step == die_at and trainer.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(pause)
        original()
        if pause and trainer.accelerator.is_main_process:
            (run_dir / "step").write_text(str(trainer.step))

    trainer._train_step = step
    trainer.fit(stop_at=stop_at)
    return trainer


def score(model, epoch):
    return {"score_mean": 1 / (1 + epoch), "success_rate": 0.0}


def torchrun(run_dir, *, processes=2, **options):
    """The started ``train(run_dir, **options)`` on so many processes."""
    code = (
        "import sys; sys.path[:0] = ['.', 'tests', 'tests/policy/training']\n"
        "import conftest, test_processes\n"
        "from eval.shared.command import command\n"  # as train.py ends
        f"command(test_processes.train)({str(run_dir)!r}, **{options!r})\n"
    )
    script = Path(run_dir).with_suffix(".py")
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(code)
    arguments = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(script)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    output, _ = process.communicate(timeout=240)
    assert (process.returncode == 0) == (code == 0), output[-4000:]
    return output


def tensors_of(run_dir):
    return load_checkpoint(Path(run_dir) / "checkpoints" / "last.safetensors")[0]


def assert_close(first, second):
    assert set(first) == set(second)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=2e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The whole run on one process."""
    folder = tmp_path_factory.mktemp("single") / "run"
    train(folder)
    return folder


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train_loss"] for line in lines if "train_loss" in line}


def test_two_processes_train_as_one(single, tmp_path):
    finish(torchrun(tmp_path / "two"))
    assert_close(tensors_of(tmp_path / "two"), tensors_of(single))
    ours, theirs = losses(tmp_path / "two"), losses(single)
    assert list(ours) == list(theirs) == list(range(2, STEPS + 1, 2))  # written by one process only
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-4)
    names = sorted(file.name for file in (single / "checkpoints").iterdir())
    assert sorted(file.name for file in (tmp_path / "two" / "checkpoints").iterdir()) == names
    assert not list((tmp_path / "two").rglob("*.partial"))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_resume_with_another_number_of_processes(single, tmp_path, before, after):
    run = tmp_path / "run"
    for count, options in ((before, {"stop_at": STEPS // 2}), (after, {"resume": True})):
        if count == 1:
            train(run, **options)
        else:
            finish(torchrun(run, processes=count, **options))
    assert_close(tensors_of(run), tensors_of(single))
    assert list(losses(run)) == list(range(2, STEPS + 1, 2))


def test_a_killed_process_stops_the_others_with_the_cause(single, tmp_path):
    run = tmp_path / "run"
    train(run, stop_at=4)
    output = finish(torchrun(run, resume=True, die_at=7), code=1)
    assert "error: process 0 of 2: another one is gone (step 7" in output, output[-3000:]
    assert "Signal 9 (SIGKILL)" in output  # torchrun's own word on the first to go
    tensors, _, state = load_checkpoint(run / "checkpoints" / "last.safetensors")
    assert state["step"] == 6 and tensors  # saved before the last evaluation
    assert load_policy(run) is not None
    train(run, resume=True)
    assert_close(tensors_of(run), tensors_of(single))


def test_a_signal_stops_all_processes_at_one_step(single, tmp_path):
    run = tmp_path / "run"
    process = torchrun(run, pause=0.3)
    deadline = time.monotonic() + 120
    while not (run / "step").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output = finish(process, code=1)
    _, _, state = load_checkpoint(run / "checkpoints" / "last.safetensors")
    assert 0 < state["step"] < STEPS and state["step"] % 2 == 0  # agreed on when they logged
    assert f"stopped by SIGTERM at step {state['step']}" in output, output[-3000:]
    train(run, resume=True)
    assert_close(tensors_of(run), tensors_of(single))


def test_the_door_trains_a_language_model_on_two_processes(tmp_path):
    """One folder, one summary, the losses of one process."""
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 60)
    small = ["model.dim=16", "model.depth=1", "model.num_heads=2", "context=16", "contexts=[0]", "stride=16",
             "training.max_steps=4", "training.log_every=1", f"text={text}"]  # fmt: skip
    for processes in (1, 2):
        output = f"output={tmp_path}/{processes}"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "train.py"]
        command = [sys.executable, *launcher, "--config-dir=config/language", *small, output]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("bits a byte") == 1 and done.stdout.count("parameters") == 1
    assert (tmp_path / "2" / "summary.json").exists()
    one, two = (losses(tmp_path / str(processes)) for processes in (1, 2))
    assert one.keys() == two.keys() and np.allclose(list(one.values()), list(two.values()), rtol=1e-4)
