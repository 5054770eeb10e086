"""Looking at a model on held-out data: mean losses, and pictures of what its decoder makes of them."""

import numpy as np
import torch

from policy.training.protocols import Reconstructing

VALIDATION_SEED = 1 << 40  # far from every training step
PICTURES = 64  # held-out windows that are reconstructed


class Validation:
    """The held-out side of a trainer: what ``model`` makes of ``data``, with noise that is the same every time.

    seed_of(number): the seed of a step; make_batch(data, indices): tensors without augmentation.
    """

    def __init__(self, model, data, *, batch_size, max_batches, accelerator, seed_of, make_batch):
        self.model, self.data, self.batch_size, self.max_batches = model, data, batch_size, max_batches
        self.accelerator, self._seed_of, self._make_batch = accelerator, seed_of, make_batch

    @torch.no_grad()
    def losses(self):
        """{"val_KEY": mean over the held-out windows}."""
        sums, count = {}, 0
        for number, start in enumerate(range(0, len(self.data), self.batch_size)):
            if number == self.max_batches:
                break
            indices = np.arange(start, min(start + self.batch_size, len(self.data)))
            batch, randomness = self._batch(number, indices)
            with self.accelerator.autocast():
                losses = self.model(batch, randomness)
            for key, value in losses.items():
                sums[key] = sums.get(key, 0.0) + value.item() * len(indices)
            count += len(indices)
        return {f"val_{key}": value / count for key, value in sums.items()}

    def reconstructions(self):
        """{camera: (observed, reconstructed)} of held-out windows; {} where the model decodes nothing."""
        if not isinstance(self.model, Reconstructing):
            return {}
        spread = np.linspace(0, len(self.data) - 1, min(PICTURES, len(self.data))).astype(int)
        with self.accelerator.autocast():
            return self.model.reconstruct(*self._batch(0, spread))

    def _batch(self, number, indices):
        generator = torch.Generator().manual_seed(self._seed_of(VALIDATION_SEED + number))
        drawn = self.model.randomness(len(indices), generator)
        randomness = {key: value.to(self.accelerator.device) for key, value in drawn.items()}
        return self._make_batch(self.data, indices), randomness
