"""Runs of every kind side by side: means over seeds with 95 % intervals, curves, films; a page that needs nothing else.

    python -m eval.report RUNS... [--output report.html]

RUNS are run folders, results of tests (a folder of eval.rollout), or folders that such ones lie in
(runs/multirun/DATE). Runs that differ in their seed only are one group; each kind and task has a table of its own.
"""

import json
import os
import shlex
import sys
from pathlib import Path

from eval.report.groups import group_runs, summarize_group
from eval.report.page import INTRO, TITLE, sections
from eval.report.runs import read_runs
from eval.shared.command import Parser, command
from eval.shared.pages import html_page, markdown_page
from policy.files import write_whole


def report(paths, output, *, max_video=8e6, command="python -m eval.report"):
    """Write ``output`` (.html) and beside it .md and .json about the runs in ``paths``.

    max_video: bytes up to which a film is put into the page. Returns (number of runs, sentences about those left out).
    """
    output = Path(output)
    if output.suffix != ".html":
        raise ValueError(f"--output: got {output}, allowed: a name that ends in .html")
    runs, left_out = read_runs(paths)
    parts = group_runs(runs)
    base = Path(os.path.commonpath([run.folder.resolve().parent for run in runs]))
    found = sections(parts, left_out, base=base, home=output.resolve().parent, max_video=max_video)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, html_page(TITLE, found, intro=INTRO, command=command))
    write_whole(output.with_suffix(".md"), markdown_page(TITLE, found, intro=INTRO, command=command))
    numbers = {"command": command, "parts": [as_json(part, base) for part in parts], "left_out": left_out}
    write_whole(output.with_suffix(".json"), json.dumps(numbers, indent=1))
    return len(runs), left_out


def as_json(part, base):
    """All numbers of the runs of one kind and task; folders are relative to ``base``."""
    keys = [metric.key for metric in part.kind.metrics]

    def rows(runs):
        return [
            {
                "folder": os.path.relpath(run.folder, base),
                "seed": run.seed,
                "steps": run.steps,
                "results": [{k: line.get(k) for k in ("step", *keys)} for line in run.lines if keys[0] in line],
                "last": {key: run.last.get(key) for key in keys},
            }
            for run in runs
        ]

    groups = [
        {
            **summarize_group(group),
            "options": {key: group.options[key] for key in part.keys if key in group.options},
            "runs": rows(group.runs),
            "not_counted": rows(group.repeated),
        }
        for group in part.groups
    ]
    return {"kind": part.kind.title, "task": part.task, "groups": groups}


@command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser("eval.report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="runs, results of tests, or folders of such")
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
