"""Rollouts: the same rows for any number of environments, what the policy sees, intervals, videos and results."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from fake_env import MADE, FakeEnv
from films import decode

from envs.pusht.env import PushT
from eval.rollout import __main__ as command
from eval.rollout.__main__ import main
from eval.rollout.loop import describe, rollout, stack, summarize, write_results
from eval.shared.intervals import mean_interval, rate_interval
from policy.build import build_model

BATCH = 25  # rows of a policy call by default
ENV = {"name": "fake_env:FakeEnv"}


@pytest.fixture(autouse=True)
def no_environments():
    MADE.clear()


def config_of(**options):
    config = tiny.policy_config(**options)
    config["task"]["env"] = ENV
    return config


class Recorder:
    """A policy that notes what it sees and returns actions that name the row's seed and step."""

    def __init__(self, obs_steps, action_steps, batch=BATCH):
        self.obs_steps, self.action_steps, self.batch = obs_steps, action_steps, batch
        self.encoder = SimpleNamespace(shapes={"agent_pos": (2,)})
        self.seen, self.draws, self.asked = [], {}, []

    def act(self, obs, *, generator, num_inference_steps):
        place = obs["agent_pos"]
        assert set(obs) == {"agent_pos"}
        assert place.shape == (self.batch, self.obs_steps, 2) and len(generator) == self.batch
        self.asked.append(num_inference_steps)
        now, drawn = set(), []
        for row, one in zip(place, generator, strict=True):
            seed, step = (int(number) for number in row[-1])
            number = torch.rand((), generator=one).item()
            if seed not in now:  # rows that fill up the batch repeat another
                now.add(seed)
                self.seen.append((seed, [int(s) for s in row[:, 1]]))
                assert {int(s) for s in row[:, 0]} == {seed}
            drawn.append((seed, number))
        for seed in now:
            self.draws.setdefault(seed, []).append([number for s, number in drawn if s == seed])
        offsets = torch.arange(self.action_steps)[None, :, None].expand(self.batch, -1, 1)
        return torch.cat([place[:, -1:, :1].expand_as(offsets), place[:, -1:, 1:] + offsets], dim=2)


# Observations and actions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("obs_steps", "action_steps"), [(2, 4), (1, 3), (3, 2), (2, 1), (3, 3)])
def test_the_policy_sees_the_last_observations(obs_steps, action_steps):
    policy = Recorder(obs_steps, action_steps)
    rollout(policy, {**ENV, "length": 9}, episodes=3, seed=10, num_envs=2)
    for seed in (10, 11, 12):
        histories = [steps for s, steps in policy.seen if s == seed]
        calls = math.ceil(9 / action_steps)
        assert len(histories) == calls
        for call, steps in enumerate(histories):
            now = call * action_steps
            assert steps == [max(now - back, 0) for back in reversed(range(obs_steps))]


@pytest.mark.parametrize(("obs_steps", "action_steps"), [(2, 4), (1, 3), (3, 2)])
def test_only_needed_steps_are_observed(obs_steps, action_steps):
    """The start, then the last To of every Ta steps; the end of an episode is not looked at."""
    rollout(Recorder(obs_steps, action_steps), {**ENV, "length": 9}, episodes=2, seed=10, num_envs=1)
    (env,) = MADE
    expected = [0]
    for now in range(0, 9, action_steps):
        chunk = range(now + 1, now + action_steps + 1)
        expected += [step for step in list(chunk)[-obs_steps:] if step < 9]
    assert env.observed == [(seed, step) for seed in (10, 11) for step in expected]
    assert env.framed == 0


def test_actions_are_executed_in_order():
    policy = Recorder(2, 4)
    summary, _ = rollout(policy, ENV, episodes=5, seed=10, num_envs=2)
    assert len(MADE) == 2
    for env in MADE:
        for seed, actions in zip(env.seeds, env.actions, strict=True):
            length = 3 + 7 * seed % 11
            np.testing.assert_array_equal(actions, [[seed, step] for step in range(length)])
    assert sorted(seed for env in MADE for seed in env.seeds) == [10, 11, 12, 13, 14]
    assert [row["steps"] for row in summary["episodes"]] == [3 + 7 * seed % 11 for seed in range(10, 15)]


