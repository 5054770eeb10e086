"""Real-time control: which action is due when, against an independent table; rate, stalls, errors and the command."""

import json
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from fake_env import MADE, FakeEnv
from PIL import Image

import envs
from eval.realtime import __main__ as module
from eval.realtime.__main__ import main, realtime, report_timing, timing
from eval.realtime.schedule import ChunkSchedule
from policy.checkpoint import save_checkpoint

HORIZON, OBS_STEPS, ACTION_STEPS = 8, 2, 4
USABLE = HORIZON - OBS_STEPS + 1  # actions of a chunk from the observed step on
PERIOD = 0.125  # s, exact in binary
SECONDS = {"rate": 1 / PERIOD, "seed": 10}


@pytest.fixture(autouse=True)
def fake_environment(monkeypatch):
    monkeypatch.setitem(envs.ENVIRONMENTS, "fake", "fake_env:FakeEnv")
    MADE.clear()


class FakeClock:
    """Seconds that pass only in ``sleep``."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds


class FakePool:
    """An executor whose calls last ``latencies`` s of a fake clock, one after the other, the last one ever after."""

    def __init__(self, clock, *latencies):
        self.clock, self.latencies, self.closed = clock, list(latencies), False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def submit(self, function, *arguments):
        latency = self.latencies.pop(0) if len(self.latencies) > 1 else self.latencies[0]
        end = self.clock.now + latency

        def result():
            now, self.clock.now = self.clock.now, end  # the call reads the clock when it is done
            value = function(*arguments)
            self.clock.now = max(now, end)
            return value

        return SimpleNamespace(done=lambda: self.clock.now >= end, result=result)


class TimeTeller:
    """A policy whose chunks name the seed and the step that each action is for; options: what ``sample`` was told."""

    horizon, obs_steps, action_steps = HORIZON, OBS_STEPS, ACTION_STEPS
    encoder = SimpleNamespace(shapes={"agent_pos": (2,)})

    def __init__(self):
        self.options, self.seen, self.draws = [], [], []

    def sample(self, obs, *, generator, **options):
        place = obs["agent_pos"]
        assert set(obs) == {"agent_pos"} and place.shape == (1, OBS_STEPS, 2)
        self.options.append(options)
        self.seen.append([int(step) for step in place[0, :, 1]])
        self.draws.append(torch.rand((), generator=generator).item())
        steps = place[0, -1, 1] + torch.arange(HORIZON) - (OBS_STEPS - 1)
        return torch.stack([place[0, -1, 0].expand(HORIZON), steps], dim=1)[None]


def run(*latencies, policy=None, episodes=1, length=40, **options):
    """(summary, films, traces, policy) of ``realtime`` on the fake clock; the first of ``latencies`` warms up."""
    clock, policy = FakeClock(), policy or TimeTeller()
    pool = FakePool(clock, *latencies)
    env = {"name": "fake", "length": length}
    results = realtime(
        policy, env, episodes=episodes, clock=clock, sleep=clock.sleep, pool=pool, **{**SECONDS, **options}
    )
    assert pool.closed
    return *results, policy


# The schedule -----------------------------------------------------------------------------------------------------


def schedule(mode="async", replan="needed"):
    return ChunkSchedule(mode=mode, replan=replan, horizon=HORIZON, obs_steps=OBS_STEPS, action_steps=ACTION_STEPS)


def drive(one, latency, *, steps=60, expected=None):
    """Step ``one`` with inference of ``latency`` steps; [(observed step, index) of the action, or None] and starts.

    A chunk's actions are (observed step, index).
    """
    actions, starts = [], []
    for step in range(steps):
        if one.observed is not None and step >= one.observed + latency:
            one.join(chunk_of(one.observed), step)
        if one.due(step, latency if expected is None else expected):
            starts.append(step)
            one.start(step)
            if latency == 0 or step == 0:  # an episode begins with its first chunk
                one.join(chunk_of(step), step)
        held = len(one.holds)
        action = tuple(one.action(step))
        actions.append(action if len(one.holds) == held else None)
    return actions, starts


def chunk_of(observed):
    return np.array([(observed, index) for index in range(HORIZON)])


def expected_actions(starts, latency, steps):
    """The table of policy/dataset/windows.py: the newest chunk that is there, at the index of the time that passed."""
    table = []
    for step in range(steps):
        there = [start for start in starts if step >= (start + latency if start else 0) and latency < USABLE]
        origin = max(there, default=0)
        index = OBS_STEPS - 1 + step - origin
        table.append((origin, index) if index < HORIZON else None)
    return table


@pytest.mark.parametrize("latency", [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 20])
@pytest.mark.parametrize("replan", ["needed", "always"])
def test_async_follows_the_time_table(latency, replan):
    """Ta steps of the plan minus what inference takes; beyond that the rest of T is a reserve, then holds."""
    one = schedule(replan=replan)
    actions, starts = drive(one, latency)
    between = max(latency, 1) if replan == "always" else max(ACTION_STEPS - latency, latency, 1)
    first = 1 if replan == "always" else max(ACTION_STEPS - latency, 1)
    if latency >= USABLE and replan == "needed":
        between = latency  # never served: it asks again at once
    assert starts == [0, *range(first, 60, between)]
    assert actions == expected_actions(starts, latency, 60)
    assert one.holds == [step for step, action in enumerate(actions) if action is None]
    assert one.too_late == (sum(start + latency < 60 for start in starts[1:]) if latency >= USABLE else 0)
    assert sum(one.executed) == 60 - len(one.holds)


@pytest.mark.parametrize(("latency", "holds"), [(0, 0), (1, 0), (3, 0), (4, 1), (5, 3), (6, 5)])
def test_async_holds_only_when_a_chunk_is_used_up(latency, holds):
    """Per chunk, 2 d - 7 once the inference of d steps follows itself: no more than 7 actions reach beyond now."""
    actions, starts = drive(schedule(), latency)
    second, third = starts[2] + latency, starts[3] + latency
    assert actions[second:third].count(None) == holds


@pytest.mark.parametrize("latency", [0, 1, 3, 12])
def test_sync_executes_every_action_from_the_observed_step_on(latency):
    one = schedule("sync")
    actions, starts = drive(one, latency)
    cycle = ACTION_STEPS + latency
    assert starts == [0, *range(ACTION_STEPS, 60, cycle)]
    for step, action in enumerate(actions[ACTION_STEPS:]):
        number, place = divmod(step, cycle)
        index = OBS_STEPS - 1 + place - latency
        assert action == (None if place < latency else (starts[number + 1], index))
    assert one.too_late == 0


def test_inference_that_takes_longer_than_expected_uses_the_reserve():
    """3 steps instead of 1: no hold, the actions beyond Ta are executed, and none of the new chunk's past ones."""
    actions, starts = drive(schedule(), 3, expected=1)
    assert starts[:4] == [0, 3, 6, 9]  # the second chunk joins at 6, with 1 of its 4 steps left
    assert actions[:6] == [(0, index) for index in range(1, 7)] and actions[6] == (3, 4)
    assert None not in actions
    early, later = drive(schedule(), 1, expected=3)
    assert later[:4] == [0, 1, 2, 3] and early == expected_actions(later, 1, 60)


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_hold_repeats_the_last_action(mode):
    one = schedule(mode)
    one.start(0)
    one.join(chunk_of(0), 0)
    last = USABLE - 1 if mode == "async" else ACTION_STEPS - 1
    done = [tuple(one.action(step)) for step in range(20)]
    assert done == [(0, 1 + min(step, last)) for step in range(20)]
    assert one.holds == list(range(last + 1, 20)) and one.executed == [last + 1]


