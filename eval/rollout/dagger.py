"""The expert in the loop: training goes on with its episodes from states that the policy visited (arXiv 1011.0686).

A round of DAgger rolls the policy out on seeds of its own, lets the expert act from some of the states that it visited,
those of failures first, and adds its episodes to the training data. All lies in the run folder, so that a stopped run
goes on.
"""

import json
import os

from envs import CORRECTIONS, make_corrections
from eval.rollout.loop import describe, rollout


def check_dagger(dagger, *, env_name):
    """Raise ValueError for options of this section that cannot be right, before anything is trained."""
    if dagger["rounds"] < 0 or not 0 < dagger["start"] < 1:
        got = f"{dagger['rounds']}, {dagger['start']}"
        raise ValueError(f"dagger.rounds, dagger.start: got {got}, allowed: >= 0, between 0 and 1")
    if min(dagger["rollouts"], dagger["episodes"]) < 1:
        got = f"{dagger['rollouts']}, {dagger['episodes']}"
        raise ValueError(f"dagger.rollouts, dagger.episodes: got {got}, allowed: >= 1")
    if dagger["rounds"] and env_name not in CORRECTIONS:
        raise ValueError(f"dagger.rounds: got {dagger['rounds']}, allowed: 0 (no expert to act in {env_name!r})")


def round_steps(rounds, *, start, total):
    """Training steps after which the rounds take place: the first after share ``start`` of ``total``, then evenly."""
    return [round(total * (start + (1 - start) * number / rounds)) for number in range(rounds)]


def fit_with_corrections(trainer, dagger, *, env, loop, run_dir, extend):
    """Train to the end with rounds as ``dagger`` says.

    env: options of the environment; loop: num_envs, workers and batch of the rollouts; extend(path): adds the episodes
    of a zarr to the training data.
    """
    steps = round_steps(dagger["rounds"], start=dagger["start"], total=trainer.total_steps)
    for number, step in enumerate(steps, start=1):
        output = run_dir / "dagger" / f"round_{number:02d}.zarr"
        if trainer.step > step and not output.exists():
            raise FileNotFoundError(f"dagger: got no {output}, but the run is beyond its step {step}; restore it")
        trainer.fit(stop_at=max(step, trainer.step))
        if trainer.accelerator.is_main_process and not output.exists():
            collect(trainer.ema.model, dagger, number, output, env=env, loop=loop, log=trainer.log)
        trainer.wait_for_everyone()
        extend(output)
        trainer.set_training_data(trainer.train_data, since=step)
    trainer.fit()


def collect(policy, dagger, number, output, *, env, loop, log):
    """Roll ``policy`` out for round ``number``, hand its score to ``log``, write the corrections to ``output``."""
    seed = dagger["seed"] + (number - 1) * dagger["rollouts"]
    summary, _, visited = rollout(policy, env, episodes=dagger["rollouts"], seed=seed, states=True, **loop)
    print(f"\ndagger round {number}: {describe(summary)}")
    # Before the corrections, whose presence says that the round is over.
    log({"round": number, "round_score": summary["score_mean"], "round_success": summary["success_rate"]})
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(summary))
    make_corrections(
        env["name"],
        visited=visited,
        count=dagger["episodes"],
        seed=number,
        output=output,
        image_size=env["image_size"],
        processes=os.cpu_count() or 1,
    )
