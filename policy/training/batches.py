"""Which samples a training step sees, in which order, in whose hands: a function of (seed, step) alone."""

import numpy as np
import torch

from policy.dataset import epoch_order
from policy.training.hashing import hashed_uniform
from policy.training.protocols import Streaming


def to_tensors(batch, device):
    """Nested dictionaries of numpy arrays or tensors to tensors on ``device``."""
    if isinstance(batch, dict):
        return {key: to_tensors(value, device) for key, value in batch.items()}
    return torch.as_tensor(batch).to(device, non_blocking=True)


def step_seed(seed, step):
    """The seed of a step's noise, crops and augmentation."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint32)[0])


class Batches:
    """Batches of ``data`` from step ``since`` on, cut for several processes and accumulated micro-batches.

    size: samples of a step over all of them; parts: micro-batches of a step over all processes, of which this process,
    number ``own`` of ``processes``, takes every ``processes``-th; group: neighbouring samples kept together;
    end: the step that training ends at, beyond which nothing is prepared.
    """

    def __init__(self, data, *, size, seed, group, parts, processes, own, device, since, end):
        self.data, self.size, self.seed, self.group = data, size, seed, group
        self.parts, self.processes, self.own = parts, processes, own
        self.device, self.since, self.end = device, since, end
        self._epoch = self._order = self._stream = None

    def rows(self, step):
        """Indices of the data in the batch of ``step``, and the rows of it in each of the own micro-batches."""
        epoch, position = divmod(step - self.since, len(self.data) // self.size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = epoch_order(len(self.data), seed=self.seed, epoch=epoch, group=self.group)
        indices = self._order[position * self.size : (position + 1) * self.size]
        parts = np.array_split(np.arange(len(indices)), self.parts)
        return indices, parts[self.own :: self.processes]

    def training_batch(self, step, indices):
        """The samples ``indices`` of ``step``, augmented; the next of the stream, where one prepares batches ahead."""
        if not isinstance(self.data, Streaming):
            return make_batch(self.data, indices, self.device, crops=(self.seed, step))
        if self._stream is None:
            self._stream = self.data.stream(self._requests(step))
        return to_tensors(next(self._stream), self.device)

    def _requests(self, step):
        """What this process trains on from ``step`` on: a list of (index, seed of its augmentation) a micro-batch."""
        for number in range(step, self.end):
            indices, own = self.rows(number)
            for rows in own:
                yield [(int(index), step_seed(self.seed, number)) for index in indices[rows]]

    def close(self):
        """End what prepares batches ahead, in processes of its own."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def make_batch(data, indices, device, crops=None):
    """Samples of ``data`` as tensors; with crops=(seed, step) each frame gets a random crop position."""
    arrays = data.batch(indices)
    frame_id = arrays.pop("frame_id", None)
    if crops is not None and frame_id is not None:
        arrays["crop"] = hashed_uniform(*crops, frame_id, columns=2)
    return to_tensors(arrays, device)
