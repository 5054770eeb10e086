"""Run folders as training leaves them, with made-up numbers; and a report of some."""

import json
import os

from omegaconf import OmegaConf

from eval.report import __main__ as report
from eval.report.groups import group_runs
from eval.report.runs import read_runs
from eval.rollout.loop import summarize

FILM = b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 8


def summary(scores):
    return summarize([{"seed": 100_000 + i, "score": s, "success": s > 0.9, "steps": 9} for i, s in enumerate(scores)])


def write_files(folder, lines, *, model, seed=42, **options):
    """A run folder with the ``lines`` of metrics.jsonl; ``options`` are dotted keys."""
    config = OmegaConf.create({"seed": seed, "model": {"name": model}, "training": {"seed": seed, "lr": 0.1}})
    for key, value in options.items():
        OmegaConf.update(config, key, value, force_add=True)
    folder.mkdir(parents=True)
    OmegaConf.save(config, folder / "config.yaml")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_run(folder, *, task="pusht", scores=((0.2, 0.4), (0.6, 1.0)), film=None, **options):
    """The folder of a policy that rolled out after every epoch of ten steps, with ``scores`` of the episodes."""
    lines = []
    for epoch, episodes in enumerate(scores, start=1):
        line = {"step": 10 * epoch, "epoch": float(epoch)}
        lines.append({**line, "train_loss": 0.1 / epoch, "lr": 0.1, "steps_per_second": 2.0})
        lines.append({**line, "val_loss": 0.2 / epoch})
        if episodes:
            results = summary(episodes)
            lines[-1] |= {key: results[key] for key in ("score_mean", "success_rate")}
            rollout = folder / "rollouts" / f"epoch_{epoch:04d}"
            options.setdefault("files", {})[rollout / "summary.json"] = json.dumps(results).encode()
            if film is not None:
                options["files"][rollout / "rollout.mp4"] = film
    files = options.pop("files", {})
    write_files(folder, lines, model="diffusion", **{"task.name": task, **options})
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


# A run of every kind, {model.name: (options, newest line of metrics.jsonl, summary.json)}
ACCURACY = {"top1": 0.5, "top1_ci95": [0.4, 0.6], "top5": 0.9}
FINISHED = {
    "image_classifier": ({"data": "cifar10"}, {"top1": 0.4, "top5": 0.9}, {**ACCURACY, "parameters": 2_500_000}),
    "video_classifier": ({"data": "clips/ntu"}, {"top1": 0.4, "top5": 0.9, "test_loss": 1.2}, ACCURACY),
    "mae": ({"data": "cifar10"}, {"val_loss": 0.7}, {}),
    "keypoints": ({"task.name": "pusht"}, {"val_loss": 0.01, "val_px": 2.5}, {}),
    "language": ({"text": None}, {"val_loss": 1.4}, {"bits_per_byte": 2.1, "perplexity": 4.3, "contexts": []}),
    "translation": (
        {"source": "wmt.en"},
        {"val_loss": 2.0},
        {"bleu": 31.5, "bleu_ci95": [30, 33], "chrf": 55.0, "exact": 0.25},
    ),
    "of_tomorrow": ({"task.name": "new"}, {"val_loss": 3.0}, {}),
}


def write_finished(folder, model, **options):
    own, line, results = FINISHED[model]
    lines = [{"step": 20, "epoch": 1.0, "train_loss": 2.0, "steps_per_second": 1.0}, {"step": 20, "epoch": 1.0, **line}]
    write_files(folder, lines, model=model, **own, **options)
    if results:
        (folder / "summary.json").write_text(json.dumps(results))
    return folder


def groups_of(*folders):
    """Groups of the only kind and task."""
    (part,) = group_runs(read_runs(folders)[0])
    return part.groups


def reported(tmp_path, *paths, **options):
    """(page, tables, numbers) of a report."""
    output = tmp_path / "out" / "report.html"
    report.report(paths, output, **options)
    files = [output.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".html", ".md", ".json")]
    assert sorted(os.listdir(output.parent)) == ["report.html", "report.json", "report.md"]
    return files[0], files[1], json.loads(files[2])
