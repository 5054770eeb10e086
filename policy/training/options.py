"""Checks of the ``training`` section, before a folder is made or anything is computed."""

import math

from policy.registry import choose
from policy.training.optim import OPTIMIZERS, SCHEDULES
from policy.training.processes import PRECISIONS

COUNTS = (
    *("epochs", "max_steps", "batch_size", "gradient_accumulation", "windows_per_group"),
    *("log_every", "val_every", "max_val_batches", "rollout_every", "checkpoint_every"),
)
RULES = (  # keys, what is allowed, in words; null is left to check_types, which knows where it stands
    (COUNTS, lambda value: value >= 1, ">= 1"),
    (("gamma", "eps", "gradient_clip"), lambda value: 0 < value < math.inf, "above 0"),
    (
        ("seed", "lr", "min_lr", "weight_decay", "warmup_steps", "warmup_epochs", "top_k", "ema.power"),
        lambda value: 0 <= value < math.inf,
        ">= 0",
    ),
    (("momentum", "ema.max_decay"), lambda value: 0 <= value < 1, "0 to below 1"),
    (("layer_decay",), lambda value: 0 < value <= 1, "above 0, up to 1, or null"),
)
CHOICES = {"optimizer": OPTIMIZERS, "schedule": SCHEDULES, "precision": PRECISIONS}


def check_training(options):
    """Raise ValueError, by name, for a value of the ``training`` section that cannot be meant."""
    for key, allowed in CHOICES.items():
        choose(f"training.{key}", options[key], allowed)
    for keys, holds, allowed in RULES:
        for key in keys:
            section, _, name = key.rpartition(".")
            value = (options[section] if section else options)[name]
            if value is not None and not holds(value):
                raise ValueError(f"training.{key}: got {value}, allowed: {allowed}")
    betas = list(options.betas)
    if len(betas) != 2 or not (0 <= betas[0] < 1 and 0 < betas[1] < 1):
        raise ValueError(f"training.betas: got {betas}, allowed: two numbers below 1, of at least 0 and above 0")
    if options.min_lr > options.lr:
        raise ValueError(f"training.min_lr: got {options.min_lr}, allowed: 0 to lr {options.lr}")
    if list(options.milestones) != sorted(set(options.milestones)) or min(options.milestones, default=1) <= 0:
        raise ValueError(f"training.milestones: got {list(options.milestones)}, allowed: increasing epochs above 0")
