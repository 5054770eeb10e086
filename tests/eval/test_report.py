"""``python -m eval.report``: runs of every kind, how it groups them, its numbers, what it reads and refuses."""

import json
import re

import numpy as np
import pytest
import tiny
from run_folders import FINISHED, groups_of, reported, summary, write_finished, write_run
from scipy import stats

from eval.report import __main__ as report
from eval.report.groups import estimate, pooled_success
from eval.report.kinds import KINDS
from eval.report.runs import read_lines, read_runs
from eval.shared.intervals import mean_interval, rate_interval, seed_interval, t_quantile
from policy.build import build_model

SCORE, SUCCESS = KINDS["diffusion"].metrics

# Kinds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "task", "expected"),
    [
        (
            "image_classifier",
            "cifar10",
            {"top-1, % [95 %]": "50.0 [40.0, 60.0]", "parameters": "2.50 M"},
        ),
        ("video_classifier", "ntu", {"top-1, % [95 %]": "50.0 [40.0, 60.0]", "best top-1, %": "40.0"}),
        ("mae", "cifar10", {"held-out loss [95 %]": "0.7000"}),
        ("keypoints", "pusht", {"held-out error, px [95 %]": "2.50", "minutes": "0.3"}),
        ("language", "embedded text", {"bits a byte [95 %]": "2.100", "perplexity [95 %]": "4.30"}),
        ("translation", "wmt.en", {"BLEU [95 %]": "31.5 [30.0, 33.0]", "exact, % [95 %]": "25.0"}),
        ("of_tomorrow", "new", {"held-out loss [95 %]": "3.0000"}),
    ],
)
def test_every_kind_has_its_own_numbers(tmp_path, model, task, expected):
    page, tables, numbers = reported(tmp_path, write_finished(tmp_path / "run", model))
    (part,) = numbers["parts"]
    assert part["task"] == task and f"## {part['kind']}: {task}" in tables
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables.splitlines() if line[:1] == "|"]
    row = dict(zip(rows[0], rows[2], strict=True))
    assert expected.items() <= row.items() and "data:image/png" in page


def test_a_sweep_over_attention_is_a_table(tmp_path):
    """Means and t-intervals over seeds, a row a mechanism."""
    for number, (name, seed, top1) in enumerate([("a", 1, 0.5), ("a", 2, 0.7), ("b", 1, 0.4), ("b", 2, 0.6)]):
        folder = write_finished(tmp_path / f"sweep/{number}", "image_classifier", seed=seed, **{"attention.name": name})
        (folder / "summary.json").write_text(json.dumps({"top1": top1, "top1_ci95": [0, 1], "top5": 1.0}))
    (part,) = reported(tmp_path, tmp_path / "sweep")[2]["parts"]
    assert [group["name"] for group in part["groups"]] == ["attention=a", "attention=b"]
    found = part["groups"][0]["last"]["top1"]
    assert found["mean"] == pytest.approx(0.6) and found["kind"] == "seeds" and found["interval"] == [0.0, 1.0]


def test_kinds_and_tasks_are_apart(tmp_path):
    for model in FINISHED:
        write_finished(tmp_path / "runs" / model, model)
    write_run(tmp_path / "runs/0")
    write_run(tmp_path / "runs/1", task="lift")
    page, tables, numbers = reported(tmp_path, tmp_path / "runs")
    kinds = [(part["kind"], part["task"]) for part in numbers["parts"]]
    assert len(kinds) == len(set(kinds)) == len(FINISHED) + 2
    assert all(f"{kind}: {task}" in page and f"## {kind}: {task}\n" in tables for kind, task in kinds)
    assert "What differs" not in page


def test_the_resolved_configuration_counts(tmp_path):
    """config.yaml is the composed one, whose references need resolvers that the report does not know."""
    folder = write_finished(tmp_path / "run", "language", **{"training.lr": "${unknown:1,2}"})
    (run,) = read_runs([folder])[0]
    assert run.options["training.lr"] == "${unknown:1,2}"
    (folder / "resolved.yaml").write_text("model: {name: language}\ntraining: {lr: 0.5}\nlabel: x\n")
    (run,) = read_runs([folder])[0]
    assert run.options["training.lr"] == 0.5
    other = write_finished(tmp_path / "other", "language")
    (other / "resolved.yaml").write_text("model: {name: language}\ntraining: {lr: 0.5}\nlabel: y\noutput: elsewhere\n")
    assert len(groups_of(folder, other)) == 1  # where a run lies and what it is called make no other group


