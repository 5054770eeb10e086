"""Sections of ``python -m eval.report``: tables for Markdown and the page alike, pictures for the page alone."""

import os

from eval.report.groups import shown, summarize_group
from eval.report.kinds import PICTURES
from eval.report.plots import plot_groups
from eval.shared.pages import Figure, Section, embedded
from eval.shared.tables import NONE, show, show_interval

TITLE = "Training runs"
INTRO = (
    "Numbers are means over seeds, in brackets the 95 % interval: of several seeds Student's t, which says how much "
    "another seed may differ, and has no width where seeds happen to agree; of one seed the interval of its own test "
    "(bootstrap for scores and BLEU, Wilson for rates), which says nothing about other seeds.",
    "Best is the best of a run's evaluations, chosen on the same data, and so looks better than it is. All episodes: "
    "of the last rollouts together, Wilson interval; too narrow where seeds differ. Minutes: steps at the logged rate, "
    "data and last test not included.",
)
CURVES_CAPTION = "Against steps: mean (thick, where all seeds have values), every seed (thin), 95 % interval (band)"
TEXT_SHOWN = 1500  # characters


def sections(parts, left_out, *, base, home, max_video):
    """All sections. base: folder that names are relative to; home: folder of the page, for links; max_video: bytes up
    to which a film is put in."""
    found = []
    for part in parts:
        curves = plot_groups(part.groups)
        pictures = [figure for group in part.groups for figure in _figures(group, base, home, max_video)]
        found.append(Section(f"{part.kind.title}: {part.task}", rows=group_table(part)))
        if curves is not None:
            found[-1].figures.append(embedded("image", curves, CURVES_CAPTION))
        if part.keys:
            found.append(Section("What differs", rows=difference_table(part), level=3))
        found.append(Section("Runs", rows=run_table(part, base), level=3))
        if pictures:
            found.append(Section("The best run of every group", figures=pictures, level=3))
    return found + ([Section("Left out", facts=left_out)] if left_out else [])


# Tables --------------------------------------------------------------------------------------------------------------


def group_table(part):
    """One row a group."""
    metrics, first = part.kind.metrics, part.kind.metrics[0]
    numbers = [summarize_group(group) for group in part.groups]
    pooled = any(one["pooled"] for one in numbers)
    head = ["group", "seeds", *(f"{metric.title} [95 %]" for metric in metrics)]
    head += [f"best {first.title}"] * part.kind.chosen + ["all episodes, success, %"] * pooled
    rows = [[*head, "parameters", "steps", "minutes"]]
    for group, one in zip(part.groups, numbers, strict=True):
        count, evaluated = len(one["seeds"]), one["evaluated"]
        row = [group.label, str(count) if evaluated in (0, count) else f"{count}, {evaluated} evaluated"]
        row += [_estimate(one["last"][metric.key], metric) for metric in metrics]
        row += [_estimate(one["best"][first.key], first)] * part.kind.chosen
        if pooled:
            success = one["pooled"]
            of = f" of {success['episodes']}" if success else ""
            row.append(show_interval(success["rate"], success["interval"], ".0f", 100) + of if success else NONE)
        size = None if one["parameters"] is None else one["parameters"] / 1e6
        row += [NONE if size is None else f"{size:.2f} M", _range(one["steps"]), show(one["minutes"], ".1f")]
        rows.append(row)
    return rows


def difference_table(part):
    """One row a key in which the groups differ, one column a group."""
    head = ["key", *(f"group {group.number}" for group in part.groups)]
    return [head, *([key, *(shown(group.options, key) for group in part.groups)] for key in part.keys)]


def run_table(part, base):
    """One row a run, with the values that tell its group from others; folders are relative to ``base``."""
    metrics, first, keys = part.kind.metrics, part.kind.metrics[0], part.groups[0].keys
    best = [f"best {first.title}", "at step"] if part.kind.chosen else []
    rows = [["folder", "group", "seed", "step", *(metric.title for metric in metrics), *best, "steps/s", *keys]]
    for group in part.groups:
        for run in [*group.runs, *group.repeated]:
            seed = f"{run.seed} (repeated: not counted)" if run in group.repeated else run.seed
            row = [os.path.relpath(run.folder, base), str(group.number), seed, show(run.steps, ",")]
            row += [show(run.last.get(metric.key), metric.form, metric.scale) for metric in metrics]
            if best:
                top = run.best or {}
                row += [show(top.get(first.key), first.form, first.scale), show(top.get("step"), ",")]
            rows.append([*row, show(run.last.get("steps_per_second"), ".2f"), *(shown(run.options, k) for k in keys)])
    return rows


def _estimate(one, metric):
    return NONE if one is None else show_interval(one["mean"], one["interval"], metric.form, metric.scale)


def _range(steps):
    steps = sorted({step for step in steps if step is not None})
    return NONE if not steps else f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"


# Pictures ------------------------------------------------------------------------------------------------------------


def _figures(group, base, home, max_video):
    """The newest of each of ``PICTURES`` that the group's best run has; of a large film a link."""
    figures = []
    for pattern, kind in PICTURES.items():
        files = sorted(group.best_run.folder.glob(pattern), key=lambda file: (file.stat().st_mtime_ns, file))
        if not files:
            continue
        file, size = files[-1], files[-1].stat().st_size
        caption = f"{group.label}, {os.path.relpath(file, base)}"
        if kind == "text":
            text = file.read_text(encoding="utf-8", errors="replace")
            figures.append(Figure("text", text[:TEXT_SHOWN] + "…" * (len(text) > TEXT_SHOWN), caption))
        elif kind == "video" and size > max_video:
            figures.append(Figure("link", os.path.relpath(file, home), f"{caption}, {size / 1e6:.1f} MB"))
        else:
            figures.append(embedded(kind, file.read_bytes(), caption))
    return figures
