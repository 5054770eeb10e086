"""Schedules against torch's own, layer-wise groups against timm's, and what an optimizer remembers."""

import math

import pytest
import tiny
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from policy.training.optim import (
    OPTIMIZERS,
    build_optimizer,
    cosine_schedule,
    learning_rate,
    load_state,
    parameter_groups,
    state_tensors,
)


@pytest.mark.parametrize(("total", "warmup"), [(100, 10), (7, 0), (5, 5), (3, 10), (1, 0)])
def test_cosine_schedule(total, warmup):
    for step in range(total):
        expected = step / warmup if step < warmup else math.cos(math.pi / 2 * (step - warmup) / (total - warmup)) ** 2
        assert cosine_schedule(step, total=total, warmup=warmup) == pytest.approx(expected, abs=1e-12)


def rates(total, steps_per_epoch=5, **changes):
    options = tiny.training_options(**changes)
    return [learning_rate(step, options, total=total, steps_per_epoch=steps_per_epoch) for step in range(total)]


def test_steps_are_those_of_torch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[10, 20], gamma=0.2)
    expected = []
    for _ in range(25):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step(), schedule.step()
    options = {"schedule": "steps", "milestones": [2, 4], "gamma": 0.2, "lr": 0.3, "warmup_steps": 0}
    assert rates(25, **options) == pytest.approx(expected)


def test_warm_up_and_floor():
    steps = rates(20, schedule="steps", milestones=[3], lr=1.0, warmup_steps=4)
    assert steps == pytest.approx([0, 0.25, 0.5, 0.75] + [1.0] * 11 + [0.1] * 5)
    cosine = rates(20, lr=1.0, min_lr=0.2, warmup_steps=0)
    assert cosine[0] == 1.0 and cosine[10] == pytest.approx(0.6) and cosine[19] == pytest.approx(0.2, abs=0.01)
    assert rates(21, lr=1.0, min_lr=0.2, warmup_steps=5)[0] == 0
    assert rates(40, warmup_epochs=3, warmup_steps=1) == rates(40, warmup_steps=15)


class TimmViT(nn.Module):
    """A timm ViT as our models present themselves, so that both ways of grouping see the same parameters."""

    def __init__(self):
        super().__init__()
        sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 3, "num_heads": 2, "num_classes": 3}
        self.vit = VisionTransformer(**sizes)
        self.num_layers = 4

    def layer_of(self, name):
        if name.startswith("vit.blocks."):
            return int(name.split(".")[2]) + 1
        return 0 if name.startswith(("vit.patch_embed", "vit.cls_token", "vit.pos_embed")) else 4


def test_layer_decay_is_that_of_timm():
    model = TimmViT()
    options = tiny.training_options(layer_decay=0.6, weight_decay=0.05)
    skipped = {"pos_embed", "cls_token"}
    theirs = param_groups_layer_decay(model.vit, weight_decay=0.05, no_weight_decay_list=skipped, layer_decay=0.6)

    def by_parameter(groups):
        return {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}

    ours, expected = by_parameter(parameter_groups(model, options)), by_parameter(theirs)
    assert set(ours) == set(expected) == {id(p) for p in model.parameters()}
    final_norm = {id(p) for p in model.vit.norm.parameters()}  # timm's last block has it; MAE's authors' head
    for key, (scale, decay) in expected.items():
        assert ours[key] == pytest.approx((1.0, 0.0) if key in final_norm else (scale, decay))


def test_models_without_layers_have_one_group_and_refuse_layer_decay():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    (group,) = parameter_groups(model, tiny.training_options())
    assert [id(p) for p in group["params"]] == [id(model.weight)] and group["weight_decay"] == 1e-2
    with pytest.raises(ValueError, match="layer_decay: got 0.5, allowed: null"):
        parameter_groups(model, tiny.training_options(layer_decay=0.5))


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_memory_of_an_optimizer_round_trip(name, momentum):
    """Three steps, a copy through tensors, two more steps: as five in a row."""

    def train(model, optimizer, steps):
        for step in steps:
            x = torch.linspace(-1, 1, 6).reshape(3, 2) + step
            model(x).square().mean().backward()
            optimizer.step(), optimizer.zero_grad()

    def fresh():
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        return model, build_optimizer(model, tiny.training_options(optimizer=name, momentum=momentum))

    model, optimizer = fresh()
    train(model, optimizer, range(5))
    first, remembering = fresh()
    train(first, remembering, range(3))
    tensors = state_tensors(remembering, list(first.named_parameters()))
    second, going_on = fresh()
    second.load_state_dict(first.state_dict())
    named = list(second.named_parameters())
    load_state(going_on, named, tensors, "here")
    train(second, going_on, range(3, 5))
    assert torch.equal(model.weight, second.weight)
    for key, tensor in tensors.items():
        wrong = [torch.full_like(tensor, math.nan), torch.full_like(tensor, -math.inf), tensor.int(), tensor[..., None]]
        for bad in wrong:
            with pytest.raises(ValueError, match=f"here: {key}: got"):
                load_state(going_on, named, {**tensors, key: bad}, "here")
        with pytest.raises(ValueError, match=f"here: got no optimizer state for '{key.partition('.')[2]}'"):
            load_state(going_on, named, {k: v for k, v in tensors.items() if k != key}, "here")