def test_results_of_tests_are_read_without_a_run(tmp_path):
    for name, top1 in (("one", 0.5), ("other", 0.6)):
        (tmp_path / name).mkdir()
        results = {"data": "cifar10", "mode": "probe", "encoder": name, "top1": top1, "top1_ci95": [0.4, 0.7]}
        (tmp_path / name / "summary.json").write_text(json.dumps(results))
    one, other = groups_of(tmp_path / "one", tmp_path / "other")
    assert (one.name, other.name) == ("encoder=one", "encoder=other") and one.runs[0].task == "cifar10"


# Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 29, 200, 1001])
def test_quantiles_of_student_are_those_of_scipy(degrees):
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)


def test_a_quantile_needs_a_degree_of_freedom():
    with pytest.raises(ValueError, match="degrees"):
        t_quantile(0)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_interval_over_seeds_is_that_of_scipy(count):
    values = np.random.default_rng(count).uniform(0.4, 0.6, count)
    expected = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
    assert seed_interval(values) == pytest.approx(expected, rel=1e-9)
    assert seed_interval([0.1, 0.9], (0, 1)) == [0, 1]


def test_one_seed_has_the_interval_of_its_rollout():
    one = summary([0.2, 0.95, 1.0])
    interval = mean_interval([0.2, 0.95, 1.0])
    assert estimate([one], SCORE) == {"mean": one["score_mean"], "interval": interval, "kind": "run"}
    assert estimate([one], SUCCESS)["interval"] == rate_interval(2, 3)
    assert estimate([{"score_mean": 0.3}], SCORE) == {"mean": 0.3, "interval": None, "kind": "none"}
    assert estimate([], SCORE) is None and estimate([None, {"other": 1}], SCORE) is None
    several = [{"score_mean": value, "success_rate": value} for value in (0.1, 0.9)]
    assert estimate(several, SUCCESS) == {"mean": 0.5, "interval": [0.0, 1.0], "kind": "seeds"}
    assert estimate(several, SCORE)["interval"][0] < -4


def test_episodes_of_all_seeds_are_pooled():
    """Wilson's interval, against scipy's."""
    pooled = pooled_success([summary([1.0, 0.2]), summary([1.0, 1.0, 0.3])])
    expected = stats.binomtest(3, 5).proportion_ci(method="wilson")
    assert (pooled["successes"], pooled["episodes"], pooled["rate"]) == (3, 5, 0.6)
    assert pooled["interval"] == pytest.approx([expected.low, expected.high], rel=1e-9)
    assert pooled_success([{"score_mean": 1.0}]) is None


def test_a_group_has_the_means_over_its_seeds(tmp_path):
    """Of the last rollouts and of the best ones, which training.score chooses."""
    write_run(tmp_path / "runs/0", seed=1, scores=[(0.9, 0.7), (0.1, 0.3)])
    write_run(tmp_path / "runs/1", seed=2, scores=[(0.2, 0.4), (1.0, 0.2)])
    (group,) = reported(tmp_path, tmp_path / "runs")[2]["parts"][0]["groups"]
    assert group["seeds"] == ["1", "2"] and group["steps"] == [20, 20]
    assert group["last"]["score_mean"]["mean"] == pytest.approx((0.2 + 0.6) / 2)
    assert group["last"]["success_rate"]["mean"] == pytest.approx((0 + 0.5) / 2)
    assert group["best"]["score_mean"]["mean"] == pytest.approx((0.8 + 0.6) / 2)
    assert group["last"]["score_mean"]["interval"] == pytest.approx(seed_interval([0.2, 0.6]))
    assert group["pooled"] == {"successes": 1, "episodes": 4, "rate": 0.25, "interval": rate_interval(1, 4)}
    assert group["steps_per_second"] == 2 and group["minutes"] == pytest.approx(20 / 2 / 60)
    runs = [write_run(tmp_path / f"other/{key}", scores=[(0.8, 0.8), (1.0, 0.1)], **{"training.score": key})
            for key in ("score_mean", "success_rate")]  # fmt: skip
    assert [run.best["step"] for run in read_runs(runs)[0]] == [10, 20]


def test_the_best_run_has_the_least_error_or_the_largest_score(tmp_path):
    for seed, bits in ((1, 2.5), (2, 2.0), (3, 3.0)):
        folder = write_finished(tmp_path / str(seed), "language", seed=seed)
        (folder / "summary.json").write_text(json.dumps({"bits_per_byte": bits, "perplexity": 1.0}))
        write_run(tmp_path / f"policy/{seed}", seed=seed, scores=[(bits / 3,)])
    (group,) = groups_of(*(tmp_path / seed for seed in "123"))
    assert group.best_run.seed == "2" and groups_of(tmp_path / "policy")[0].best_run.seed == "3"


