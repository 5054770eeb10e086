"""What a run leaves on disk: metrics.jsonl, curves.png, pictures and checkpoints (``last`` and the best few)."""

import json

from policy.checkpoint import LAST, load_checkpoint, save_checkpoint
from policy.files import write_whole
from policy.training.curves import plot_curves, read_metrics
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

    def save_last(self, step, tensors, state):
        """Write checkpoints/last.safetensors from ``tensors()`` unless it is of this step already."""
        if self.writes and self._last_save != step:
            save_checkpoint(self.checkpoints / LAST, tensors(), config=self.config, state={"step": step, **state})
            self._last_save = step

    def keep_best(self, step, metric, values, tensors, *, count):
        """Write ``tensors()`` if ``values[metric]`` is among the ``count`` best so far, and drop what no longer is.

        Of a metric called loss the lowest are the best, of others the highest.
        """
        if not self.writes or count < 1:
            return
        score = values[metric]
        name = f"step={step:08d}_{metric}={score:.4f}.safetensors"
        sign = 1 if metric.endswith("loss") else -1
        ranked = sorted({**self.scores, name: score}.items(), key=lambda item: sign * item[1])
        keep = dict(ranked[:count])
        if name in keep:
            state = {"step": step, "score": score}
            save_checkpoint(self.checkpoints / name, tensors(), config=self.config, state=state)
        self.scores = keep
        for file in self.checkpoints.glob("step=*.safetensors"):
            if file.name not in keep:
                file.unlink()

    def load_last(self):
        """(path, tensors, state) of checkpoints/last.safetensors."""
        path = self.checkpoints / LAST
        tensors, _, state = load_checkpoint(path)
        return path, tensors, state

    def rewind(self, step):
        """Go on from the last checkpoint, of ``step``: drop what was logged after it, find the best ones up to it."""
        for file in sorted(self.checkpoints.glob("step=*.safetensors")):
            best = load_checkpoint(file, prefix="none")[2]
            # A run killed after its last checkpoint may have replaced some of the best ones since.
            if best["step"] <= step and "score" in best:
                self.scores[file.name] = best["score"]
        metrics = self.path / "metrics.jsonl"
        if self.writes and metrics.exists():
            lines = [line for line in metrics.read_text().splitlines(keepends=True) if _before(line, step)]
            write_whole(metrics, "".join(lines))
        self._last_save = step

    def looked_at(self, step, *, judged, validated):
        """Whether metrics.jsonl holds what an evaluation (``judged``) and a validation found at ``step``."""
        lines = [line for line in read_metrics(self.path) if line["step"] == step and not {"lr", "round"} & set(line)]
        found = {key for line in lines for key in line} - {"step", "epoch"}
        losses = {key for key in found if key.startswith("val_")}
        return (not judged or found > losses) and (not validated or bool(losses))


def _before(line, step):
    """Whether a line of metrics.jsonl belongs to the first ``step`` steps; a torn last line does not."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError):
        return False
