"""Several processes, devices and signals: what a run has to agree on with the machine."""

import contextlib
import os
import re
import signal
import sys

import torch
from accelerate import Accelerator

PRECISIONS = ("fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda")
# What shells, schedulers and closed terminals send before they kill.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


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


@contextlib.contextmanager
def exit_on_signals():
    """Signals that would kill end the block by SystemExit, so that what it holds is put in order; Ctrl-C as ever."""
    heard = [s for s in SIGNALS if s != signal.SIGINT and signal.getsignal(s) == signal.SIG_DFL]
    before = {s: signal.signal(s, lambda number, _frame: sys.exit(128 + number)) for s in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopped(BaseException):
    """A signal arrived where nothing is lost by stopping at once."""


class StopSignals:
    """Signals as a wish to stop after the step: ``with StopSignals(accelerator) as stop``; ``number`` is the one seen.

    A second signal ends the process at once. SIGHUP stays ignored where it is, as under nohup.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.number, self._at_once = None, False

    def __enter__(self):
        heard = [s for s in SIGNALS if not (s == signal.SIGHUP and signal.getsignal(s) == signal.SIG_IGN)]
        self._previous = {s: signal.signal(s, self._request) for s in heard}
        return self

    def __exit__(self, *_error):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number, _frame):
        if self.number is not None:
            raise SystemExit(128 + number)
        self.number = number
        if self._at_once:
            raise Stopped

    @contextlib.contextmanager
    def at_once(self):
        """What runs in here is left by ``Stopped`` as soon as a signal arrives, or if one is there already."""
        if self.number is not None:
            raise Stopped
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    @staticmethod
    def name(number):
        """SIGTERM, say."""
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