def test_a_guess_is_shifted_by_the_steps_of_its_own_time_table():
    """Async: since its observation; sync: since it began to be executed; nothing after T steps."""
    for mode, elapsed in (("async", 5), ("sync", 2)):
        one = schedule(mode)
        assert one.start(0) == {}
        one.join(chunk_of(0), 0 if mode == "async" else 3)
        guess = one.start(5)
        assert guess["elapsed"] == elapsed and guess["previous"].shape == (1, HORIZON, 2)
        np.testing.assert_array_equal(guess["previous"][0], chunk_of(0))
    assert one.start(3 + HORIZON - 1)["elapsed"] == HORIZON - 1
    assert one.start(3 + HORIZON) == {}


def test_one_inference_at_a_time():
    for replan in ("needed", "always"):
        one = schedule(replan=replan)
        assert one.due(0, 1)
        one.start(0)
        assert not one.due(0, 1) and not one.due(99, 99)


# The runner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latency", [0.0, 0.02, 0.125, 0.3, 0.49, 0.8])
@pytest.mark.parametrize("replan", ["needed", "always"])
def test_async_executes_each_action_at_the_step_it_is_for(latency, replan):
    """Or holds the one before; each policy call sees the states of its step and the one before."""
    summary, _, (trace,), policy = run(latency, replan=replan)
    (actions,) = MADE[0].actions[1:]  # the first reset is of the warm-up
    for step, action in enumerate(actions):
        expected = [10, step] if step not in trace["holds"] else actions[step - 1]
        np.testing.assert_array_equal(action, expected)
    assert all(before == max(now - 1, 0) for before, now in policy.seen)
    assert bool(trace["holds"]) == (latency > 0.4)  # 4 steps twice are more than 7 actions
    assert summary["stalls_per_episode"] == summary["episodes"][0]["stalls"] == len(trace["holds"])
    assert summary["latency_ms"]["max"] == pytest.approx(latency * 1e3)


