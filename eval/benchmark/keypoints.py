"""Pre-training of keypoint encoders on rendered scenes, judged by the error on held-out ones."""

from eval.benchmark.demonstrations import begin_encoder, describe_windows, open_demonstrations
from policy.build import build_model
from policy.dataset.features import place_buffer
from policy.training.curves import read_metrics


class KeypointBenchmark:
    """See ``policy.training.protocols.Benchmark``; held-out keypoint errors take the place of an evaluation."""

    evaluate = None

    @staticmethod
    def metrics(config):
        """Nothing but the held-out loss."""
        return ("val_loss",)

    def __init__(self, config, run_dir, *, resume=False):
        self.config, self.run_dir, self.task = config, run_dir, config["task"]
        self.model = build_model(config)
        self.notes = {
            "encoder": begin_encoder(self.model, config["encoder"], attention=config["attention"], resume=resume)
        }
        self.train_data, self.val_data = open_demonstrations(config, self.task)

    def describe_data(self):
        """One line of the plan."""
        return describe_windows(self.task, self.train_data, self.val_data)

    def prepare(self, device):
        """The arrays on the device where they fit."""
        place_buffer(self.train_data.buffer, self.config["storage"], device)

    def fit(self, trainer):
        """Train to the end."""
        trainer.fit()

    def finish(self, trainer):
        """The last held-out errors, and the command that uses the encoder."""
        lines = [line for line in read_metrics(self.run_dir) if "val_loss" in line]
        errors = {key.removeprefix("val_"): value for key, value in lines[-1].items() if key.startswith("val_")}
        shown = ", ".join(f"{key} {value:.4g}" for key, value in errors.items())
        return {"held out": shown, "next": f"python train.py --config-dir=config/... encoder.init={self.run_dir}"}
