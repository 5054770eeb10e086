"""``python -m eval.report``: what it reads, how it groups runs, its numbers, and a page that needs nothing else."""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import tiny
from omegaconf import OmegaConf
from PIL import Image
from scipy import stats

from eval.report import __main__ as report
from eval.report.groups import estimate, group_runs, pooled_success, seed_interval, t_quantile
from eval.report.plots import _side_by_side, plot_losses, plot_scores
from eval.report.runs import read_lines, read_runs
from eval.rollout.loop import summarize
from eval.shared.intervals import mean_interval, rate_interval
from policy.build import build_model
from policy.checkpoint import save_checkpoint

FILM = b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 8


def summary(scores):
    return summarize([{"seed": 100_000 + i, "score": s, "success": s > 0.9, "steps": 9} for i, s in enumerate(scores)])


def write_run(folder, *, seed=42, task="pusht", scores=((0.2, 0.4), (0.6, 1.0)), per_epoch=10, film=None, **options):
    """A run folder that rolled out after every epoch, with ``scores`` of the episodes; ``options`` are dotted keys."""
    config = OmegaConf.create({"seed": seed, "task": {"name": task}, "training": {"seed": seed, "lr": 0.1}})
    for key, value in options.items():
        OmegaConf.update(config, key, value, force_add=True)
    folder.mkdir(parents=True)
    OmegaConf.save(config, folder / "config.yaml")
    lines = []
    for epoch, episodes in enumerate(scores, start=1):
        step = epoch * per_epoch
        line = {"step": step, "epoch": float(epoch)}
        lines.append({**line, "train_loss": 1 / step, "lr": 0.1, "steps_per_second": 2.0})
        lines.append({**line, "val_loss": 2 / step})
        if episodes:
            results = summary(episodes)
            rollout = folder / "rollouts" / f"epoch_{epoch:04d}"
            rollout.mkdir(parents=True)
            (rollout / "summary.json").write_text(json.dumps(results))
            if film is not None:
                (rollout / "rollout.mp4").write_bytes(film)
            lines[-1] |= {key: results[key] for key in ("score_mean", "success_rate")}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def groups_of(*folders):
    """Groups of the only task."""
    ((groups),) = group_runs(read_runs(folders)[0])[0].values()
    return groups


def reported(tmp_path, *paths, **options):
    """(page, tables, numbers) of a report."""
    output = tmp_path / "out" / "report.html"
    report.report(paths, output, **options)
    files = [output.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".html", ".md", ".json")]
    assert sorted(os.listdir(output.parent)) == ["report.html", "report.json", "report.md"]
    return files[0], files[1], json.loads(files[2])


# Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 29, 200, 1001])
def test_quantiles_of_student_are_those_of_scipy(degrees):
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)


def test_a_quantile_needs_a_degree_of_freedom():
    with pytest.raises(ValueError, match="degrees of freedom: got 0, allowed: >= 1"):
        t_quantile(0)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_interval_over_seeds_is_that_of_scipy(count):
    values = np.random.default_rng(count).uniform(0.4, 0.6, count)
    expected = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
    assert seed_interval(values) == pytest.approx(expected, rel=1e-9)


def test_of_success_only_is_the_interval_cut_to_what_is_possible():
    rollouts = [{"score_mean": value, "success_rate": value} for value in (0.1, 0.9)]
    assert estimate(rollouts, "success") == {"mean": 0.5, "interval": [0.0, 1.0], "kind": "seeds"}
    assert estimate(rollouts, "score")["interval"][0] < -4 and estimate(rollouts, "score")["interval"][1] > 5


def test_one_seed_has_the_interval_of_its_rollout():
    one = summary([0.2, 0.95, 1.0])
    assert estimate([one], "score") == {
        "mean": one["score_mean"],
        "interval": mean_interval([0.2, 0.95, 1.0]),
        "kind": "episodes",
    }
    assert estimate([one], "success")["interval"] == rate_interval(2, 3)
    assert estimate([{"score_mean": 0.3}], "score") == {"mean": 0.3, "interval": None, "kind": "none"}
    assert estimate([], "score") is None


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
    (group,) = reported(tmp_path, tmp_path / "runs")[2]["tasks"]["pusht"]
    assert group["seeds"] == ["1", "2"] and group["steps"] == [20, 20]
    assert group["last"]["score"]["mean"] == pytest.approx((0.2 + 0.6) / 2)
    assert group["last"]["success"]["mean"] == pytest.approx((0 + 0.5) / 2)
    assert group["best"]["score"]["mean"] == pytest.approx((0.8 + 0.6) / 2)
    assert group["last"]["score"]["interval"] == pytest.approx(seed_interval([0.2, 0.6]))
    assert group["pooled"] == {"successes": 1, "episodes": 4, "rate": 0.25, "interval": rate_interval(1, 4)}
    assert group["steps_per_second"] == 2 and group["minutes"] == pytest.approx(20 / 2 / 60)
    runs = [write_run(tmp_path / f"other/{key}", scores=[(0.8, 0.8), (1.0, 0.1)], **{"training.score": key})
            for key in ("score_mean", "success_rate")]  # fmt: skip
    assert [run.best["step"] for run in read_runs(runs)[0]] == [10, 20]


