"""Train a benchmark with the one trainer: a plan before, the run, a summary after."""

from accelerate import PartialState
from omegaconf import OmegaConf

from eval.benchmark.plan import plan
from eval.shared.run_config import write_config
from eval.shared.tracker import open_tracker
from policy.training.trainer import Trainer


def fit(benchmark, composed, run_dir, *, resume=False):
    """Train ``benchmark`` to the end in the folder ``run_dir``; returns the trainer.

    composed: the configuration as it was composed, which resuming takes. Only the first process writes and tests.
    """
    config, first = benchmark.config, PartialState().is_main_process
    if first:
        run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        benchmark.model,
        benchmark.train_data,
        benchmark.val_data,
        options=OmegaConf.create(config["training"]),
        config=config,
        run_dir=run_dir,
        evaluate=benchmark.evaluate,
        tracker=open_tracker(config["wandb"], config, run_dir) if first else None,
        device=config["device"],
    )
    changed = trainer.resume() if resume else {}
    if first:
        print(block({**plan(benchmark, trainer, run_dir), **changed}))
    benchmark.prepare(trainer.accelerator.device)
    if first:
        write_config(run_dir, composed, config)  # once nothing speaks against it
    benchmark.fit(trainer)
    if first:
        lines = benchmark.finish(trainer)
        checkpoint, curves = run_dir / "checkpoints" / "last.safetensors", run_dir / "curves.png"
        after = {"next": lines.pop("next")}
        print(block({**lines, "curves": curves, "checkpoint": checkpoint, **after}))
    trainer.wait_for_everyone()
    return trainer


def block(lines):
    """{heading: text} as aligned lines; what is empty is left out."""
    width = max(map(len, lines))
    return "\n" + "\n".join(f"  {heading:<{width}}  {text}" for heading, text in lines.items() if str(text))
