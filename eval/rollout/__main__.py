"""Test a policy in simulation: score and success with 95 % intervals, a row an episode, and a video.

python -m eval.rollout --checkpoint RUN_OR_CHECKPOINT --episodes 50 --seed 100000 --output DIR
"""

import time
from pathlib import Path

import torch

from eval.rollout.loop import describe, loop_options, rollout, write_results
from eval.shared.command import Parser, command
from eval.shared.run_config import add_allow_import, env_of
from policy.checkpoint import load_policy
from policy.denoiser.samplers import SAMPLERS


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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=None, help="default: rollouts/NAME")
    add_allow_import(parser)
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device: got {args.device!r}, but torch sees no CUDA device; allowed here: cpu")
    policy = load_policy(
        args.checkpoint,
        args.device,
        sampler=args.sampler,
        num_inference_steps=args.steps,
        precision=args.precision,
    )
    if args.action_steps is not None:
        policy.set_action_steps(args.action_steps)
    env = env_of(policy.config, allow_import=args.allow_import)
    loop = loop_options(policy, num_envs=args.num_envs, workers=args.workers, batch=args.batch)
    start = time.perf_counter()
    summary, films = rollout(
        policy,
        env,
        episodes=args.episodes,
        seed=args.seed,
        videos=args.videos,
        **loop,
    )
    speed = sum(row["steps"] for row in summary["episodes"]) / (time.perf_counter() - start)
    output = args.output or Path("rollouts") / Path(args.checkpoint).stem
    settings = {
        "checkpoint": str(args.checkpoint),
        "sampler": policy.sampler,
        "steps": policy.num_inference_steps,
        "action_steps": policy.action_steps,
        "precision": policy.precision,
    }
    write_results(output, {**settings, **summary}, films)
    print(f"{describe(summary)}, {speed:.0f} environment steps/s")
    print(f"wrote {output}/summary.json" + (f" and {output}/rollout.mp4" if films else ""))


if __name__ == "__main__":
    main()
