"""A policy at a wall-clock control rate, as on a robot: inference beside execution, stalls, latency, late ticks, score.

    python -m eval.realtime --checkpoint RUN_OR_FILE --rate 10 --mode async

A tick is one step of the environment, with an absolute deadline; Push-T's own rate is 10 Hz. Inference runs in a
thread. The world waits for an episode's first chunk only, since robots stand still until they start. Later it never
waits: with no action left it repeats the last one (position control), a stall. Consecutive chunks can disagree;
``--warm-start 0.3`` mends that. Noise follows from the seed. What happens depends on timing: no two runs are alike.
"""

from pathlib import Path

from eval.realtime.loop import realtime
from eval.realtime.plot import plot
from eval.realtime.schedule import MODES, REPLAN
from eval.realtime.timing import report_timing
from eval.rollout.loop import describe, write_results
from eval.shared.command import Parser, command
from eval.shared.folders import results_folder
from eval.shared.machine import choose_device, describe_machine
from eval.shared.run_config import add_allow_import, env_of
from policy.checkpoint import load_policy
from policy.denoiser.samplers import SAMPLERS
from policy.registry import at_least


def _share(text):
    """The number meant by --warm-start, or None."""
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise ValueError(f"--warm-start: got {text!r}, allowed: none, or a number above 0, to 1") from None


@command
def main(argv=None):
    parser = Parser("eval.realtime", __doc__)
    parser.add_argument("--checkpoint", required=True, help="run folder or .safetensors file")
    parser.add_argument("--rate", type=float, default=10, help="control steps a second (Hz), default 10")
    parser.add_argument("--episodes", type=int, default=5, help="default 5")
    parser.add_argument("--seed", type=int, default=100_000, help="first of consecutive test seeds")
    parser.add_argument("--mode", default="async", help=f"{', '.join(MODES)}: infer beside execution, or stop for it")
    replan = f"{', '.join(REPLAN)}: infer when Ta actions run out (default), or all the time"
    parser.add_argument("--replan", default="needed", help=replan)
    parser.add_argument("--sampler", default=None, help=f"{', '.join(SAMPLERS)}; default as trained")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps, default as trained")
    parser.add_argument("--precision", default="fp32", help="fp32 (default) or bf16")
    share = "share of the denoising steps that refine the rest of the previous chunk, or none (default)"
    parser.add_argument("--warm-start", default="none", metavar="SHARE", help=share)
    parser.add_argument("--action-steps", type=int, default=None, help="steps a chunk is for (Ta), default as trained")
    parser.add_argument("--videos", type=int, default=4, help="episodes to film, which takes time of the control loop")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--output", type=Path, default=None, help="default: a new folder realtime/NAME")
    add_allow_import(parser)
    args = parser.parse_args(argv)
    at_least(0, **{"--seed": args.seed, "--videos": args.videos})
    options = {"mode": args.mode, "replan": args.replan, "warm_start": _share(args.warm_start)}
    device = choose_device(args.device)
    policy = load_policy(
        args.checkpoint, device, sampler=args.sampler, num_inference_steps=args.steps, precision=args.precision
    )
    if args.action_steps is not None:
        policy.set_action_steps(args.action_steps)
    settings = {
        "checkpoint": str(args.checkpoint),
        "machine": describe_machine(device),
        **options,
        "sampler": policy.sampler,
        "steps": policy.num_inference_steps,
        "action_steps": policy.action_steps,
        "precision": policy.precision,
    }
    try:
        summary, films, traces = realtime(
            policy,
            env_of(policy.config, allow_import=args.allow_import),
            rate=args.rate,
            episodes=args.episodes,
            seed=args.seed,
            videos=args.videos,
            **options,
        )
    except KeyboardInterrupt:
        raise SystemExit("interrupted: nothing was written") from None
    print("\n".join([*report_timing(summary), describe(summary)]))  # before it is written, which can fail
    output = results_folder(args.output, "realtime", args.checkpoint)
    written = write_results(output, {**settings, **summary}, films, name="realtime")
    plot({**settings, **summary}, traces, output / "realtime.png")
    print("wrote", *written, output / "realtime.png")


if __name__ == "__main__":
    main()
