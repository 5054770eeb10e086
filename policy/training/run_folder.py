"""What a run leaves on disk: metrics.jsonl, curves.png, pictures and checkpoints (``last`` and the best few)."""

import json

from policy.checkpoint import LAST, load_checkpoint, save_checkpoint
from policy.files import write_whole
from policy.training.curves import plot_curves
from policy.training.pictures import write_reconstructions


class RunFolder:
    """Files of the run at ``path``; config: the whole configuration, stored with every checkpoint.

    writes: whether this process writes at all; of several only the first does. scores: {file name: score} of the best
    checkpoints that are kept.
    """

    def __init__(self, path, config, *, writes):
        self.path, self.config, self.writes = path, config, writes
        self.checkpoints = path / "checkpoints"
        self.scores = {}
        self._last_save = None

    def log(self, line):
        """Add the dictionary ``line`` to metrics.jsonl."""
        if self.writes:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def plot(self):
        """Draw curves.png from metrics.jsonl."""
        if self.writes:
            plot_curves(self.path)

    def save_reconstructions(self, epoch, pairs):
        """A picture of ``pairs`` {camera: (observed, reconstructed)}; returns its path, None where none was written."""
        if not self.writes or not pairs:
            return None
        path = self.path / "reconstructions" / f"epoch_{epoch:04d}.png"
        write_reconstructions(path, pairs)
        return path

    def save_last(self, step, tensors):
        """Write checkpoints/last.safetensors from ``tensors()`` unless it is of this step already."""
        if self.writes and self._last_save != step:
            state = {"step": step, "scores": self.scores}
            save_checkpoint(self.checkpoints / LAST, tensors(), config=self.config, state=state)
            self._last_save = step

    def keep_best(self, step, score, tensors, *, count):
        """Write ``tensors()`` if ``score`` is among the ``count`` best so far, and drop what no longer is."""
        if not self.writes or count < 1:
            return
        name = f"step={step:08d}_score={score:.4f}.safetensors"
        ranked = sorted([*self.scores.items(), (name, score)], key=lambda item: -item[1])
        keep = dict(ranked[:count])
        if name in keep:
            state = {"step": step, "score": score}
            save_checkpoint(self.checkpoints / name, tensors(), config=self.config, state=state)
        self.scores = keep
        for file in self.checkpoints.glob("step=*.safetensors"):
            if file.name not in keep:
                file.unlink()

    def load_last(self):
        """(path, tensors, state) of checkpoints/last.safetensors; drops what was logged after it."""
        path = self.checkpoints / LAST
        tensors, _, state = load_checkpoint(path)
        # A run killed after that checkpoint may have replaced some of the best ones since.
        self.scores = {name: score for name, score in state["scores"].items() if (path.parent / name).exists()}
        metrics = self.path / "metrics.jsonl"
        if self.writes and metrics.exists():
            lines = [line for line in metrics.read_text().splitlines(keepends=True) if _before(line, state["step"])]
            write_whole(metrics, "".join(lines))
        return path, tensors, state


def _before(line, step):
    """Whether a line of metrics.jsonl belongs to the first ``step`` steps; a torn last line does not."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError):
        return False