def test_every_episode_has_its_own_noise():
    """The generator of an episode is seeded by its seed and advances with its own calls only."""
    policy = Recorder(2, 4)
    rollout(policy, ENV, episodes=6, seed=10, num_envs=3, num_inference_steps=7)
    for seed in range(10, 16):
        generator = torch.Generator().manual_seed(seed)
        for numbers in policy.draws[seed]:
            assert torch.rand((), generator=generator).item() in numbers
    assert set(policy.asked) == {7}


# Scores ----------------------------------------------------------------------------------------------------------


def tiny_policy(**options):
    torch.manual_seed(0)
    policy = build_model(config_of(**options)).eval()
    policy.normalizer.fit("agent_pos", torch.tensor([[0.0, 0.0], [50.0, 20.0]]))
    return policy


def test_scores_follow_from_the_rewards():
    """An episode's score is its largest reward, success that of any step; seeds are consecutive."""
    summary, _ = rollout(Recorder(2, 4), ENV, episodes=7, seed=30, num_envs=3)
    assert [row["seed"] for row in summary["episodes"]] == list(range(30, 37))
    for row in summary["episodes"]:
        env = FakeEnv()
        env.reset(row["seed"])
        rewards, done = [], False
        while not done:
            reward, done, _ = env.step(np.array([row["seed"], env.steps]))
            rewards.append(reward)
        assert row == {"seed": env.seed, "score": max(rewards), "success": env.seed % 3 == 0, "steps": len(rewards)}
        assert type(row["success"]) is bool
    scores = [row["score"] for row in summary["episodes"]]
    assert summary["score_mean"] == pytest.approx(sum(scores) / 7)
    assert summary["success_rate"] == pytest.approx(3 / 7)


@pytest.mark.parametrize("images", [False, True])
def test_results_do_not_depend_on_the_number_of_environments(images):
    """Bit for bit, in an environment that doubles every difference with each step."""
    denoiser = {"widths": [32, 64], "kernel_size": 3, "groups": 8, "step_dim": 64}  # torch rounds by the place of a row
    policy = tiny_policy(images=images, sampler="ddpm", model={"denoiser": denoiser})
    run = {"episodes": 6 if images else 2 + BATCH, "seed": 100, "num_inference_steps": 2}
    expected, _ = rollout(policy, {**ENV, "images": images}, num_envs=1, **run)
    assert len({row["score"] for row in expected["episodes"]}) == run["episodes"]
    for num_envs in (3, 50) if images else (3, 7, 50):
        summary, _ = rollout(policy, {**ENV, "images": images}, num_envs=num_envs, **run)
        assert summary == expected
    # Nor on which other episodes there are.
    alone, _ = rollout(policy, {**ENV, "images": images}, episodes=1, seed=104, num_inference_steps=2)
    assert alone["episodes"] == expected["episodes"][4:5]


