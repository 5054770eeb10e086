"""The expert in the loop: rounds at their steps, data that grows, and runs that go on exactly where they stopped."""

import json
from functools import partial

import numpy as np
import pytest
import tiny
import torch
import zarr
from trained import assert_identical, everything

from envs import CORRECTIONS
from eval.rollout import dagger
from eval.rollout.loop import summarize
from policy.build import build_model, data_sources
from policy.dataset.features import extend_dataset
from policy.training.trainer import Trainer

DAGGER = {"rounds": 2, "start": 0.5, "rollouts": 3, "episodes": 4, "seed": 900}


def options_of(**changes):
    config = tiny.policy_config()
    return {
        **config,
        "storage": "ram",
        "cache_dir": None,
        "seed": 0,
        "task": {**config["task"], "env": {"name": "fake", "image_size": 12}, "shape_meta": sources(config)},
        "rollout": {"num_envs": 2, "workers": 0, "batch": 2},
        "dagger": {**DAGGER, **changes},
    }


def sources(config):
    """The shape_meta of ``config`` with the names of the arrays in a zarr."""
    meta = config["task"]["shape_meta"]
    obs = {key: {**spec, "source": key} for key, spec in meta["obs"].items()}
    return {"obs": obs, "action": {**meta["action"], "source": "action"}}


def write_episodes(path, number):
    buffer = tiny.replay_buffer(lengths=(8, 11), images=False, seed=number)
    root = zarr.open_group(str(path), mode="w", zarr_format=2)
    for key, array in buffer.arrays.items():
        root.create_array(f"data/{key}", data=array)
    root.create_array("meta/episode_ends", data=buffer.episode_ends)


class Run:
    """A training run of 12 steps with rounds after steps 6 and 9; the expert's episodes are random numbers."""

    def __init__(self, folder, monkeypatch, *, resume=False, **changes):
        folder.mkdir(exist_ok=True)
        self.options, self.folder, self.collected, self.seen = options_of(**changes), folder, [], []
        torch.manual_seed(0)
        model = build_model(self.options)
        self.data = tiny.window_data(self.options, tiny.replay_buffer(images=False), episodes=[0, 1])  # 15 windows
        model.fit_normalizer(self.data)
        training = tiny.training_options(epochs=100, max_steps=12, batch_size=5)
        self.trainer = Trainer(
            model, self.data, None, options=training, config=self.options, run_dir=folder, device="cpu"
        )
        if resume:
            self.trainer.resume()
        batch = self.data.batch
        self.data.batch = lambda indices: self.seen.append(max(indices)) or batch(indices)

        def collect(policy, options, number, output, *, env, loop, log):
            weights = sum(float(p.sum()) for p in policy.parameters())
            self.collected.append((number, self.trainer.step, weights))
            output.parent.mkdir(exist_ok=True)
            log({"round": number, "round_score": 0.5, "round_success": 0.25})
            write_episodes(output, number)

        monkeypatch.setattr(dagger, "collect", collect)

    def fit(self):
        sources = data_sources(self.options["task"]["shape_meta"])
        extend = partial(extend_dataset, self.data, sources=sources, policy=self.trainer.raw_model)
        own = {"env": self.options["task"]["env"], "loop": self.options["rollout"], "run_dir": self.folder}
        dagger.fit_with_corrections(self.trainer, self.options["dagger"], **own, extend=extend)
        return self


def test_when_the_rounds_are():
    assert dagger.round_steps(0, start=0.4, total=100) == []
    assert dagger.round_steps(1, start=0.4, total=100) == [40]
    assert dagger.round_steps(4, start=0.2, total=100) == [20, 40, 60, 80]