def test_sync_stalls_while_inference_runs_and_async_does_not():
    """0.3 s are three ticks: 3 holds for every 4 actions, of which none is skipped. Async has none."""
    summary, _, (trace,), _ = run(0.3, mode="sync")
    cycles, rest = divmod(40 - ACTION_STEPS, ACTION_STEPS + 3)
    assert len(trace["holds"]) == cycles * 3 + min(rest, 3)
    assert trace["executed"][:-1] == [ACTION_STEPS] * (len(trace["executed"]) - 1)
    assert summary["executed_steps"] == {"mean": 4, "min": 4, "max": 4}
    (actions,) = MADE[0].actions[1:]
    assert [int(action[1]) for action in actions[:14]] == [0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 7, 7, 7, 7]
    summary, _, (trace,), _ = run(0.3)
    assert trace["holds"] == [] and summary["executed_steps"]["min"] == 3  # one inference after the other


def test_replan_always_replaces_chunks_sooner():
    needed, always = (run(0.1, replan=replan)[0] for replan in ("needed", "always"))
    means = [summary["executed_steps"]["mean"] for summary in (needed, always)]
    assert means == pytest.approx([3, 1], abs=0.1)  # Ta less the step that is gone; first chunks lose none
    assert always["latency_ms"]["calls"] > 2 * needed["latency_ms"]["calls"]


def test_what_inference_is_expected_to_take_is_the_longest_of_the_last_ones():
    """After one call of three steps the next ones start three steps early, until ten others have come."""
    summary, _, (trace,), policy = run(0.1, 0.1, 0.1, 0.35, 0.1, length=30)
    starts = [now for _, now in policy.seen][1:]
    assert starts[:6] == [0, 3, 6, 9, 10, 11]  # the third ends before 9
    inference = module.Inference(None, None, warm_start=None, clock=None)
    inference.spans = [(0, 0.35)] + [(5, 5.1)] * 9
    assert inference.expected(PERIOD) == 3
    inference.spans.append((7, 7.1))
    assert inference.expected(PERIOD) == 1


def test_the_warm_up_does_not_count():
    summary, _, (trace,), policy = run(2.0, 0.1)
    assert summary["latency_ms"]["max"] == pytest.approx(100)
    assert summary["latency_ms"]["calls"] == len(trace["spans"]) == len(policy.seen) - 1
    assert policy.seen[1:4] == [[0, 0], [2, 3], [5, 6]]  # one step is expected, not sixteen


def test_a_chunk_that_comes_after_its_last_action_is_dropped():
    """1 s is eight steps: its seven actions are past; the robot holds the last of the first chunk."""
    summary, _, (trace,), _ = run(0.0, 0.0, 1.0, length=30)
    assert trace["too_late"] == summary["too_late"] == summary["episodes"][0]["too_late"] >= 2
    (actions,) = MADE[0].actions[1:]
    np.testing.assert_array_equal(actions[USABLE:], [[10, USABLE - 1]] * (30 - USABLE))
    assert summary["executed_steps"] is None and "no chunk replaced" in "\n".join(report_timing(summary))