# Groups --------------------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_are_one_group(tmp_path):
    kinds = {"vit": {"encoder.name": "vit"}, "resnet": {"encoder.name": "resnet", "encoder.width": 64}}
    for name, options in kinds.items():
        for seed in (1, 2, 3):
            write_run(tmp_path / name / str(seed), seed=seed, **options)
    vit, resnet = groups_of(tmp_path / "vit", tmp_path / "resnet")
    assert (vit.name, resnet.name) == ("encoder.name=vit", "encoder.name=resnet")  # the width says nothing more
    assert [run.seed for run in vit.runs] == ["1", "2", "3"] and not vit.repeated
    _, tables, numbers = reported(tmp_path, tmp_path / "vit", tmp_path / "resnet")
    assert "t, 3 seeds" in tables and re.search(r"\| +encoder.width \| +– \| +64 \|", tables)
    assert numbers["tasks"]["pusht"][1]["options"] == {"encoder.name": "resnet", "encoder.width": 64}


def test_names_have_as_many_keys_as_it_takes(tmp_path):
    for number, (preset, rate) in enumerate([("cpu", 0.1), ("cpu", 0.2), ("smoke", 0.1)]):
        write_run(tmp_path / str(number), preset=preset, **{"training.lr": rate, "a.steps": len(preset)})
    names = [group.name for group in groups_of(tmp_path)]
    assert names == ["preset=cpu, training.lr=0.1", "preset=cpu, training.lr=0.2", "preset=smoke, training.lr=0.1"]
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
    _, tables, numbers = reported(tmp_path, tmp_path / "runs")
    assert "42 (repeated: not counted)" in tables
    assert numbers["tasks"]["pusht"][0]["last"]["score"] == {"mean": 0.2, "interval": [0.2, 0.2], "kind": "episodes"}


def test_tasks_are_apart(tmp_path):
    write_run(tmp_path / "runs/0")
    write_run(tmp_path / "runs/1", task="lift")
    page, tables, numbers = reported(tmp_path, tmp_path / "runs")
    assert list(numbers["tasks"]) == ["pusht", "lift"]
    assert "<h2>lift</h2>" in page and "## lift" in tables and "What differs" not in page


def test_results_of_eval_rollout_are_grouped_by_the_configuration_of_their_checkpoint(tmp_path):
    for seed in (1, 2):
        config = {**tiny.policy_config(), "seed": seed}
        tensors = {f"ema.{name}": tensor for name, tensor in build_model(config).state_dict().items()}
        checkpoint = tmp_path / f"step=00000004_score=0.{seed}.safetensors"
        save_checkpoint(checkpoint, tensors, config=config, state={"step": 4})
        for name, count in (("few", 2), ("many", 3)):
            folder = tmp_path / "rollouts" / f"{name}{seed}"
            folder.mkdir(parents=True)
            content = {"checkpoint": str(checkpoint), **summary([0.5] * count)}
            (folder / "summary.json").write_text(json.dumps(content))
    few, many = groups_of(tmp_path / "rollouts")
    assert [run.folder.name for run in few.runs] == ["few1", "few2"]
    assert (few.name, many.name) == ("eval.rollout.episodes=2", "eval.rollout.episodes=3")
    assert few.options["checkpoint"] == "step=00000004"
    checkpoint.unlink()
    lost = groups_of(tmp_path / "rollouts" / "few2")
    assert lost[0].options["checkpoint"] == str(checkpoint)
    assert "| " in reported(tmp_path, tmp_path / "rollouts")[1]


# What is read --------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_ignored_and_another_one_is_not(tmp_path):
    path = write_run(tmp_path / "run") / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 30, "epo')
    assert [line["step"] for line in read_lines(path)] == [10, 10, 20, 20]
    path.write_text('{"step": 5\n' + whole)
    with pytest.raises(ValueError, match="metrics.jsonl: got '{\"step\": 5' in line 1, allowed: steps as JSON"):
        read_lines(path)


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
    assert left_out == [f"{tmp_path}/sweep/11: got no config.yaml"]


