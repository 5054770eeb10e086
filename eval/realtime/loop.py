"""The control loop of ``python -m eval.realtime``: absolute deadlines, inference beside it in a thread."""

import math
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

from envs import close_env, make_env
from envs.shared.episode import Episode
from eval.realtime.schedule import ChunkSchedule
from eval.realtime.timing import timing
from eval.rollout.loop import summarize

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