def test_warm_start_hands_over_the_rest_of_the_previous_chunk():
    _, _, _, policy = run(0.1, warm_start=0.3, episodes=2)
    warm = [(now, options) for (_, now), options in zip(policy.seen, policy.options, strict=True)][1:]
    assert [now for now, options in warm if not options] == [0, 0]  # an episode's first chunk
    for (before, _), (now, options) in zip(warm, warm[1:], strict=False):
        if options:
            assert set(options) == {"previous", "elapsed", "warm_start"} and options["warm_start"] == 0.3
            assert options["elapsed"] == now - before
            steps = [before - (OBS_STEPS - 1) + index for index in range(HORIZON)]
            np.testing.assert_array_equal(options["previous"][0, :, 1], steps)
    _, _, _, policy = run(0.1)
    assert not any(policy.options)


def test_a_real_policy_understands_the_warm_start():
    """It changes what happens, and the noise is that of the seed: on a fake clock two runs are equal."""
    torch.manual_seed(0)
    policy = tiny.policy()
    policy.normalizer.fit("agent_pos", torch.tensor([[0.0, 0.0], [50.0, 20.0]]))
    for share in (None, 0.25, 0.25):
        run(0.1, policy=policy, warm_start=share)
    cold, warm, again = (np.array(env.actions[-1]) for env in MADE)
    np.testing.assert_array_equal(warm, again)
    np.testing.assert_array_equal(cold[:ACTION_STEPS], warm[:ACTION_STEPS])  # of the first chunk
    assert np.isclose(cold[ACTION_STEPS:], warm[ACTION_STEPS:]).mean() < 0.2  # some are clipped


def test_every_episode_has_its_own_noise():
    _, _, _, policy = run(0.1, episodes=2)
    firsts = [draw for (_, now), draw in zip(policy.seen, policy.draws, strict=True) if now == 0][1:]
    generators = [torch.Generator().manual_seed(seed) for seed in (10, 11)]
    assert firsts == [torch.rand((), generator=generator).item() for generator in generators]
    assert len(set(policy.draws)) == len(policy.draws)


def test_results_are_those_of_the_environment():
    summary, films, traces, _ = run(0.1, episodes=3, length=None, videos=2)
    assert [row["seed"] for row in summary["episodes"]] == [trace["seed"] for trace in traces] == [10, 11, 12]
    for row in summary["episodes"]:
        env = FakeEnv()
        env.reset(row["seed"])
        rewards = [env.step(np.array([row["seed"], step]))[0] for step in range(env.end)]
        assert row["score"] == max(rewards) and row["steps"] == env.end
        assert row["success"] == (row["seed"] % 3 == 0)
    assert [film["seed"] for film in films] == [10, 11]


# Rate -------------------------------------------------------------------------------------------------------------


