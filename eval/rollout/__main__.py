"""Test a policy in simulation: score and success with 95 % intervals, a row an episode, and a video.

python -m eval.rollout --checkpoint RUN_OR_CHECKPOINT --episodes 50 --seed 100000 --output DIR
"""

import contextlib
import time
from pathlib import Path

from eval.rollout.loop import describe, loop_options, rollout, write_results
from eval.shared.command import Parser, command
from eval.shared.folders import results_folder
from eval.shared.machine import choose_device
from eval.shared.run_config import add_allow_import, env_of
from policy.checkpoint import load_policy
from policy.denoiser.samplers import SAMPLERS
from policy.registry import at_least


@command
def main(argv=None):
    parser = Parser("eval.rollout", __doc__)
    parser.add_argument("--checkpoint", required=True, help="run folder or .safetensors file")
    parser.add_argument("--episodes", type=int, default=50, help="test episodes, one a seed")
    parser.add_argument("--seed", type=int, default=100_000, help="first of consecutive test seeds")
    parser.add_argument("--num-envs", type=int, help="environments at a time, default as in training")
    parser.add_argument("--workers", type=int, help="processes that hold them, 0: this one; default as in training")
    parser.add_argument("--batch", type=int, help="rows of a policy call, default as in training")
    parser.add_argument("--videos", type=int, default=9, help="episodes to film")
    parser.add_argument("--sampler", default=None, help=f"{', '.join(SAMPLERS)}; default as trained")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps, default as trained")
    parser.add_argument("--precision", default="fp32", help="fp32 (default) or bf16")
    parser.add_argument("--action-steps", type=int, default=None, help="executed steps of a chunk, default as trained")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--output", type=Path, default=None, help="default: a new folder rollouts/NAME")
    add_allow_import(parser)
    args = parser.parse_args(argv)
    at_least(0, **{"--seed": args.seed, "--videos": args.videos})
    at_least(1, **{"--episodes": args.episodes})
    policy = load_policy(
        args.checkpoint,
        choose_device(args.device),
        sampler=args.sampler,
        num_inference_steps=args.steps,
        precision=args.precision,
    )
    if args.action_steps is not None:
        policy.set_action_steps(args.action_steps)
    env = env_of(policy.config, allow_import=args.allow_import)
    loop = loop_options(policy, num_envs=args.num_envs, workers=args.workers, batch=args.batch)
    output = results_folder(args.output, "rollouts", args.checkpoint)
    start = time.perf_counter()
    try:
        summary, films = rollout(
            policy,
            env,
            episodes=args.episodes,
            seed=args.seed,
            videos=args.videos,
            **loop,
        )
        speed = sum(row["steps"] for row in summary["episodes"]) / (time.perf_counter() - start)
        print(f"{describe(summary)}, {speed:.0f} environment steps/s")  # before it is written, which can fail
        settings = {
            "checkpoint": str(args.checkpoint),
            "sampler": policy.sampler,
            "steps": policy.num_inference_steps,
            "action_steps": policy.action_steps,
            "precision": policy.precision,
        }
        print("wrote", *write_results(output, {**settings, **summary}, films))
    finally:
        with contextlib.suppress(OSError):
            output.rmdir()  # only if it is empty


if __name__ == "__main__":
    main()
