"""Runs side by side: score and success over seeds with 95 % intervals, curves, films; a page that needs nothing else.

    python -m eval.report RUNS... [--output report.html]

RUNS are run folders, folders of eval.rollout, or folders that such ones lie in (runs/multirun/DATE). Runs that differ
in their seed only are one group.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from eval.report.groups import group_runs, summarize_group
from eval.report.page import html_page, markdown_page
from eval.report.runs import read_runs
from eval.shared.command import command
from eval.shared.tracker import write_whole


def report(paths, output, *, max_video=8e6, command="python -m eval.report"):
    """Write ``output`` (.html) and beside it .md and .json about the runs in ``paths``.

    max_video: bytes up to which a film is put into the page. Returns (number of runs, sentences about those left out).
    """
    output = Path(output)
    if output.suffix != ".html":
        raise ValueError(f"--output: got {output}, allowed: a name that ends in .html")
    runs, left_out = read_runs(paths)
    tasks, keys = group_runs(runs)
    base = Path(os.path.commonpath([run.folder.resolve().parent for run in runs]))
    home = output.resolve().parent
    told = {"command": command, "base": base}
    home.mkdir(parents=True, exist_ok=True)
    page = html_page(tasks, keys, left_out, home=home, max_video=max_video, **told)
    write_whole(output, page)
    write_whole(output.with_suffix(".md"), markdown_page(tasks, keys, left_out, **told))
    write_whole(output.with_suffix(".json"), json.dumps(as_json(tasks, keys, left_out, **told), indent=1))
    return len(runs), left_out


def as_json(tasks, keys, left_out, *, command, base):
    """All numbers of the report; folders are relative to ``base``."""

    def rows(run):
        rollouts = [{key: r[key] for key in ("step", "score_mean", "success_rate")} for r in run.rollouts]
        folder = os.path.relpath(run.folder, base)
        return {"folder": folder, "seed": run.seed, "steps": run.steps, "rollouts": rollouts}

    def numbers(group, names):
        runs = {"runs": [rows(run) for run in group.runs], "not_counted": [rows(run) for run in group.repeated]}
        differing = {key: group.options[key] for key in names if key in group.options}
        return {**summarize_group(group), "options": differing, **runs}

    groups = {task: [numbers(group, keys[task]) for group in members] for task, members in tasks.items()}
    return {"command": command, "tasks": groups, "left_out": left_out}


@command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="runs, results of eval.rollout, or folders of such")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="default report.html")
    parser.add_argument("--max-video-mb", type=float, default=8, help="larger films are only linked to, default 8")
    args = parser.parse_args(argv)
    if not args.max_video_mb >= 0:
        raise ValueError(f"--max-video-mb: got {args.max_video_mb}, allowed: >= 0")
    line = shlex.join(["python", "-m", "eval.report", *argv])
    count, left_out = report(args.runs, args.output, max_video=args.max_video_mb * 1e6, command=line)
    for reason in left_out:
        print(f"left out: {reason}")
    stem = args.output.with_suffix("")
    print(f"wrote {stem}.html, {stem.name}.md and {stem.name}.json about {count} run{'s' * (count > 1)}")


if __name__ == "__main__":
    main()
