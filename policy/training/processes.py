"""Several processes, devices and signals: what a run has to agree on with the machine."""

import os
import re
import signal

import torch
from accelerate import Accelerator

PRECISIONS = ("fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda")


def uses_cpu(device):
    """Whether accelerate must be told to use the CPU: as ``device`` says, or for several processes without CUDA.

    Left to itself it would not join these: each would train alone, in the same folder.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return device == "cpu" or (several and not torch.cuda.is_available())


def make_accelerator(precision, device):
    """accelerate's ``Accelerator``; raises ValueError for an unknown precision or device, or CUDA that is not there."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, allowed: {', '.join(PRECISIONS)}")
    if device not in DEVICES:
        raise ValueError(f"device: got {device!r}, allowed: {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch sees no CUDA device; allowed here: auto, cpu")
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=uses_cpu(device))


def explain(error, accelerator, step, run_dir):
    """``error``, or in its place one that says that another process is gone, if it means that."""
    several = accelerator.num_processes > 1
    if not several or not re.search("connection|peer|timed out|NCCL", str(error), re.I):
        return error
    return ConnectionError(
        f"process {accelerator.process_index} of {accelerator.num_processes}: another one is gone (step {step};"
        f" {error}); continue from the last checkpoint with resume={run_dir}"
    )


class StopSignals:
    """SIGTERM and SIGINT as a wish to stop after the step: ``with StopSignals(accelerator) as stop``.

    A second signal ends the process at once.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.number = None

    def __enter__(self):
        self._previous = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_error):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number, _frame):
        if self.number is not None:
            raise SystemExit(128 + number)
        self.number = number

    @staticmethod
    def name(number):
        """SIGTERM or SIGINT."""
        return signal.Signals(number).name

    def agreed(self, may_ask):
        """The signal that arrived, or None. Several processes ask each other, all of them when ``may_ask``."""
        if self.accelerator.num_processes == 1:
            return self.number
        if not may_ask:
            return None
        asked = torch.tensor(self.number or 0, device=self.accelerator.device)
        self.number = int(self.accelerator.gather(asked).max()) or None
        return self.number