# Groups --------------------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_are_one_group(tmp_path):
    kinds = {"vit": {"encoder.name": "vit"}, "resnet": {"encoder.name": "resnet", "encoder.width": 64}}
    for name, options in kinds.items():
        for seed in (1, 2, 3):
            write_run(tmp_path / name / str(seed), seed=seed, **options)
    vit, resnet = groups_of(tmp_path / "vit", tmp_path / "resnet")
    assert (vit.name, resnet.name) == ("encoder=vit", "encoder=resnet")  # the width says nothing more
    assert [run.seed for run in vit.runs] == ["1", "2", "3"] and not vit.repeated
    _, tables, numbers = reported(tmp_path, tmp_path / "vit", tmp_path / "resnet")
    assert re.search(r"\| +encoder.width \| +– \| +64 \|", tables)
    assert numbers["parts"][0]["groups"][1]["options"] == {"encoder.name": "resnet", "encoder.width": 64}


def test_names_have_as_many_keys_as_it_takes(tmp_path):
    for number, (preset, rate) in enumerate([("fast", 0.1), ("fast", 0.2), ("smoke", 0.1)]):
        write_run(tmp_path / str(number), preset=preset, **{"training.lr": rate, "a.steps": len(preset)})
    names = [group.name for group in groups_of(tmp_path)]
    assert names == ["preset=fast, training.lr=0.1", "preset=fast, training.lr=0.2", "preset=smoke, training.lr=0.1"]
    assert [group.name for group in groups_of(tmp_path / "0")] == ["all runs"]


def test_the_seed_of_training_alone_is_a_seed_too(tmp_path):
    write_run(tmp_path / "0", **{"training.seed": 7})
    write_run(tmp_path / "1")
    (group,) = groups_of(tmp_path)
    assert [run.seed for run in group.runs] == ["42/7", "42"]


def test_a_repeated_seed_does_not_count_twice(tmp_path):
    write_run(tmp_path / "runs/0", scores=[(0.1,), (0.2,)])
    write_run(tmp_path / "runs/1", scores=[(0.5,)])
    (group,) = groups_of(tmp_path / "runs")
    assert [run.folder.name for run in group.runs] == ["0"] and [run.folder.name for run in group.repeated] == ["1"]
    (group,) = reported(tmp_path, tmp_path / "runs")[2]["parts"][0]["groups"]
    assert group["last"]["score_mean"] == {"mean": 0.2, "interval": [0.2, 0.2], "kind": "run"}
    assert [run["folder"] for run in group["not_counted"]] == ["1"]


def test_results_of_eval_rollout_are_grouped_by_the_configuration_of_their_checkpoint(tmp_path):
    for seed in (1, 2):
        config = {**tiny.policy_config(), "seed": seed}
        checkpoint = tmp_path / f"step=00000004_score=0.{seed}.safetensors"
        model = build_model(config)
        tiny.save(checkpoint, model, config, step=4)
        for name, count in (("few", 2), ("many", 3)):
            folder = tmp_path / "rollouts" / f"{name}{seed}"
            folder.mkdir(parents=True)
            content = {"checkpoint": str(checkpoint), **summary([0.5] * count)}
            (folder / "summary.json").write_text(json.dumps(content))
    few, many = groups_of(tmp_path / "rollouts")
    assert [run.folder.name for run in few.runs] == ["few1", "few2"]
    assert (few.name, many.name) == ("eval.rollout.episodes=2", "eval.rollout.episodes=3")
    assert few.options["checkpoint"] == "step=00000004"
    assert few.runs[0].parameters == sum(tensor.numel() for tensor in model.state_dict().values())
    checkpoint.unlink()
    lost = groups_of(tmp_path / "rollouts" / "few2")
    assert lost[0].options["checkpoint"] == str(checkpoint) and lost[0].runs[0].parameters is None
    assert "| " in reported(tmp_path, tmp_path / "rollouts")[1]


# What is read --------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_ignored_and_another_one_is_not(tmp_path):
    path = write_run(tmp_path / "run") / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 30, "epo')
    assert [line["step"] for line in read_lines(path)] == [10, 10, 20, 20]
    path.write_text('{"step": 5\n' + whole)
    with pytest.raises(ValueError, match="metrics.jsonl"):
        read_lines(path)


