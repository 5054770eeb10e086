"""Models on the encoder of one camera: their configuration, and runs that stop and resume."""

import copy

import tiny
import torch

from policy.build import build_model
from policy.training.trainer import Trainer

FIBOTTENTION = {"name": "fibottention", "variant": "robot"}


def head_config(name, *, size, encoder=None, attention=FIBOTTENTION, depth=2, **model):
    """The configuration of the model ``name`` on a tiny ViT of images of ``size`` px."""
    return {
        "task": {"shape_meta": {"obs": {"image": {"type": "rgb", "shape": [3, size, size]}}}},
        "crop": None,
        "encoder": {**tiny.VIT, "depth": depth, **(encoder or {})},
        "attention": attention,
        "model": {"name": name, **model},
    }


def on_resnet(config, size=84):
    """``config`` on an encoder without tokens."""
    image = {"type": "rgb", "shape": [3, size, size]}
    return {**config, "encoder": {"name": "resnet18"}, "task": {"shape_meta": {"obs": {"image": image}}}}


def assert_resumes_exactly(config, data, folder, **training):
    """Train ``config`` on ``data`` in one go and in two; the weights are equal. Returns the trainer of the first."""

    def trainer(name):
        torch.manual_seed(0)
        (folder / name).mkdir(exist_ok=True)
        options = tiny.training_options(epochs=4, val_every=4, **training)
        model = build_model(config)
        return Trainer(model, data, data, options=options, config=config, run_dir=folder / name, device="cpu")

    whole = trainer("whole")
    whole.fit()
    trainer("parts").fit(stop_at=3)
    second = trainer("parts")
    second.resume()
    second.fit()
    for one, other in zip(whole.raw_model.parameters(), second.raw_model.parameters(), strict=True):
        assert torch.equal(one, other)
    return whole


def assert_compiles(model, batch, randomness, monkeypatch):
    """A step of ``model`` as ``compile_training`` prepares it goes through a compiler and gives the same loss."""
    graphs, whole_module = [], torch.nn.Module.compile

    def backend(graph, inputs):  # makes no code, which takes long
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda part, **options: whole_module(part, backend=backend, **options)
    )
    compiled = copy.deepcopy(model)
    compiled.compile_training()
    torch.testing.assert_close(compiled(batch, randomness)["loss"], model(batch, randomness)["loss"])
    assert graphs
