"""Train a policy: compose the configuration, build data and model, train with the one trainer, roll out.

    python train.py --config-dir=config/pusht [--config-name=typea] [preset=paper|small|cpu|smoke] [key=value ...]
    python train.py --config-dir=config/pusht resume=RUN_FOLDER

From here to the loss in four files: the config, this one, policy/diffusion.py, policy/attention/fibottention.py.
"""

import os
import re
import sys
import traceback
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import hydra
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from envs import close_env, make_env
from eval.rollout.dagger import check_dagger, fit_with_corrections
from eval.rollout.loop import describe, rollout, write_results
from eval.shared.command import check_types, command
from eval.shared.compose import locate_data  # and the resolvers of the configuration
from eval.shared.tracker import record
from policy.build import build_datasets, build_model, cache_features, extend_dataset, place_buffer
from policy.checkpoint import load_checkpoint, load_encoder_weights, load_model
from policy.dataset.replay_buffer import open_zarr
from policy.training.trainer import Trainer, uses_cpu

ROOT = Path(__file__).resolve().parent
WAIT = timedelta(hours=4)  # of the other processes, while the first one renders or rolls out alone


def choose_preset(arguments):
    """``arguments`` with preset=auto, the default of policies, replaced by what suits this machine; says which.

    Pre-training has no presets, and a resumed run keeps its own.
    """
    chosen = [a.split("=", 1)[1] for a in arguments if a.startswith("preset=")]
    pretraining = re.search(r"(^| )(--config-name|-cn)[= ]pretrain( |$)", " ".join(arguments))
    if pretraining or any(a.startswith("resume=") for a in arguments) or (chosen and chosen[-1] != "auto"):
        return arguments
    cuda = torch.cuda.is_available()
    preset = "paper" if cuda else "cpu"
    print(f"preset=auto -> {preset} ({'CUDA is present' if cuda else 'no CUDA here'})")
    return [a for a in arguments if not a.startswith("preset=")] + [f"preset={preset}"]


def start_encoder(model, options):
    """Load ``encoder.init`` into every camera's encoder and freeze it if asked; returns a line that says so.

    Each camera starts from that of the same name, or all from the only one there is. Raises ValueError when the weights
    do not fit, or would be frozen under another attention than they learned with, which has the same parameters and
    would silently see something else.
    """
    init, freeze, notes = options["encoder"]["init"], options["encoder"]["freeze"], []
    if init != "none":
        source = load_model(Path(init) if Path(init).exists() else ROOT / init)
        learned, asked = source.config["attention"], options["attention"]
        if freeze and learned != asked:
            raise ValueError(
                f"attention: got {asked}, allowed with the frozen encoder.init={init}: {learned};"
                " or encoder.freeze=false, or encoder.init=none"
            )
        sources = source.encoder.encoders
        for camera, encoder in model.encoder.encoders.items():
            if camera not in sources and len(sources) > 1:
                raise ValueError(f"encoder.init={init}: got cameras {', '.join(sources)}, allowed: one, or {camera!r}")
            start = sources[camera] if camera in sources else next(iter(sources.values()))
            notes += load_encoder_weights(encoder, start.state_dict(), f"encoder.init={init}")
    if freeze:
        model.encoder.encoders.requires_grad_(False)
    weights = "random weights" if init == "none" else init
    return ", ".join([f"encoder: {weights}", "frozen" if freeze else "trained", *notes])


def describe_model(model):
    """Parameter counts by part, in millions."""
    counts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    return "parameters: " + ", ".join(f"{name} {n:.2f} M" for name, n in counts.items() if n)


def stored_config(run_dir, overrides):
    """Configuration of a run to resume, with plain ``key=value`` overrides on top."""
    _, config, _ = load_checkpoint(run_dir / "checkpoints" / "last.safetensors", prefix="none")
    # What a run from before an option existed does not name.
    base = OmegaConf.merge(*(OmegaConf.load(ROOT / "config" / name) for name in ("run.yaml", "base.yaml")))
    config = OmegaConf.merge({"seed": 0, "dagger": base.dagger, "training": base.training}, config)
    OmegaConf.set_struct(config, True)
    changes = [o for o in overrides if not o.startswith(("resume=", "hydra"))]
    for change in changes:
        key = change.split("=", 1)[0]
        if "=" not in change or OmegaConf.is_dict(OmegaConf.select(config, key)) or key == "preset":
            raise ValueError(f"override with resume: got {change!r}, allowed: key=value of single values")
    config.merge_with_dotlist(changes)
    return config


