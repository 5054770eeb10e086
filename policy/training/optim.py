"""Optimizers, learning-rate schedules and parameter groups that a configuration's ``training`` section names."""

import math

import torch

from policy.training.protocols import Layered

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "steps")


def cosine_schedule(step, *, total, warmup):
    """Factor of the learning rate: linear from 0 over ``warmup`` steps, then half a cosine to 0 at ``total``."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / max(total - warmup, 1), 1.0)))


def step_schedule(step, *, milestones, gamma, warmup):
    """Factor of the learning rate: linear from 0 over ``warmup`` steps, then times ``gamma`` at each milestone step."""
    if step < warmup:
        return step / warmup
    return gamma ** sum(step >= milestone for milestone in milestones)


def learning_rate(step, options, *, total, steps_per_epoch):
    """Learning rate of update ``step`` (from 0) of ``total``; milestones are in epochs."""
    warmup = options.warmup_steps
    if options.warmup_epochs is not None:
        warmup = round(options.warmup_epochs * steps_per_epoch)
    if options.schedule == "steps":
        milestones = [round(epoch * steps_per_epoch) for epoch in options.milestones]
        return options.lr * step_schedule(step, milestones=milestones, gamma=options.gamma, warmup=warmup)
    factor = cosine_schedule(step, total=total, warmup=warmup)
    floor = options.min_lr if step >= warmup else 0.0
    return floor + (options.lr - floor) * factor


def parameter_groups(model, options):
    """Groups for the optimizer, each with ``lr_scale``, of the parameters of ``model`` that are trained.

    A model with ``layer_of(name) -> depth from the input`` and ``num_layers`` gets layer-wise learning rates,
    ``layer_decay`` to the power of the layers above (arXiv 2111.06377, appendix A.1, after arXiv 2003.10555), and, as
    there, no weight decay of vectors, class token and position codes. All others get one group.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not isinstance(model, Layered):
        if options.layer_decay is not None:
            raise ValueError(f"training.layer_decay: got {options.layer_decay}, allowed: null for this model")
        return [{"params": [p for _, p in trained], "lr_scale": 1.0, "weight_decay": options.weight_decay}]
    decay, groups = options.layer_decay or 1.0, {}
    for name, parameter in trained:
        layer = model.layer_of(name)
        plain = parameter.ndim == 1 or name.endswith(("cls_token", "pos_embed", "time_embed"))
        group = {
            "lr_scale": decay ** (model.num_layers - layer),
            "weight_decay": 0.0 if plain else options.weight_decay,
        }
        groups.setdefault((layer, plain), {**group, "params": []})["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model, options):
    """The optimizer of ``options`` over the parameter groups of ``model``."""
    groups = parameter_groups(model, options)
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=options.lr, betas=tuple(options.betas), eps=options.eps, fused=True)


def state_tensors(optimizer, named):
    """{"KEY.NAME": tensor} of what ``optimizer`` remembers of the parameters ``named`` [(name, parameter)]."""
    return {
        f"{key}.{name}": value
        for name, parameter in named
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def load_state(optimizer, named, tensors, path):
    """Give ``optimizer`` back what ``state_tensors`` wrote.

    Raises ValueError, by name, for a parameter's part that is missing or not finite, or of another optimizer.
    """
    for name, parameter in named:
        values = {key: tensors.get(f"{key}.{name}") for key in _remembered(optimizer)}
        if any(value is None for value in values.values()):
            raise ValueError(f"{path}: got no optimizer state for {name!r}, allowed: the same trained parameters")
        for key, value in values.items():
            shape = () if key == "step" else parameter.shape
            if value.shape != shape or not value.is_floating_point() or not value.isfinite().all():
                raise ValueError(f"{path}: {key}.{name}: got a damaged tensor, allowed: finite numbers")
        # Laid out in memory as the parameter, which the fused optimizer relies on; a step count stays a scalar.
        optimizer.state[parameter] = {
            key: value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)
            for key, value in values.items()
        }


def _remembered(optimizer):
    """What ``optimizer`` (of torch, not accelerate's wrapper of it) keeps for each parameter."""
    if isinstance(optimizer, torch.optim.SGD):
        return ("momentum_buffer",) if optimizer.defaults["momentum"] else ()
    return ("step", "exp_avg", "exp_avg_sq")