WRONG = ["x", [], {"a": 1}, True, 10**400]


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("key", ["step", "epoch", "train_loss", "score_mean", "steps_per_second"])
def test_a_line_with_another_value_is_refused_by_its_number(tmp_path, key, value):
    run = write_run(tmp_path / "run")
    first, *others = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([json.dumps({**json.loads(first), key: value}), *others]))
    with pytest.raises(ValueError, match="metrics.jsonl: got .*in line 1"):
        read_lines(run / "metrics.jsonl")
    (run / "metrics.jsonl").write_text("\n".join([first, "[" * 100_000]))  # torn
    assert len(read_lines(run / "metrics.jsonl")) == 1


@pytest.mark.parametrize("value", [*WRONG, [1], [{"x": 1}]], ids=lambda value: str(value)[:9])
@pytest.mark.parametrize("key", ["score_mean", "success_rate", "score_ci95", "episodes", "checkpoint", "parameters"])
def test_a_result_with_another_value_is_left_out(tmp_path, key, value):
    write_run(tmp_path / "run")
    allowed = {"checkpoint": str, "episodes": tuple}.get(key, float)
    for name, content in (("good", {}), ("bad", {key: value})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps({**summary([0.5, 1.0]), **content}))
    left_out = reported(tmp_path, tmp_path)[2]["left_out"]
    good = isinstance(value, allowed) or value == [] and key == "episodes"
    assert left_out == [] if good else [line for line in left_out if "bad/summary.json" in line]


def test_runs_are_found_below_a_folder_once_and_in_order(tmp_path):
    for number in (10, 9):
        write_run(tmp_path / "sweep" / str(number), seed=number)
    write_run(tmp_path / "elsewhere" / "run")
    (tmp_path / "sweep" / "12").symlink_to(tmp_path / "elsewhere" / "run")
    (tmp_path / "latest").symlink_to(tmp_path / "sweep" / "9")
    (tmp_path / "sweep" / ".submitit" / "7").mkdir(parents=True)
    (tmp_path / "sweep" / "11").mkdir()
    runs, left_out = read_runs([tmp_path / "sweep", tmp_path / "sweep" / "9", tmp_path / "latest"])
    assert [run.seed for run in runs] == ["9", "10"]
    assert len(left_out) == 1 and f"{tmp_path}/sweep/11" in left_out[0]


def test_what_is_left_out_is_said(tmp_path, capsys):
    write_run(tmp_path / "runs/0")
    damaged = write_run(tmp_path / "runs/1")
    (damaged / "rollouts/epoch_0001/summary.json").write_text("{")
    report.main([str(tmp_path / "runs"), "--output", str(tmp_path / "r.html")])
    printed = capsys.readouterr().out
    assert "runs/1/rollouts/epoch_0001/summary.json" in printed and "r.html, r.md and r.json about 1 run\n" in printed
    assert "<h2>Left out</h2>" in (tmp_path / "r.html").read_text() and "runs/1" in (tmp_path / "r.md").read_text()


def test_runs_without_rollouts_and_without_their_summaries_are_told_apart(tmp_path):
    write_run(tmp_path / "runs/0", seed=1, scores=[(), ()])
    lost = write_run(tmp_path / "runs/1", seed=2, **{"training.lr": 0.5})
    for path in (lost / "rollouts").glob("*/summary.json"):
        path.unlink()
    without, gone = reported(tmp_path, tmp_path / "runs")[2]["parts"][0]["groups"]
    assert without["last"]["score_mean"] is None and without["pooled"] is None and without["evaluated"] == 0
    assert gone["last"]["score_mean"] == {"mean": 0.8, "interval": None, "kind": "none"}


WRONG = {
    "nothing": lambda path: None,
    "empty": lambda path: path.mkdir(),
    "no metrics": lambda path: (write_run(path) / "metrics.jsonl").unlink(),
    "no line": lambda path: (write_run(path) / "metrics.jsonl").write_text('{"st'),
    "no YAML": lambda path: (write_run(path) / "config.yaml").write_text("a: [1"),
    "other summary": lambda path: (write_run(path) / "summary.json").write_text("[]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_run_gives_one_line(tmp_path, capsys, monkeypatch, case):
    monkeypatch.delenv("DEBUG", raising=False)
    WRONG[case](tmp_path / "run")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "run"), "--output", str(tmp_path / "report.html")])
    (line,) = [line for line in capsys.readouterr().err.split("\n") if "error" in line]
    assert re.search(rf"error: RUNS: got {tmp_path}/run .*, allowed: a run", line)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("option", "value"), [("--output", "report.pdf"), ("--max-video-mb", "-1")])
def test_wrong_options_give_one_line(tmp_path, capsys, monkeypatch, option, value):
    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(SystemExit):
        report.main([str(write_run(tmp_path / "run")), option, value])
    assert re.fullmatch(f"error: {option}: got {value}.*, allowed: .*\n", capsys.readouterr().err)