def test_deadlines_are_absolute(monkeypatch):
    """Work within a tick moves no later tick; too much of it makes ticks late, which are then caught up with."""
    clock = FakeClock()
    works = iter([0.05, 0.01, 0.3, 0.0, 0.0, 0.12, *[0.02] * 20])
    step = FakeEnv.step
    monkeypatch.setattr(FakeEnv, "step", lambda self, action: (clock.sleep(next(works) + 1e-9), step(self, action))[1])
    summary, _, (trace,) = realtime(
        TimeTeller(),
        {"name": "fake", "length": 11},
        episodes=1,
        clock=clock,
        sleep=clock.sleep,
        pool=FakePool(clock, 0.01),
        **SECONDS,
    )
    late = np.array(trace["ticks"]) - np.arange(11) * PERIOD
    expected = [0, 0, 0, 0.3 - PERIOD, 0.3 - 2 * PERIOD, 0, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(late, expected, atol=1e-7)
    control = summary["control"]
    assert control["late_share"] == pytest.approx(2 / 11) and control["ticks"] == 11
    assert control["worst_late_ms"] == pytest.approx(175, abs=1e-3)
    assert control["rate"] == 8 and control["rate_held"] == pytest.approx(8)


def test_timing_by_hand():
    """Two episodes at 10 Hz; an oversleep of 10 ms is no more than a tenth of a period, one of 11 is."""
    shared = {"holds": [], "too_late": 0}
    traces = [
        {**shared, "ticks": [0.0, 0.109, 0.2, 0.311], "spans": [(-0.04, -0.02), (0.1, 0.13)], "executed": [3, 1]},
        {**shared, "ticks": [0.0, 0.15], "spans": [(-0.1, -0.06)], "executed": [5, 7, 2], "holds": [1], "too_late": 2},
    ]
    told = timing(traces, 10)
    assert told["control"]["rate_held"] == pytest.approx(4 / 0.461)
    assert told["control"]["late_share"] == pytest.approx(2 / 6)
    assert told["control"]["worst_late_ms"] == pytest.approx(50)
    latency = told["latency_ms"]
    assert [latency[key] for key in ("median", "p95", "max")] == pytest.approx([30, 39, 40]) and latency["calls"] == 3
    assert told["stalls_per_episode"] == 0.5 and told["too_late"] == 2
    assert told["executed_steps"] == {"mean": 5, "min": 3, "max": 7}
    one = timing([{**traces[0], "ticks": [0.0]}], 10)
    assert one["control"]["rate_held"] is None and "unknown held" in report_timing(one)[0]
    assert report_timing(told) == [
        "control: 10 Hz asked, 8.677 held; 33.3% of 6 ticks late by more than 10% of a period, worst 50.0 ms",
        "inference: 30 ms median, 39 95 %, 40 max of 3 calls",
        "stalls: 0.5 steps an episode; 5.0 steps of a chunk executed (3 to 7); 2 chunks came too late",
    ]


# Threads and errors -----------------------------------------------------------------------------------------------


def inference_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("inference")]


