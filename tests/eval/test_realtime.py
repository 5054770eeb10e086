"""Real-time control on a fake clock: actions at their steps, rate, stalls, errors, the command."""

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

from eval.realtime import __main__ as command
from eval.realtime.__main__ import main
from eval.realtime.loop import Inference, realtime
from eval.realtime.timing import report_timing, timing

HORIZON, OBS_STEPS, ACTION_STEPS = 8, 2, 4
USABLE = HORIZON - OBS_STEPS + 1  # actions of a chunk from the observed step on
PERIOD = 0.125  # s, exact in binary
SECONDS = {"rate": 1 / PERIOD, "seed": 10}
ENV = {"name": "fake_env:FakeEnv"}


@pytest.fixture(autouse=True)
def no_environments():
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
    options = {**SECONDS, **options, "clock": clock, "sleep": clock.sleep, "pool": pool}
    results = realtime(policy, {**ENV, "length": length}, episodes=episodes, **options)
    assert pool.closed
    return *results, policy


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
    inference = Inference(None, None, warm_start=None, clock=None)
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
    options = {"clock": clock, "sleep": clock.sleep, "pool": FakePool(clock, 0.01), **SECONDS}
    summary, _, (trace,) = realtime(TimeTeller(), {**ENV, "length": 11}, episodes=1, **options)
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
    assert one["control"]["rate_held"] is None and "unknown" in report_timing(one)[0]
    shown = (("8.677", "33.3%", "50.0 ms"), ("30 ms", "39", "40"), ("0.5", "5.0"))
    for line, numbers in zip(report_timing(told), shown, strict=True):
        assert all(number in line for number in numbers)


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
    env = {**ENV, "length": 10_000, "log": str(tmp_path / "log")}
    with pytest.raises(RuntimeError, match="no memory left"):
        realtime(Failing(number), env, rate=500, episodes=1, seed=10)
    assert not inference_threads()
    assert (tmp_path / "log").read_text().split()[-2] == "close"


def test_an_error_in_flight_at_the_end_of_an_episode_is_not_lost():
    """Length 4: the second call is asked for at step 3 and never waited for by a tick."""
    with pytest.raises(RuntimeError):
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

    env = {**ENV, "length": 10_000, "log": str(tmp_path / "log")}
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

    env = {**ENV, "length": 30}
    summary, _, (trace,) = realtime(Waiting(), env, rate=200, episodes=1, seed=10)
    assert steps[0] >= 9 and trace["holds"][:2] == [USABLE, USABLE + 1]
    assert summary["episodes"][0]["steps"] == 30 and not inference_threads()


@pytest.mark.parametrize(
    ("key", "options"),
    [("rate", {"rate": rate}) for rate in (0, -1.0, math.nan, math.inf)]
    + [("episodes", {"episodes": 0}), ("warm_start", {"warm_start": 0.0}), ("warm_start", {"warm_start": 1.5})]
    + [("mode", {"mode": "later"}), ("replan", {"replan": "never"}), ("replan", {"mode": "sync", "replan": "always"})],
)
def test_bad_options(key, options):
    with pytest.raises(ValueError, match=key):
        run(0.1, **options)
    assert not MADE  # refused before anything starts


# The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    config = tiny.policy_config()
    config["task"]["env"] = {**ENV, "length": 20}
    return str(tiny.save(tmp_path / "a.safetensors", tiny.policy(), config))


def test_command(checkpoint, tmp_path, capsys):
    """Summary with all settings, video and picture; options are heeded."""
    shared = ["--checkpoint", checkpoint, "--device", "cpu", "--rate", "200", "--seed", "100", "--allow-import"]
    main([*shared, "--episodes", "2", "--videos", "1", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "200 Hz" in printed and "2 episodes" in printed and f"{tmp_path}/out/summary.json" in printed
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
    wrong = {"rate": "0", "warm-start": "half", "mode": "late", "sampler": "euler", "device": "tpu"}
    for option, value in wrong.items():
        with pytest.raises(SystemExit) as stop:
            main(["--checkpoint", checkpoint, "--allow-import", f"--{option}", value])
        error = capsys.readouterr().err
        assert stop.value.code == 1 and option in error and error.startswith("error: ") and error.count("\n") == 1

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "realtime", interrupt)
    with pytest.raises(SystemExit, match="interrupted"):
        main(["--checkpoint", checkpoint, "--allow-import", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
