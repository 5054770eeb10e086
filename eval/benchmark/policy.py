"""A diffusion policy on demonstrations, judged by rollouts in the simulator."""

import json
from functools import partial

import torch

from eval.benchmark.demonstrations import begin_encoder, check_simulator, describe_windows, open_demonstrations
from eval.rollout.dagger import check_dagger, fit_with_corrections
from eval.rollout.loop import check_rollout, describe, rollout, write_results
from policy.build import build_model, data_sources
from policy.dataset.features import cache_features, extend_dataset, place_buffer


class PolicyBenchmark:
    """See ``policy.training.protocols.Benchmark``; the score is the mean over episodes of the largest reward."""

    @staticmethod
    def metrics(config):
        """Those of the rollouts, where there are any."""
        return (*(("score_mean", "success_rate") if config["rollout"]["episodes"] else ()), "val_loss")

    def __init__(self, config, run_dir, *, resume=False):
        self.config, self.run_dir = config, run_dir
        self.task, self.encoder_options, self.dagger = config["task"], config["encoder"], config["dagger"]
        check_dagger(self.dagger, env_name=self.task["env"]["name"])
        check_rollout(config["rollout"])
        # Before the data, whose rendering takes a minute: a wrong option shows at once.
        self.model = build_model(config)
        self.notes = {
            "encoder": begin_encoder(self.model, self.encoder_options, attention=config["attention"], resume=resume)
        }
        self.train_data, self.val_data = open_demonstrations(config, self.task)
        self.model.fit_normalizer(self.train_data)
        if constant := self.model.normalizer.constant:
            self.notes["constant"] = f"{', '.join(constant)}: never move, so they are only centred"
        self.fitted = {key: tensor.clone() for key, tensor in self.model.normalizer.state_dict().items()}
        rolls_out = config["rollout"]["episodes"] > 0
        if rolls_out or self.dagger["rounds"]:
            check_simulator(self.task["env"])
        if not rolls_out:
            self.evaluate = None

    def evaluate(self, policy, epoch):
        """Roll the policy out; writes rollouts/epoch_*/ and returns score and success rate."""
        summary, films = rollout(policy, self.task["env"], **self.config["rollout"])
        write_results(self.run_dir / "rollouts" / f"epoch_{epoch:04d}", summary, films)
        print(f"\nepoch {epoch}: {describe(summary)}")
        return {key: summary[key] for key in ("score_mean", "success_rate")}

    def describe_data(self):
        """One line of the plan."""
        return describe_windows(self.task, self.train_data, self.val_data)

    def prepare(self, device):
        """Features of a frozen encoder, computed once; the arrays on the device where they fit.

        Raises ValueError where a resumed run began with data of other ranges, which its weights are for.
        """
        for key, tensor in self.model.normalizer.state_dict().items():
            if not torch.allclose(tensor.cpu(), self.fitted[key], rtol=1e-4, atol=1e-6):
                what = key.rpartition("_")[0]
                raise ValueError(f"task.data: got another range of {what!r} with resume, allowed: the data of the run")
        if self.encoder_options.get("freeze", False):
            cache_features(self.model, [d for d in (self.train_data, self.val_data) if d], device=device)
        place_buffer(self.train_data.buffer, self.config["storage"], device)

    def fit(self, trainer):
        """Train to the end, with rounds of the expert in the loop where asked for."""
        extend = partial(
            extend_dataset,
            self.train_data,
            sources=data_sources(self.task["shape_meta"]),
            policy=self.model,
            device=trainer.accelerator.device,
        )
        loop = {key: self.config["rollout"][key] for key in ("num_envs", "workers", "batch")}
        env = self.task["env"]
        fit_with_corrections(trainer, self.dagger, env=env, loop=loop, run_dir=self.run_dir, extend=extend)

    def finish(self, trainer):
        """The last rollout, and the commands that look further."""
        found = sorted((self.run_dir / "rollouts").glob("epoch_*/summary.json"))
        lines = {}
        if found:
            score, folder = describe(json.loads(found[-1].read_text())), found[-1].parent
            late = folder.name == f"epoch_{trainer.epochs:04d}"
            lines["score"] = score if late else f"{score}, of {folder.name}: later rollouts failed"
            if (folder / "rollout.mp4").exists():
                lines["film"] = folder / "rollout.mp4"
        return lines | {"next": f"python -m eval.rollout --checkpoint {self.run_dir} --episodes 100"}
