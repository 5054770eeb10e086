"""A policy at a wall-clock control rate, as on a robot: inference beside execution, stalls, latency, late ticks, score.

    python -m eval.realtime --checkpoint RUN_OR_FILE --rate 10 --mode async

A tick is one step of the environment, with an absolute deadline; Push-T's own rate is 10 Hz. The world never waits for
inference, which runs in a thread: where no action is left the last one is held (position control), a stall. Only an
episode's first chunk is waited for, since robots stand still until they start. Chunks that each start from other noise
do not fit together where inference takes several steps; ``--warm-start 0.3`` mends that. Noise follows
from the seed, but what happens depends on timing, so that no two runs are alike.
"""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from envs import close_env, make_env
from envs.shared.episode import Episode
from eval.realtime.plot import plot
from eval.realtime.schedule import MODES, REPLAN, ChunkSchedule
from eval.rollout.loop import describe, summarize, write_results
from eval.shared.command import Parser, command
from eval.shared.machine import choose_device, describe_machine
from policy.checkpoint import load_policy
from policy.denoiser.samplers import SAMPLERS

LATE = 0.1  # share of a period
RECENT = 10  # inferences whose longest is what the next one is expected to take (arXiv 2506.07339, algorithm 1)


class Inference:
    """Calls of a policy, one at a time, in the thread of ``pool``; spans: [(start, end)] of those taken, in s."""

    def __init__(self, policy, pool, *, warm_start, clock):
        self.policy, self.pool, self.warm_start, self.clock = policy, pool, warm_start, clock
        self.future = None
        self.spans = []

    def start(self, observation, generator, guess):
        """Sample from ``observation`` {key: (To, ...)}; guess: see ``ChunkSchedule.start``."""
        options = {**guess, "warm_start": self.warm_start} if guess and self.warm_start is not None else {}
        self.future = self.pool.submit(self._sample, self.clock(), observation, generator, options)

    def _sample(self, start, observation, generator, options):
        obs = {key: torch.from_numpy(values[None]) for key, values in observation.items()}
        chunk = self.policy.sample(obs, generator=generator, **options)[0].cpu().numpy()
        return chunk, (start, self.clock())

    def ready(self):
        return self.future is not None and self.future.done()

    def take(self):
        """The chunk (T, Da), waiting for it; raises what inference raised."""
        future, self.future = self.future, None
        chunk, span = future.result()
        self.spans.append(span)
        return chunk

    def expected(self, period):
        """Steps of ``period`` s that the next call will take."""
        return math.ceil(max(end - start for start, end in self.spans[-RECENT:]) / period)


def _run_episode(episode, inference, schedule, *, period, clock, sleep):
    """Run ``episode`` to its end; returns its trace, in s from the first deadline.

    {"seed", "ticks": [start], "spans": [(start, end)] of inference, and "holds", "executed", "too_late" as of
    ``ChunkSchedule``}. Raises what inference raises.
    """
    generator = torch.Generator().manual_seed(episode.seed)
    before = len(inference.spans)

    def start_inference(step):
        inference.start(episode.report().observation, generator, schedule.start(step))

    start_inference(0)
    schedule.join(inference.take(), 0)
    start, ticks = clock(), []
    while not episode.done:
        step = len(ticks)
        wait = start + step * period - clock()
        if wait > 0:
            sleep(wait)
        ticks.append(clock() - start)
        if inference.ready():
            schedule.join(inference.take(), step)
        if schedule.due(step, inference.expected(period)):
            start_inference(step)
        episode.execute(schedule.action(step)[None])  # simulated at once; what it shows is used at the next tick
    if inference.future is not None:  # for nothing, but it may have failed, and the next episode needs the thread
        inference.take()
    return {
        "seed": episode.seed,
        "ticks": ticks,
        "spans": [(begin - start, end - start) for begin, end in inference.spans[before:]],
        "holds": schedule.holds,
        "executed": schedule.executed,
        "too_late": schedule.too_late,
    }