def test_what_is_left_out_is_said(tmp_path, capsys):
    write_run(tmp_path / "runs/0")
    damaged = write_run(tmp_path / "runs/1")
    (damaged / "rollouts/epoch_0001/summary.json").write_text("{")
    report.main([str(tmp_path / "runs"), "--output", str(tmp_path / "r.html")])
    printed = capsys.readouterr().out
    assert re.search("left out: .*runs/1/rollouts/epoch_0001/summary.json: got another or a damaged file", printed)
    assert re.search("wrote .*r.html, r.md and r.json about 1 run\n", printed)
    assert "<h2>Left out</h2>" in (tmp_path / "r.html").read_text() and "damaged" in (tmp_path / "r.md").read_text()


def test_runs_without_rollouts_and_without_their_summaries_are_told_apart(tmp_path):
    write_run(tmp_path / "runs/0", seed=1, scores=[(), ()])
    lost = write_run(tmp_path / "runs/1", seed=2, **{"training.lr": 0.5})
    for path in (lost / "rollouts").glob("*/summary.json"):
        path.unlink()
    _, tables, numbers = reported(tmp_path, tmp_path / "runs")
    without, gone = numbers["tasks"]["pusht"]
    assert without["last"]["score"] is None and without["pooled"] is None and without["rolled_out"] == 0
    assert gone["last"]["score"] == {"mean": 0.8, "interval": None, "kind": "none"}
    assert "none: summary.json is gone" in tables


WRONG = {
    "nothing": (lambda path: None, r"RUNS: got \S+ \(no folder\), allowed: a run \(config.yaml"),
    "empty": (lambda path: path.mkdir(), r"RUNS: got \S+ \(\S+: got no config.yaml\), allowed: a run"),
    "no metrics": (lambda path: (write_run(path) / "metrics.jsonl").unlink(), r"RUNS: got .*: got no metrics.jsonl\)"),
    "no line": (lambda path: (write_run(path) / "metrics.jsonl").write_text('{"st'), r"RUNS: got .*: got no whole l"),
    "no YAML": (lambda path: (write_run(path) / "config.yaml").write_text("a: [1"), r"RUNS: got .*: got no YAML \("),
    "other summary": (lambda path: (write_run(path) / "summary.json").write_text("[]"), "RUNS: got .*another or a dam"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_run_gives_one_line(tmp_path, capsys, monkeypatch, case):
    monkeypatch.delenv("DEBUG", raising=False)
    make, message = WRONG[case]
    make(tmp_path / "run")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "run"), "--output", str(tmp_path / "report.html")])
    (line,) = [line for line in capsys.readouterr().err.split("\n") if "error" in line]
    assert re.search(f"error: {message}", line) and "Traceback" not in line
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "report.pdf"], "--output: got report.pdf, allowed: a name that ends in .html"),
        (["--max-video-mb", "-1"], "--max-video-mb: got -1.0, allowed: >= 0"),
    ],
)
def test_wrong_options_give_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.delenv("DEBUG", raising=False)
    with pytest.raises(SystemExit):
        report.main([str(write_run(tmp_path / "run")), *arguments])
    assert capsys.readouterr().err == f"error: {message}\n"


# The page ------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags of a page, with their attributes; complains about tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def sources(self, tag):
        """Content of the data URLs of ``tag``."""
        urls = [attributes["src"] for name, attributes in self.tags if name == tag]
        assert all(url.startswith("data:") for url in urls)
        return [base64.b64decode(url.split(",", 1)[1], validate=True) for url in urls]


def test_the_page_is_whole_without_anything_else(tmp_path):
    """Curves, the last film of the best run of every group, and its newest reconstruction."""
    for seed, score in ((1, 0.3), (2, 0.8)):
        run = write_run(tmp_path / f"runs/{seed}", seed=seed, scores=[(0.9,), (score,)], film=FILM + bytes([seed]))
        for name, age in (("epoch_10.png", 5), ("epoch_9.png", 50)):
            picture = run / "reconstructions" / name
            picture.parent.mkdir(exist_ok=True)
            Image.new("RGB", (seed, age)).save(picture)
            os.utime(picture, (1e9 - age, 1e9 - age))
    text, _, _ = reported(tmp_path, tmp_path / "runs")
    page = Page(text)
    pictures = [Image.open(io.BytesIO(data)) for data in page.sources("img")]
    assert len(pictures) == 3 and pictures[-1].size == (2, 5)
    assert all(
        picture.size[0] > 700 and len(picture.convert("RGB").getcolors(1 << 20)) > 10 for picture in pictures[:2]
    )
    assert page.sources("video") == [FILM + bytes([2])]
    assert not {"script", "link", "iframe", "a"} & {tag for tag, _ in page.tags} and "http" not in text
    assert any("2/rollouts/epoch_0002/rollout.mp4" in part for part in page.text)


