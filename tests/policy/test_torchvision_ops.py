"""The torchvision beside a CPU-only torch."""

import builtins

import pytest

from policy.torchvision_ops import declare_missing_operators


def test_declaring_torchvision_operators(monkeypatch):
    """Nothing to do where torchvision loads or is absent; an error of another kind is not swallowed."""
    assert declare_missing_operators() is None
    real = builtins.__import__

    def failing(error):
        def load(name, *args, **kwargs):
            if name == "torchvision":
                raise error
            return real(name, *args, **kwargs)

        return load

    monkeypatch.setattr(builtins, "__import__", failing(ImportError("no torchvision")))
    assert declare_missing_operators() is None
    monkeypatch.setattr(builtins, "__import__", failing(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        declare_missing_operators()