def realtime(
    policy,
    env_options,
    *,
    rate,
    episodes,
    seed,
    mode="async",
    replan="needed",
    warm_start=None,
    videos=0,
    clock=time.perf_counter,
    sleep=time.sleep,
    pool=None,
):
    """Run ``episodes`` episodes with seeds from ``seed`` on at ``rate`` Hz, one after another.

    mode, replan: see ``ChunkSchedule``; warm_start: share of the sampling steps that refine the rest of the previous
    chunk, None: every chunk starts from noise; videos: how many episodes are filmed. pool: executor of one thread.
    Returns (summary as in summary.json, filmed episodes, traces as of ``_run_episode``). Raises ValueError for options
    that cannot be, and whatever the policy or the environment raises, with no thread left behind.
    """
    if not 0 < rate < math.inf:
        raise ValueError(f"rate: got {rate}, allowed: above 0 (Hz)")
    if episodes < 1:
        raise ValueError(f"episodes: got {episodes}, allowed: >= 1")
    if warm_start is not None and not 0 < warm_start <= 1:
        raise ValueError(f"warm_start: got {warm_start}, allowed: none, or above 0, to 1")
    steps = {key: getattr(policy, key) for key in ("horizon", "obs_steps", "action_steps")}
    schedules = [ChunkSchedule(mode=mode, replan=replan, **steps) for _ in range(episodes)]
    reports, traces = [], []
    env = make_env(**env_options)
    try:
        with pool or ThreadPoolExecutor(1, "inference") as pool:
            inference = Inference(policy, pool, warm_start=warm_start, clock=clock)
            _warm_up(inference, Episode(env, seed, obs_steps=policy.obs_steps, keys=policy.encoder.shapes))
            numbered = tqdm(schedules, desc=f"{rate:g} Hz", unit="episode", leave=False, dynamic_ncols=True)
            for number, schedule in enumerate(numbered):
                episode = Episode(
                    env, seed + number, obs_steps=policy.obs_steps, keys=policy.encoder.shapes, film=number < videos
                )
                traces.append(
                    _run_episode(episode, inference, schedule, period=1 / rate, clock=clock, sleep=sleep),
                )
                reports.append(episode.report())
    finally:
        close_env(env)
    rows = [
        {**report.row, "stalls": len(trace["holds"]), "too_late": trace["too_late"]}
        for report, trace in zip(reports, traces, strict=True)
    ]
    films = [report.film for report in reports if report.film]
    return {**timing(traces, rate), **summarize(rows)}, films, traces


def _warm_up(inference, episode):
    """Sample once, uncounted: the first call of a policy loads and packs what later ones use."""
    inference.start(episode.report().observation, torch.Generator(), {})
    inference.take()
    inference.spans.clear()


def timing(traces, rate):
    """What summary.json tells of the ``traces`` of episodes at ``rate`` Hz: ticks, latency, stalls, chunks.

    The rate held is that of the ticks within an episode; a tick is late by the time from its deadline to its start.
    """
    late = np.concatenate([np.subtract(trace["ticks"], np.arange(len(trace["ticks"])) / rate) for trace in traces])
    lasted = sum(trace["ticks"][-1] - trace["ticks"][0] for trace in traces)
    latency = np.array([end - start for trace in traces for start, end in trace["spans"]]) * 1e3
    replaced = [count for trace in traces for count in trace["executed"][:-1]]  # the last ones were cut by the end
    return {
        "control": {
            "rate": rate,
            "rate_held": (len(late) - len(traces)) / lasted if lasted > 0 else None,
            "ticks": len(late),
            "late_share": float(np.mean(late > LATE / rate)),
            "worst_late_ms": float(late.max() * 1e3),
        },
        "latency_ms": {
            "median": float(np.median(latency)),
            "p95": float(np.quantile(latency, 0.95)),
            "max": float(latency.max()),
            "calls": len(latency),
        },
        "stalls_per_episode": sum(len(trace["holds"]) for trace in traces) / len(traces),
        "too_late": sum(trace["too_late"] for trace in traces),
        "executed_steps": {"mean": float(np.mean(replaced)), "min": min(replaced), "max": max(replaced)}
        if replaced
        else None,
    }


def report_timing(summary):
    """The lines that tell ``timing``."""
    control, latency, executed = summary["control"], summary["latency_ms"], summary["executed_steps"]
    held = "unknown" if control["rate_held"] is None else f"{control['rate_held']:.3f}"
    steps = "no chunk replaced"
    if executed:
        steps = f"{executed['mean']:.1f} steps of a chunk executed ({executed['min']} to {executed['max']})"
    return [
        f"control: {control['rate']:g} Hz asked, {held} held; {control['late_share']:.1%} of {control['ticks']} ticks"
        f" late by more than {LATE:.0%} of a period, worst {control['worst_late_ms']:.1f} ms",
        f"inference: {latency['median']:.0f} ms median, {latency['p95']:.0f} 95 %, {latency['max']:.0f} max"
        f" of {latency['calls']} calls",
        f"stalls: {summary['stalls_per_episode']:.1f} steps an episode; {steps};"
        f" {summary['too_late']} chunks came too late",
    ]


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
    parser.add_argument("--output", type=Path, default=None, help="default: realtime/NAME")
    args = parser.parse_args(argv)
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
            policy.config["task"]["env"],
            rate=args.rate,
            episodes=args.episodes,
            seed=args.seed,
            videos=args.videos,
            **options,
        )
    except KeyboardInterrupt:
        raise SystemExit("interrupted: nothing was written") from None
    output = args.output or Path("realtime") / Path(args.checkpoint).stem
    write_results(output, {**settings, **summary}, films, name="realtime")
    plot({**settings, **summary}, traces, output / "realtime.png")
    print("\n".join([*report_timing(summary), describe(summary)]))
    print(f"wrote {output}/summary.json, realtime.png" + (" and realtime.mp4" if films else ""))


if __name__ == "__main__":
    main()