def test_images_have_one_order_in_memory():
    """That of the simulators' pixels, whether they came through a pipe or not; convolutions round by it."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 2, 6, 4, 3), dtype=np.uint8)
    drawn = list(pixels.transpose(0, 1, 4, 2, 3))
    for values in (drawn, [np.ascontiguousarray(value) for value in drawn]):
        stacked = stack(values)
        np.testing.assert_array_equal(stacked.numpy(), np.stack(drawn), strict=True)
        assert stacked.permute(0, 1, 3, 4, 2).is_contiguous()
    assert stack([np.zeros((2, 3))] * 4).is_contiguous()


def test_options_of_a_rollout_matter():
    policy = tiny_policy()
    run = {"episodes": 3, "seed": 100}
    expected, _ = rollout(policy, ENV, **run)
    assert rollout(policy, ENV, **run)[0] == expected
    assert rollout(policy, ENV, **run, num_inference_steps=2)[0] != expected
    assert rollout(policy, {**ENV, "length": 2}, **run)[0] != expected
    other = rollout(policy, ENV, episodes=3, seed=101)[0]["episodes"]
    assert other[:2] == expected["episodes"][1:]


@pytest.mark.parametrize("batch", [1, 5])
def test_rows_of_a_policy_call(batch):
    """An episode has row seed % batch, whoever else runs; those that want the same row go into another call."""
    policy = Recorder(2, 4, batch)
    summary, _ = rollout(policy, ENV, episodes=7, seed=30, num_envs=7, batch=batch)
    assert summary == rollout(Recorder(2, 4), ENV, episodes=7, seed=30)[0]
    generator = torch.Generator().manual_seed(33)
    for numbers in policy.draws[33]:
        assert torch.rand((), generator=generator).item() in numbers
    config = tiny_policy(sampler="ddpm")
    expected, _ = rollout(config, ENV, episodes=7, seed=30, batch=batch)
    assert rollout(config, ENV, episodes=7, seed=30, num_envs=2, batch=batch)[0] == expected


@pytest.mark.parametrize(
    ("key", "options"),
    [(key, {key: 0}) for key in ("episodes", "num_envs", "batch")] + [("workers", {"workers": -1})],
)
def test_numbers_that_cannot_be(key, options):
    with pytest.raises(ValueError, match=key):
        rollout(Recorder(2, 4), ENV, **{"episodes": 1, "seed": 0, **options})


def test_environments_that_cannot_be():
    with pytest.raises(ValueError, match="task.env.name"):
        rollout(Recorder(2, 4), {"name": "unreal"}, episodes=1, seed=0)
    with pytest.raises(ValueError, match="states"):
        rollout(Recorder(2, 4), ENV, episodes=1, seed=0, states=True)
    policy = Recorder(2, 4)
    policy.encoder.shapes["wrist"] = (3, 8, 8)
    with pytest.raises(ValueError, match="wrist"):
        rollout(policy, ENV, episodes=1, seed=0)


def test_environments_of_this_process_are_closed(tmp_path):
    rollout(Recorder(2, 4), {**ENV, "log": tmp_path / "a"}, episodes=5, seed=0, num_envs=2)
    assert (tmp_path / "a").read_text().count("close") == 2
    trouble = {"kind": "raise", "seed": 1, "step": 2}
    with pytest.raises(ValueError, match="action"):
        rollout(Recorder(2, 4), {**ENV, "log": tmp_path / "b", "trouble": trouble}, episodes=5, seed=0)
    assert (tmp_path / "b").read_text().count("close") == (tmp_path / "b").read_text().count("made") > 0


def test_pusht_by_hand():
    """Two short real episodes equal the plain loop: look, act, step; whatever the number of environments."""
    config = tiny.policy_config(images=True, crop=20)
    config["task"]["shape_meta"]["obs"]["image"]["shape"] = [3, 24, 24]
    torch.manual_seed(0)
    policy = build_model(config).eval()
    bounds = torch.tensor([[0.0, 0.0], [512.0, 512.0]])
    policy.normalizer.fit("agent_pos", bounds), policy.normalizer.fit("action", bounds)
    env = {"name": "pusht", "max_steps": 10, "image_size": 24}
    summary, films = rollout(policy, env, episodes=2, seed=100_000, num_envs=2, videos=1)
    again, _ = rollout(policy, env, episodes=2, seed=100_000, num_envs=1)
    assert again == summary
    assert [row["steps"] for row in summary["episodes"]] == [10, 10]
    assert len(films) == 1 and len(films[0]["frames"]) == 11 and films[0]["frames"][0].shape == (256, 256, 3)
    for row in summary["episodes"]:
        world, generator = PushT(max_steps=10, image_size=24), torch.Generator().manual_seed(row["seed"])
        world.reset(row["seed"])
        looks, rewards, done = [world.observe()] * 2, [], False
        while not done:
            obs = {key: np.stack([look[key] for look in looks[-2:]])[None] for key in looks[-1]}
            # All rows alike, so that rounding is that of the rollout.
            obs = {key: np.repeat(value, BATCH, axis=0) for key, value in obs.items()}
            generators = [torch.Generator() for _ in range(BATCH)]
            generators[row["seed"] % BATCH] = generator
            for action in policy.act(obs, generator=generators)[row["seed"] % BATCH].numpy():
                reward, done, _ = world.step(action)
                rewards.append(reward)
                looks.append(world.observe())
                if done:
                    break
        assert row["score"] == max(rewards)


# Results and films -----------------------------------------------------------------------------------------------


def test_films_of_a_rollout(tmp_path):
    policy = Recorder(2, 4)
    summary, films = rollout(policy, ENV, episodes=4, seed=10, num_envs=2, videos=2)
    assert [one["seed"] for one in films] == [10, 11]
    for one, row in zip(films, summary["episodes"], strict=False):
        assert len(one["frames"]) == len(one["score"]) == row["steps"] + 1
        assert one["score"] == sorted(one["score"]) and one["score"][0] == 0 and one["score"][-1] == row["score"]
        assert one["success"] == row["success"]
        assert [frame[0, 0, 0] for frame in one["frames"]] == [20 * step % 256 for step in range(row["steps"] + 1)]
    assert sum(env.framed for env in MADE) == sum(row["steps"] + 1 for row in summary["episodes"][:2])
    write_results(tmp_path / "out", summary, films, name="epoch")
    assert len(decode(tmp_path / "out" / "epoch.mp4")) == max(len(one["frames"]) for one in films) + 8
    write_results(tmp_path / "none", summary, [])
    assert [file.name for file in (tmp_path / "none").iterdir()] == ["summary.json"]


def test_visited_states():
    """From the start to the end of every episode, in the order of the seeds; asking for them changes nothing else."""
    run = {"episodes": 5, "seed": 10, "num_envs": 2, "videos": 1}
    summary, films, visited = rollout(tiny_policy(), {"name": "fake_env:StatefulEnv"}, states=True, **run)
    for row, episode in zip(summary["episodes"], visited, strict=True):
        assert episode.keys() == {*row, "states"} and {key: episode[key] for key in row} == row
        states = episode["states"]
        assert states.shape == (row["steps"] + 1, 4) and states.dtype == np.float64
        assert (states[:, 0] == row["seed"]).all() and states[:, 1].tolist() == list(range(row["steps"] + 1))
        assert states[1:, 2].max() == row["score"]
    again = rollout(tiny_policy(), {"name": "fake_env:StatefulEnv"}, **run)
    assert again[0] == summary and len(again) == 2 and len(again[1]) == len(films) == 1


def test_visited_states_of_pusht_can_be_restored():
    env = {"name": "pusht", "max_steps": 6, "image_size": 24}
    _, _, (episode,) = rollout(Recorder(2, 4), env, episodes=1, seed=7, states=True)
    world = PushT(max_steps=6)
    world.reset(7)
    np.testing.assert_array_equal(episode["states"][0], world.state)
    assert episode["states"].shape == (7, 5)
    for state in episode["states"]:
        world.reset_to(state)
        np.testing.assert_allclose(world.state, state, atol=1e-9)


def test_summary_of_rows():
    rows = [{"seed": seed, "score": score, "success": score == 1, "steps": 5} for seed, score in enumerate([1, 0.5, 0])]
    summary = summarize(rows)
    assert list(summary) == ["score_mean", "score_ci95", "success_rate", "success_ci95", "episodes"]
    assert summary["score_mean"] == 0.5 and summary["success_rate"] == pytest.approx(1 / 3)
    assert summary["score_ci95"] == mean_interval([1, 0.5, 0]) and summary["success_ci95"] == rate_interval(1, 3)
    assert summary["episodes"] == rows
    assert all(part in describe(summary) for part in ("0.500 [0.000, 1.000]", "33% [6%, 79%]", "3 episodes"))


def test_command(tmp_path, capsys, monkeypatch):
    """From a checkpoint file to summary.json and a video; --steps and --action-steps are heeded."""
    policy = tiny_policy()
    checkpoint = tiny.save(tmp_path / "run" / "checkpoints" / "last.safetensors", policy, config_of())
    shared = ["--episodes", "3", "--seed", "100", "--num-envs", "2", "--device", "cpu", "--allow-import"]
    main(["--checkpoint", str(tmp_path / "run"), *shared, "--videos", "1", "--output", str(tmp_path / "out")])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    expected, _ = rollout(policy, ENV, episodes=3, seed=100)
    assert {"score_mean", "score_ci95", "success_rate", "success_ci95", "episodes"} <= set(summary)
    assert {key: summary[key] for key in expected} == expected
    assert set(summary["episodes"][0]) >= {"seed", "score", "success", "steps"}
    printed = capsys.readouterr().out
    assert describe(expected) in printed and f"wrote {tmp_path / 'out'}/summary.json" in printed
    assert re.search(r"over 3 episodes, [1-9]\d* environment steps/s\n", printed)
    assert decode(tmp_path / "out" / "rollout.mp4").shape[1:] == (32, 32, 3)
    monkeypatch.chdir(tmp_path)
    main(["--checkpoint", str(checkpoint), *shared, "--videos", "0", "--steps", "2", "--output", "two"])
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    fewer, _ = rollout(policy, ENV, episodes=3, seed=100, num_inference_steps=2)
    assert two["episodes"] == fewer["episodes"] != expected["episodes"]
    main(["--checkpoint", str(checkpoint), *shared, "--videos", "0", "--action-steps", "1", "--output", "one"])
    one = json.loads((tmp_path / "one" / "summary.json").read_text())
    policy.action_steps = 1
    closer, _ = rollout(policy, ENV, episodes=3, seed=100)
    assert one["episodes"] == closer["episodes"] != expected["episodes"]


def test_command_takes_the_loop_of_the_training_run(tmp_path, monkeypatch):
    """Unless it is told otherwise; checkpoints of older runs lack some or all of it."""
    seen = {}
    empty = {"score_ci95": (0, 0), "success_ci95": (0, 0), "score_mean": 0, "success_rate": 0, "episodes": []}
    monkeypatch.setattr(command, "rollout", lambda policy, env, **options: seen.update(options) or (empty, []))
    loop = {"num_envs": 3, "workers": 2, "batch": 5}
    for stored, arguments, expected in (
        ({"rollout": {"episodes": 9, "seed": 1, "videos": 1, **loop}}, [], loop),
        ({"rollout": loop}, ["--workers", "0", "--num-envs", "4"], {"num_envs": 4, "workers": 0, "batch": 5}),
        ({"rollout": {"num_envs": 3}}, ["--batch", "7"], {"num_envs": 3, "batch": 7}),
        ({}, [], {}),
    ):
        path = tiny.save(tmp_path / "a.safetensors", tiny_policy(), config_of() | stored)
        seen.clear()
        main(["--checkpoint", str(path), "--allow-import", "--output", str(tmp_path / "out"), *arguments])
        assert {key: seen[key] for key in loop if key in seen} == expected
        assert seen["episodes"] == 50 and seen["seed"] == 100_000 and seen["videos"] == 9


def test_command_errors(tmp_path, capsys, monkeypatch):
    """One line and exit code 1."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, key in (
        (["--checkpoint", str(tmp_path / "none")], "checkpoint"),
        (["--checkpoint", str(tmp_path), "--device", "cuda"], "--device"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {key}") and error.count("\n") == 1