def run(config, run_dir, resume=False):
    """Train what ``config`` (resolved) describes in the folder ``run_dir``; returns the trainer."""
    print(f"run: {run_dir}")
    torch.manual_seed(config.seed)
    options = OmegaConf.to_container(config, resolve=True)
    model = build_model(options)  # before the data, whose rendering takes a minute: a wrong option shows at once
    print(describe_model(model) + "\n" + start_encoder(model, options))
    check_dagger(options)
    with PartialState().main_process_first():  # the others find what it rendered
        path = locate_data(options["task"], options["cache_dir"])
    if "env_args" in options["task"]["env"]:  # rollouts happen in the environment that the data set is from
        options["task"]["env"]["env_args"] = open_zarr(path).attrs.get("env_args")
    train_data, val_data = build_datasets(options, path)
    print(f"data: {len(train_data)} training windows, {len(val_data) if val_data else 0} held out")
    model.fit_normalizer(train_data)
    is_policy = hasattr(model, "sample")
    rolls_out = is_policy and options["rollout"]["episodes"] > 0
    if rolls_out or options["dagger"]["rounds"]:
        _check_simulator(options)
    trainer = Trainer(
        model,
        train_data,
        val_data,
        options=config.training,
        config=options,
        run_dir=run_dir,
        device=config.device,
        evaluate=_evaluator(options, run_dir) if rolls_out else None,
    )
    if resume:
        trainer.resume()
    device = trainer.accelerator.device
    if is_policy and options["encoder"]["freeze"]:
        cache_features(model, [d for d in (train_data, val_data) if d], device=device)
    place_buffer(train_data.buffer, options["storage"], device)
    record(trainer, options, run_dir)
    if is_policy:
        extend = partial(extend_dataset, train_data, config=options, policy=model, device=device)
        fit_with_corrections(trainer, options, run_dir, extend=extend)
    else:
        trainer.fit()
    return trainer


def _check_simulator(options):
    """What does not work shows now, not after the first epochs."""
    try:
        close_env(make_env(**options["task"]["env"]))
    except ImportError as error:
        raise ImportError(f"{error}; rollout.episodes=0 trains without a simulator") from error


def _evaluator(options, run_dir):
    def evaluate(policy, epoch):
        summary, films = rollout(policy, options["task"]["env"], **options["rollout"])
        write_results(run_dir / "rollouts" / f"epoch_{epoch:04d}", summary, films)
        print(f"\nepoch {epoch}: {describe(summary)}")
        return {key: summary[key] for key in ("score_mean", "success_rate")}

    return evaluate


def run_dir_for(resume, task, preset):
    """The folder of a run: the resumed one, or a new one named after task, preset and time.

    Of several processes only the first names and makes it; the others hear of it in ``main``.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        return "."
    return resume or f"runs/{task}/{preset}_{datetime.now():%Y-%m-%d_%H-%M-%S}"


OmegaConf.register_new_resolver("run_dir", run_dir_for, use_cache=True, replace=True)


@command
def job(config):
    """Train what hydra composed, in the folder that it made."""
    if "RANK" not in os.environ:  # accelerate keeps precision and device for a whole process, which a sweep changes
        AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=uses_cpu(config.device), timeout=WAIT)
    run_dir = Path(broadcast_object_list([HydraConfig.get().runtime.output_dir])[0])
    resume = config.resume is not None
    if resume:
        config = stored_config(run_dir, HydraConfig.get().overrides.task)
    if config.preset == "auto":
        raise ValueError("preset: got 'auto' among several, allowed: 'auto' alone, or paper, small, cpu, smoke")
    check_types(config)
    run(config, run_dir, resume)


@hydra.main(config_path="config", config_name="typea", version_base="1.3")
def main(config):
    """One job. In a sweep one that fails says why and the others go on; only a signal ends them all."""
    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN:
        return job(config)
    try:
        return job(config)
    except SystemExit as end:
        if end.code != 1:
            raise
    except Exception:
        traceback.print_exc()
    # Here, without the frames of the error: hydra keeps what is raised to the end, and they hold the model.
    raise HydraException(f"job {settings.job.num} of the sweep failed: {' '.join(settings.overrides.task)}")


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach ``command``, which prints one line
    sys.argv[1:] = choose_preset(sys.argv[1:])
    command(main)()
