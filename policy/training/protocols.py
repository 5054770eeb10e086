"""The contracts between the trainer, what it trains, what it trains on, and how the result is judged.

B rows of a batch, U observed frames of a batch (windows share them). Nothing here is inherited: a class keeps a
contract by having its methods. A part without the methods of an optional contract trains without what they give.
"""

from typing import Protocol, runtime_checkable


class Dataset(Protocol):
    """Samples by number."""

    def __len__(self): ...

    def batch(self, indices):
        """{key: array (B, ...)} of the samples ``indices``; with "frame_id" (U,), the trainer adds random crops."""


@runtime_checkable
class Streaming(Protocol):
    """Optional, of a data set: batches are prepared ahead, in other processes."""

    def stream(self, requests):
        """An iterator with ``close()`` over the batches of ``requests``, each a list of (index, seed)."""


class Model(Protocol):
    """A ``torch.nn.Module`` that computes its own loss."""

    def randomness(self, count, generator):
        """{name: tensor (count, ...)} on the CPU: all that the loss of ``count`` samples draws."""

    def forward(self, batch, randomness):
        """{"loss": scalar, ...parts} of a batch of tensors."""

    def compile_training(self):
        """torch.compile what a training step spends its time in."""


@runtime_checkable
class Policy(Protocol):
    """Optional, of a model: it acts. ``fit_normalizer`` takes the ranges of the training data before training."""

    def fit_normalizer(self, dataset): ...

    def sample(self, obs, *, generator=None, num_inference_steps=None):
        """obs {key: (B, To, ...)} in raw units -> action chunks (B, T, Da)."""

    def act(self, obs, **options):
        """The steps of a chunk that are executed, (B, Ta, Da)."""


@runtime_checkable
class Reconstructing(Protocol):
    """Optional, of a model: it can show what its decoder makes of a batch."""

    def reconstruct(self, batch, randomness):
        """{camera: (observed, reconstructed)}, each (B, To, 3, h, w) in [-1, 1]; {} where nothing is decoded."""


@runtime_checkable
class Layered(Protocol):
    """Optional, of a model: its parameters have a depth, for layer-wise learning rates."""

    num_layers: int

    def layer_of(self, name):
        """Layer of the parameter called ``name``, 0 at the input."""


class Benchmark(Protocol):
    """What is trained, on what, and how it is judged: one class a kind, in eval/benchmark."""

    config: dict  # resolved, with what only the data say; stored with every checkpoint
    notes: dict  # {heading: text}, more lines of the plan
    model: Model
    train_data: Dataset
    val_data: Dataset | None

    @staticmethod
    def metrics(config):
        """Names of the numbers that may rank checkpoints (``training.score``), the usual one first."""

    def evaluate(self, model, epoch):
        """{metric: number} of the EMA model, every ``training.rollout_every`` epochs; or the attribute is None."""

    def describe_data(self):
        """One line of the plan."""

    def prepare(self, device):
        """What only the weights allow, fresh or resumed: features of a frozen encoder, arrays on the device."""

    def fit(self, trainer):
        """Train to the end."""

    def finish(self, trainer):
        """Test, write what a finished run holds; returns {heading: text} for the last block on the screen."""
