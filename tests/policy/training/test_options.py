"""Values of the training section that cannot be meant are refused by name, wherever they come from."""

import math

import pytest
import tiny
from door import door

from policy.training.options import COUNTS, RULES, check_training

WRONG = {
    "optimizer": ["lamb", 3],
    "schedule": ["linear"],
    "precision": ["fp16"],
    "betas": [[0.9], [0.9, 1.0], [0.0, 0.0], [-0.1, 0.9], [math.nan, 0.9]],
    "milestones": [[3, 2], [0, 2], [2, 2]],
    **{key: [0, -1] for key in (*COUNTS, "gamma", "eps", "gradient_clip")},
    **{key: [-1, math.nan, math.inf] for key in ("lr", "weight_decay", "warmup_epochs", "min_lr", "ema.power")},
    "min_lr": [1.0, -1],
    "momentum": [1.0, -0.1],
    "ema.max_decay": [1.0, -0.5],
    "layer_decay": [0.0, 1.5],
    "seed": [-1],
    "top_k": [-1],
}


def options(key, value):
    section, _, name = key.rpartition(".")
    changed = {section: {**tiny.TRAINING[section], name: value}} if section else {name: value}
    return tiny.training_options(**changed)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"training.{key}: got"):
        check_training(options(key, value))


def test_every_number_is_checked():
    """A new option needs a rule, or one of the checks for lists and names."""
    ruled = {key for keys, *_ in RULES for key in keys} | {"optimizer", "schedule", "precision", "betas", "milestones"}
    flat = {key for key in tiny.TRAINING if key != "ema"} | {f"ema.{key}" for key in tiny.TRAINING["ema"]}
    assert flat - ruled == {"compile", "score"}


@pytest.mark.parametrize("change", ["training.lr=-1", "training.gradient_clip=0", "training.batch_size=0",
                                    "rollout.episodes=-1", "rollout.num_envs=0", "training.score=top1",
                                    "wandb.mode=on"])  # fmt: skip
def test_before_a_folder_is_made(tmp_path, capsys, change):
    with pytest.raises(SystemExit):
        door("pusht", change, f"output={tmp_path}/run")
    error = capsys.readouterr().err
    assert error.startswith(f"error: {change.split('=')[0]}: got") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