class Failing(TimeTeller):
    """Its call number ``number`` fails."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def sample(self, obs, **options):
        if len(self.seen) == self.number:
            raise RuntimeError("no memory left")
        return super().sample(obs, **options)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_an_error_of_inference_ends_the_run(number, tmp_path):
    """The warm-up, a first chunk that is waited for, and one in flight; thread and environment are closed."""
    env = {"name": "fake", "length": 10_000, "log": str(tmp_path / "log")}
    with pytest.raises(RuntimeError, match="no memory left"):
        realtime(Failing(number), env, rate=500, episodes=1, seed=10)
    assert not inference_threads()
    assert (tmp_path / "log").read_text().split()[-2] == "close"


def test_an_error_in_flight_at_the_end_of_an_episode_is_not_lost():
    """Length 4: the second call is asked for at step 3 and never waited for by a tick."""
    with pytest.raises(RuntimeError, match="no memory left"):
        run(0.1, policy=Failing(2), length=4)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_behind_when_the_loop_stops(error, tmp_path):
    """As by Ctrl-C, which arrives in ``sleep``, while inference runs."""
    running = threading.Event()

    class Slow(TimeTeller):
        def sample(self, obs, **options):
            if len(self.seen) > 1:
                running.set()
                time.sleep(0.2)
            return super().sample(obs, **options)

    def sleep(seconds):
        time.sleep(seconds)
        if running.is_set():
            assert inference_threads()
            raise error("stop")

    env = {"name": "fake", "length": 10_000, "log": str(tmp_path / "log")}
    with pytest.raises(error):
        realtime(Slow(), env, rate=100, episodes=1, seed=10, sleep=sleep)
    assert not inference_threads()
    assert (tmp_path / "log").read_text().split()[-2] == "close"


def test_the_world_goes_on_beside_a_real_thread():
    """An inference that the test lets end only after some ticks: the loop does not wait for it."""
    steps = []

    class Waiting(TimeTeller):
        def sample(self, obs, **options):
            if len(self.seen) == 2:
                deadline = time.monotonic() + 10
                while len(MADE[0].actions[-1]) < 9 and time.monotonic() < deadline:
                    time.sleep(0.001)
                steps.append(len(MADE[0].actions[-1]))
            return super().sample(obs, **options)

    env = {"name": "fake", "length": 30}
    summary, _, (trace,) = realtime(Waiting(), env, rate=200, episodes=1, seed=10)
    assert steps[0] >= 9 and trace["holds"][:2] == [USABLE, USABLE + 1]
    assert summary["episodes"][0]["steps"] == 30 and not inference_threads()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0}, "rate: got 0, allowed: above 0"),
        ({"rate": -1.0}, "rate: got -1.0"),
        ({"rate": math.nan}, "rate: got nan"),
        ({"rate": math.inf}, "rate: got inf"),
        ({"episodes": 0}, "episodes: got 0, allowed: >= 1"),
        ({"warm_start": 0.0}, "warm_start: got 0.0, allowed: none, or above 0, to 1"),
        ({"warm_start": 1.5}, "warm_start: got 1.5"),
        ({"mode": "later"}, "mode: got 'later', allowed: async, sync"),
        ({"replan": "never"}, "replan: got 'never', allowed with mode async: needed, always"),
        ({"mode": "sync", "replan": "always"}, "replan: got 'always', allowed with mode sync: needed"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        run(0.1, **options)
    assert not MADE  # refused before anything starts


# The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    policy = tiny.policy()
    weights = {f"ema.{name}": tensor for name, tensor in policy.state_dict().items()}
    config = tiny.policy_config()
    config["task"]["env"] = {"name": "fake", "length": 20}
    save_checkpoint(tmp_path / "a.safetensors", weights, config=config, state={"step": 1})
    return str(tmp_path / "a.safetensors")


def test_command(checkpoint, tmp_path, capsys):
    """Summary with all settings, video and picture; options are heeded."""
    shared = ["--checkpoint", checkpoint, "--device", "cpu", "--rate", "200", "--seed", "100"]
    main([*shared, "--episodes", "2", "--videos", "1", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "control: 200 Hz asked" in printed and "over 2 episodes" in printed
    assert f"wrote {tmp_path}/out/summary.json, realtime.png and realtime.mp4" in printed
    assert [row["seed"] for row in summary["episodes"]] == [100, 101] and summary["control"]["ticks"] == 40
    settings = {"mode": "async", "replan": "needed", "warm_start": None, "sampler": "ddim", "steps": 4}
    settings |= {"action_steps": 4, "precision": "fp32", "checkpoint": checkpoint}
    assert {key: summary[key] for key in settings} == settings and summary["machine"]["device"] == "cpu"
    assert {"latency_ms", "stalls_per_episode", "executed_steps", "score_ci95", "success_ci95"} <= set(summary)
    assert Image.open(tmp_path / "out" / "realtime.png").size[0] > 1000
    assert (tmp_path / "out" / "realtime.mp4").stat().st_size > 0
    changed = ["--mode", "sync", "--sampler", "ddpm", "--steps", "2", "--precision", "bf16", "--action-steps", "3"]
    changed += ["--warm-start", "0.5", "--videos", "0", "--episodes", "1", "--output", str(tmp_path / "two")]
    main([*shared, *changed])
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    settings |= {"mode": "sync", "sampler": "ddpm", "steps": 2, "precision": "bf16", "action_steps": 3}
    assert {key: summary[key] for key in settings} == settings | {"warm_start": 0.5}
    assert summary["executed_steps"]["min"] == summary["executed_steps"]["max"] == 3
    assert summary["stalls_per_episode"] >= 1 and not (tmp_path / "two" / "realtime.mp4").exists()


def test_command_errors(checkpoint, tmp_path, capsys, monkeypatch):
    """One line and exit code 1; Ctrl-C writes nothing."""
    for arguments, message in (
        (["--rate", "0"], "error: rate: got 0.0"),
        (["--warm-start", "half"], "error: --warm-start: got 'half', allowed: none, or a number above 0, to 1"),
        (["--warm-start", "2"], "error: warm_start: got 2.0"),
        (["--mode", "late"], "error: mode: got 'late'"),
        (["--sampler", "euler"], "error: sampler"),
        (["--device", "tpu"], "error: --device: got 'tpu'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["--checkpoint", checkpoint, *arguments])
        error = capsys.readouterr().err
        assert stop.value.code == 1 and error.startswith(message) and error.count("\n") == 1

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "realtime", interrupt)
    with pytest.raises(SystemExit, match="interrupted: nothing was written"):
        main(["--checkpoint", checkpoint, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
