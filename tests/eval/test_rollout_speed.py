"""python -m eval.speed rollout: the same episodes by two loops, the usual one drawing after every step."""

import json

import fake_env
import pytest
import tiny

from eval.speed import __main__ as speed
from eval.speed import rollout as rollout_speed
from eval.speed.rollout import DrawEveryStep, measure_rollout

ENV = {"name": "fake_env:FakeEnv"}
RUN = {"episodes": 5, "seed": 100, "batch": 4}


@pytest.fixture(autouse=True)
def no_environments():
    fake_env.MADE.clear()


def test_the_usual_loop_draws_after_every_step():
    env = DrawEveryStep(ENV)
    env.reset(3)
    (inner,) = fake_env.MADE
    for _ in range(4):
        env.step(fake_env.np.zeros(2))
    assert inner.observed == [(3, step) for step in range(5)]
    assert env.observe()["agent_pos"].tolist() == [3, 4] and len(inner.observed) == 5
    assert env.frame(8).shape == (8, 8, 3)


def test_both_loops_run_the_same_episodes(monkeypatch):
    times = iter([0.0, 10.0, 10.0, 14.0])  # s: 10 for the usual loop, 4 for ours
    monkeypatch.setattr(rollout_speed.time, "perf_counter", lambda: next(times))
    usual, ours = measure_rollout(tiny.policy(), ENV, num_envs=3, workers=0, **RUN)
    steps = sum(3 + 7 * seed % 11 for seed in range(100, 105))  # the lengths of FakeEnv's episodes
    assert usual["steps"] == ours["steps"] == steps and usual["success_rate"] == ours["success_rate"]
    assert [[row[key] for key in ("num_envs", "workers", "batch")] for row in (usual, ours)] == [[1, 0, 1], [3, 0, 4]]
    assert usual["steps_per_second"] == pytest.approx(steps / 10) and usual["ratio"] == 1
    assert ours["steps_per_second"] == pytest.approx(steps / 4) and ours["ratio"] == pytest.approx(2.5)
    drawn = [len(env.observed) for env in fake_env.MADE]
    assert drawn[0] == steps + 5 and sum(drawn[1:]) < 0.7 * steps  # the wrapped one first


def test_the_command_writes_both_loops(tmp_path, capsys):
    config = tiny.policy_config()
    config["task"] |= {"name": "fake", "env": ENV}
    config["rollout"] = {"seed": 100, "batch": 4, "num_envs": 2, "workers": 0}
    path = tiny.save(tmp_path / "policy.safetensors", tiny.policy(), config)
    speed.main(["rollout", "--checkpoint", str(path), "--allow-import", "--episodes", "3", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "rollout.json").read_text())
    assert [row["num_envs"] for row in results["rows"]] == [1, 2] and results["settings"]["episodes"] == 3
    text = (tmp_path / "rollout.md").read_text()
    assert text in capsys.readouterr().out and "drawn at every step" in text and "fake, the same 3 seeds" in text