def test_rounds_add_their_episodes_and_training_goes_on(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", monkeypatch).fit()
    assert [(number, step) for number, step, _ in run.collected] == [(1, 6), (2, 9)]
    assert run.collected[0][2] != run.collected[1][2]  # the policy as it then was
    assert run.trainer.step == 12
    assert list(run.data.episodes) == [0, 1, 3, 4, 5, 6]  # 2 is held out
    assert run.data.buffer.num_frames == 31 + 19 + 19
    windows = [15, 15 + 13, 15 + 26]  # of three data sets
    assert max(run.seen[:6]) < windows[0] <= max(run.seen[6:9]) < windows[1] <= max(run.seen[9:]) < windows[2]
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    rounds = [(line["step"], line["round"], line["round_success"]) for line in lines if "round" in line]
    assert rounds == [(6, 1, 0.25), (9, 2, 0.25)]


def test_without_rounds_it_is_the_plain_run(tmp_path, monkeypatch):
    plain = Run(tmp_path / "plain", monkeypatch, rounds=0)
    plain.trainer.fit()
    run = Run(tmp_path / "run", monkeypatch, rounds=0).fit()
    assert_identical(everything(run.trainer), everything(plain.trainer))
    assert run.collected == []
    other = Run(tmp_path / "other", monkeypatch).fit()
    assert not torch.equal(*(everything(r.trainer)["model.denoiser.out.1.weight"] for r in (run, other)))


@pytest.mark.parametrize("stop", [4, 6, 7, 9, 11])
def test_a_stopped_run_goes_on_exactly(tmp_path, monkeypatch, stop):
    straight = Run(tmp_path / "straight", monkeypatch).fit()
    first = Run(tmp_path / "run", monkeypatch)
    fit = first.trainer.fit

    def interrupted(stop_at=None):
        fit(stop_at=min(stop, stop_at or 12))
        if first.trainer.step == stop:
            raise KeyboardInterrupt

    first.trainer.fit = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = Run(tmp_path / "run", monkeypatch, resume=True).fit()
    assert_identical(everything(second.trainer), everything(straight.trainer))
    made = [number for run in (first, second) for number, *_ in run.collected]
    assert made == [1, 2]  # each round once


def test_a_run_beyond_a_round_that_is_gone(tmp_path, monkeypatch):
    Run(tmp_path / "run", monkeypatch).fit()
    (tmp_path / "run/dagger/round_01.zarr").rename(tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match=r"got no .*round_01.zarr, but the run is beyond its step 6; restore it"
    ):
        Run(tmp_path / "run", monkeypatch, resume=True).fit()


def test_a_round_rolls_out_on_its_own_seeds_and_asks_for_corrections(tmp_path, monkeypatch):
    asked = {}

    def rollout(policy, env, **given):
        asked["rollout"] = given
        rows = [{"seed": 1, "score": 0.5, "success": False, "steps": 3}]
        return summarize(rows), [], [{**rows[0], "states": np.zeros((4, 5))}]

    monkeypatch.setattr(dagger, "rollout", rollout)
    monkeypatch.setattr(dagger, "make_corrections", lambda name, **given: asked.update(name=name, made=given))
    logged = []
    own = {"env": options_of()["task"]["env"], "loop": options_of()["rollout"], "log": logged.append}
    dagger.collect(None, options_of()["dagger"], 3, tmp_path / "dagger" / "round_03.zarr", **own)
    assert asked["rollout"]["seed"] == 900 + 2 * 3 and asked["rollout"]["episodes"] == 3 and asked["rollout"]["states"]
    assert asked["name"] == "fake" and asked["made"]["count"] == 4 and len(asked["made"]["visited"]) == 1
    assert logged == [{"round": 3, "round_score": 0.5, "round_success": 0.0}]
    assert json.loads((tmp_path / "dagger/round_03.json").read_text())["score_mean"] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": -1}, "dagger.rounds"),
        ({"start": 1.0}, "dagger.start"),
        ({"rollouts": 0}, "dagger.rollouts"),
        ({}, "no expert"),
    ],
)
def test_wrong_options(changes, message):
    with pytest.raises(ValueError, match=message):
        dagger.check_dagger(options_of(**changes)["dagger"], env_name="fake")


def test_right_options(monkeypatch):
    dagger.check_dagger(options_of(rounds=0)["dagger"], env_name="fake")
    monkeypatch.setitem(CORRECTIONS, "fake", "nowhere:nothing")
    dagger.check_dagger(options_of()["dagger"], env_name="fake")
