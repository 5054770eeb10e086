"""What language model and translation share: tokens, the summary of a finished run."""

import json
import time

from policy.build import build_model
from policy.dataset.text.tokens import load_tokens
from policy.files import write_whole
from policy.training.curves import read_metrics


class SequenceBenchmark:
    """A model of tokens, judged once it is trained (``policy.training.protocols.Benchmark``).

    A subclass opens its data: ``open_data(tokens or None) -> (tokens, training, held-out)``, tests the trained model:
    ``test(model, device) -> summary``, and says it in a line: ``describe(summary)``.
    """

    evaluate = None

    @staticmethod
    def metrics(config):
        """Nothing but the held-out loss."""
        return ("val_loss",)

    def __init__(self, config, run_dir, *, resume=False):
        self.config, self.run_dir, self.started, self.notes = config, run_dir, time.monotonic(), {}
        self.resumed = resume
        learned = load_tokens(config["tokens"], run_dir) if resume else None
        self.tokens, self.train_data, self.val_data = self.open_data(learned)
        config["model"]["vocabulary"] = self.tokens.size
        self.model = build_model(config)

    def prepare(self, device):
        """Nothing."""

    def fit(self, trainer):
        """Train to the end; the tokens lie beside the weights from the start."""
        if trainer.accelerator.is_main_process and not self.resumed:
            self.tokens.save(self.run_dir)
        trainer.fit()

    def finish(self, trainer):
        """Test the EMA model; writes summary.json."""
        trained = time.monotonic()
        parameters = sum(parameter.numel() for parameter in trainer.raw_model.parameters())
        held_out = [line["val_loss"] for line in read_metrics(self.run_dir) if "val_loss" in line]
        self.summary = {
            "attention": self.config["attention"]["name"],
            "attention_options": self.config["attention"],
            "tokens": self.config["tokens"],
            "vocabulary": self.tokens.size,
            "parameters": parameters,
            "steps": trainer.step,
            "validation_loss": held_out[-1],
            **self.test(trainer.ema.model.eval(), trainer.accelerator.device),
            "training_minutes": (trained - self.started) / 60,
            "minutes": (time.monotonic() - self.started) / 60,
        }
        write_whole(self.run_dir / "summary.json", json.dumps(self.summary, indent=1))
        return {"score": self.describe(self.summary)}


def check_kind(config, kind, path):
    """Raise ValueError where the run at ``path`` is of another model than ``kind``."""
    if config["model"]["name"] != kind:
        raise ValueError(f"{path}: got a {config['model']['name']!r} run, allowed: a {kind!r} run")