def test_a_large_film_is_linked_to_instead(tmp_path):
    run = write_run(tmp_path / "runs/my run", film=FILM)
    text, _, _ = reported(tmp_path, run, max_video=len(FILM) - 1)
    page = Page(text)
    assert not page.sources("video")
    (link,) = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert link == "../runs/my run/rollouts/epoch_0002/rollout.mp4" and (tmp_path / "out" / link).exists()
    assert Page(reported(tmp_path, run, max_video=len(FILM))[0]).sources("video") == [FILM]
    report.main([str(run), "--output", str(tmp_path / "r.html"), "--max-video-mb", "0"])
    assert "<video" not in (tmp_path / "r.html").read_text()


def test_relative_and_absolute_paths_give_the_same_report(tmp_path, monkeypatch):
    for seed in (1, 2):
        write_run(tmp_path / "runs" / str(seed), seed=seed, film=FILM)
    absolute = reported(tmp_path, tmp_path / "runs", max_video=0)
    monkeypatch.chdir(tmp_path / "runs")
    assert reported(tmp_path, "1", "../runs/2", max_video=0) == absolute
    assert [run["folder"] for run in absolute[2]["tasks"]["pusht"][0]["runs"]] == ["1", "2"]
    assert str(tmp_path) not in "".join(map(str, absolute))


def test_names_cannot_break_page_or_table(tmp_path):
    name = "<script>alert('1')</script>|"
    for number in range(2):
        write_run(tmp_path / "runs" / f"{number}<b>|", film=FILM, note=f"{name}{number}")
    text, tables, _ = reported(tmp_path, tmp_path / "runs")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags} and f"1: note={name}0" in page.text
    rows = [line for line in tables.splitlines() if "note=" in line]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) == 12 for row in rows)


# Curves --------------------------------------------------------------------------------------------------------------


def test_seeds_whose_epochs_end_at_other_steps_are_compared_where_all_have_values():
    seeds = [{10: 1.0, 20: 3.0, 30: 5.0}, {12: 0.0, 22: 10.0}]
    assert _side_by_side(seeds) == {
        12: pytest.approx([1.4, 0.0]),
        20: pytest.approx([3.0, 8.0]),
        22: pytest.approx([3.4, 10.0]),
    }
    assert _side_by_side([{5: 1.0}, {7: 2.0}]) == {} and _side_by_side([]) == {}


def drawn(monkeypatch, plot, groups):
    """The axes of a plot."""
    figures = []
    save = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(save, lambda figure, file, **options: figures.append(figure))
    plot(groups)
    return figures[0].axes


def test_curves_show_mean_seeds_and_band(tmp_path, monkeypatch):
    for seed, last in ((1, 0.2), (2, 0.6)):
        write_run(tmp_path / str(seed), seed=seed, scores=[(0.1,), (last,), (1.0,)])
    score, success = drawn(monkeypatch, plot_scores, groups_of(tmp_path))
    assert (score.get_title(), success.get_title()) == ("score", "success rate")
    *seeds, mean = [list(line.get_ydata()) for line in score.lines]
    assert seeds == [[0.1, 0.2, 1.0], [0.1, 0.6, 1.0]] and mean == pytest.approx([0.1, 0.4, 1.0])
    (band,) = score.collections
    low, high = seed_interval([0.2, 0.6])
    at_20 = [y for x, y in band.get_paths()[0].vertices if x == 20]
    assert sorted(set(at_20)) == pytest.approx([low, high])
    train, held_out = drawn(monkeypatch, plot_losses, groups_of(tmp_path))
    assert list(held_out.lines[-1].get_ydata()) == pytest.approx([2 / 10, 2 / 20, 2 / 30])
    assert train.get_yscale() == "log" and train.get_ylim() == pytest.approx((1 / 30 / 1.2, 1 / 10 * 1.2))


def test_one_seed_is_drawn_with_the_intervals_of_its_rollouts(tmp_path, monkeypatch):
    write_run(tmp_path / "0", scores=[(0.1, 0.3), (0.2, 1.0)])
    score, success = drawn(monkeypatch, plot_scores, groups_of(tmp_path))
    assert len(score.lines) == 1
    for axes, expected in ((score, mean_interval([0.2, 1.0])), (success, rate_interval(1, 2))):
        at_20 = [y for x, y in axes.collections[0].get_paths()[0].vertices if x == 20]
        assert sorted(set(at_20)) == pytest.approx(expected)


def test_a_single_rollout_has_a_bar(tmp_path, monkeypatch):
    write_run(tmp_path / "0", scores=[(0.1, 0.3)])
    score, _ = drawn(monkeypatch, plot_scores, groups_of(tmp_path))
    (segment,) = score.collections[0].get_segments()
    assert segment.tolist() == [[10, pytest.approx(0.1)], [10, pytest.approx(0.3)]]


def test_nothing_to_draw_is_no_picture(tmp_path):
    assert plot_scores(groups_of(write_run(tmp_path / "0", scores=[()]))) is None
    assert plot_losses([]) is None
