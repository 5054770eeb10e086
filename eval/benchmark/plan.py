"""What a run will do, said before it starts: parts, data, steps, memory."""

import numpy as np
import torch

from eval.shared.machine import free_memory
from policy.training.batches import make_batch, step_seed

PROBED = (2, 4)  # samples whose losses are computed to see what a step keeps for its gradients


def plan(benchmark, trainer, run_dir):
    """{heading: text} of the run that ``trainer`` is about to start."""
    config, options = benchmark.config, trainer.options
    epochs = trainer.total_steps / trainer.steps_per_epoch
    steps = f"{trainer.total_steps:,} of batch {trainer.batch_size} ({epochs:.3g} epochs), {options.precision}"
    if trainer.step:
        steps += f"; {trainer.step:,} done"
    return {
        "training": f"{config['model']['name']}, preset {config['preset']}, attention {config['attention']['name']}",
        "parameters": describe_model(benchmark.model),
        **benchmark.notes,
        "data": benchmark.describe_data(),
        "steps": steps,
        "device": f"{trainer.accelerator.device}, {trainer.accelerator.num_processes} process(es)",
        "memory": describe_memory(benchmark, trainer),
        "results": run_dir,
    }


def describe_model(model):
    """Parameter counts by part, in millions."""
    counts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    return ", ".join(f"{name} {n:.2f} M" for name, n in counts.items() if n)


def describe_memory(benchmark, trainer):
    """Memory that training needs beside the data, and how much is free."""
    device = trainer.accelerator.device
    needed, free = state_bytes(benchmark.model) + kept_bytes(benchmark, trainer), free_memory(device.type)
    text = f"about {_size(needed)} for weights, gradients, moments, EMA and a step"
    if free is None:
        return text
    return f"{text}, {_size(free)} free" + (": TOO LITTLE, try a smaller batch" if needed > free else "")


def _size(count):
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def state_bytes(model):
    """Bytes of weights and EMA, and of gradients and two moments of what is trained."""
    return sum(p.nbytes * (5 if p.requires_grad else 2) for p in model.parameters())


def kept_bytes(benchmark, trainer):
    """Bytes that the loss of a micro-batch of this process keeps for its gradients, from those of two small ones."""
    rows = trainer.batch_size // (trainer.options.gradient_accumulation * trainer.accelerator.num_processes)
    counts = [min(count, rows) for count in PROBED]
    few, more = (_kept(benchmark.model, trainer, count) for count in counts)
    return few + (rows - counts[0]) * (more - few) / max(counts[1] - counts[0], 1)


def _kept(model, trainer, count):
    """Bytes that the loss of ``count`` samples keeps beside the weights.

    The model is in evaluation mode: no dropout is drawn and no statistic moves.
    """
    device = trainer.accelerator.device
    batch = make_batch(trainer.train_data, np.arange(count), device, crops=(0, 0))
    drawn = model.randomness(count, torch.Generator().manual_seed(step_seed(0, 0)))
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    was_training = model.training
    model.eval()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), trainer.accelerator.autocast():
        losses = model(batch, {name: value.to(device) for name, value in drawn.items()})
    model.train(was_training)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del losses  # until here its graph held what was kept
    return sum(size for pointer, size in kept.items() if pointer not in weights)
