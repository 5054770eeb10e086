"""A tiny policy in the hands of the trainer, and all numbers that a run ends with."""

import tiny
import torch

from policy.build import build_model
from policy.training.trainer import Trainer


def start(run_dir, *, fresh=0, evaluate=None, val=True, device="cpu", prepare=None, **changes):
    """A trainer of a tiny policy; ``fresh`` seeds its initial weights, ``prepare`` may alter the model."""
    parts = {key: changes.pop(key) for key in ("encoder", "attention", "model") if key in changes}
    config = tiny.policy_config(images=changes.pop("images", False), relative=changes.pop("relative", False), **parts)
    buffer = tiny.replay_buffer(images=bool(config["crop"]))
    torch.manual_seed(fresh)
    model = build_model(config)
    train_data = tiny.window_data(config, buffer, episodes=[0, 1])  # 15 windows
    model.fit_normalizer(train_data)
    if prepare:
        prepare(model)
    run_dir.mkdir(parents=True, exist_ok=True)
    options = tiny.training_options(**{"epochs": 4, "batch_size": 4, **changes})
    val_data = tiny.window_data(config, buffer, episodes=[2]) if val else None  # 7 windows
    return Trainer(
        model, train_data, val_data, options=options, config=config, run_dir=run_dir, evaluate=evaluate, device=device
    )


def weights(trained):
    """All weights in one row."""
    return torch.cat([p.detach().flatten() for p in trained.raw_model.parameters()])


def score_of(model, epoch):
    """A number that depends on all weights and nothing else."""
    return {"score_mean": float(sum(p.double().abs().sum() for p in model.parameters())) % 1, "success_rate": 0.0}


def everything(trained):
    """All numbers that a run ends with, by name."""
    tensors = {f"model.{name}": tensor for name, tensor in trained.raw_model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in trained.ema.model.state_dict().items()}
    for name, parameter in trained.named:
        tensors |= {f"{key}.{name}": value for key, value in trained.optimizer.state[parameter].items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_identical(first, second):
    assert set(first) == set(second)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different
