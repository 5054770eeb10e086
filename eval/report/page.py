"""Tables and the page of ``python -m eval.report``; the page needs nothing beside itself."""

import base64
import os
from html import escape

from eval.report.groups import shown, summarize_group
from eval.report.plots import plot_losses, plot_scores
from eval.speed.attention import markdown_table

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 75rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid #ccd2d9; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: right; border-bottom: 1px solid #e3e7eb; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 12rem; }
img, video { max-width: 100%; } figure { margin: 1rem 0; } figcaption, .note { color: #57606a; font-size: 0.9rem; }
.films { display: flex; flex-wrap: wrap; gap: 1.5rem; } .films figure { max-width: 24rem; }
"""
HEAD = f"""<!DOCTYPE html>
<html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>
<title>Training runs</title><style>{STYLE}</style></head>
<body>"""
NOTE = (
    "Score and success are means over seeds, in brackets the 95 % interval. Intervals “t, n seeds” say how much another"
    " seed may differ (Student's t over seeds; that of success cut to 0 to 100); it has no width where seeds happen to"
    " agree. “episodes” is one seed: the rollout's"
    " own interval, bootstrap for the score and Wilson for success, which says nothing about other seeds. Best is the"
    " best of each run's rollouts, chosen on the same episodes, and so looks better than it is. All episodes: those of"
    " the last rollouts together, Wilson interval; too narrow where seeds differ. Minutes: steps at the logged rate,"
    " data and last rollout not included."
)


# Tables: lists of rows of text, the first one the head ---------------------------------------------------------------


def group_table(groups):
    """One row a group."""
    head = ["group", "seeds", "last score", "last success, %", "best score", "best success, %", "intervals"]
    rows = [[*head, "all episodes, success, %", "steps", "steps/s", "minutes"]]
    for group in groups:
        numbers = summarize_group(group)
        last, best, pooled = numbers["last"], numbers["best"], numbers["pooled"]
        scores = [*_estimates(last), *_estimates(best)]
        together = f"{_percent(pooled['rate'], pooled['interval'])} of {pooled['episodes']}" if pooled else "–"
        speed = [_number(numbers["steps_per_second"], ".2f"), _number(numbers["minutes"], ".1f")]
        rows.append(
            [_label(group), _seeds(numbers), *scores, _kind(numbers), together, _range(numbers["steps"]), *speed]
        )
    return rows


def difference_table(groups, keys):
    """One row a key in which the groups differ, one column a group."""
    head = ["key", *(f"group {group.number}" for group in groups)]
    return [head, *([key, *(shown(group.options, key) for group in groups)] for key in keys)]


def run_table(groups, base):
    """One row a run, with the values that tell its group from others; folders are relative to ``base``."""
    head = ["folder", "group", "seed", "step", "last score", "last success, %", "best score", "at step"]
    rows = [[*head, *groups[0].keys]]
    for group in groups:
        for run in [*group.runs, *group.repeated]:
            seed = f"{run.seed} (repeated: not counted)" if run in group.repeated else run.seed
            cells = [os.path.relpath(run.folder, base), str(group.number), seed, _number(run.steps, ",")]
            last, best = run.last or {}, run.best or {}
            cells += [_number(last.get("score_mean"), ".3f"), _number(last.get("success_rate"), ".0f", 100)]
            cells += [_number(best.get("score_mean"), ".3f"), _number(best.get("step"), ",")]
            rows.append([*cells, *(shown(run.options, key) for key in group.keys)])
    return rows


def _label(group):
    return f"{group.number}: {group.name}"


def _estimates(estimates):
    score, success = estimates["score"], estimates["success"]
    return [
        f"{score['mean']:.3f}{_brackets(score['interval'], '.3f')}" if score else "–",
        _percent(success["mean"], success["interval"]) if success else "–",
    ]


def _percent(rate, interval):
    return f"{100 * rate:.0f}{_brackets(interval, '.0f', 100)}"


def _brackets(interval, form, scale=1):
    return "" if interval is None else f" [{scale * interval[0]:{form}}, {scale * interval[1]:{form}}]"


def _number(value, form, scale=1):
    return "–" if value is None else f"{scale * value:{form}}"


def _seeds(numbers):
    count, rolled_out = len(numbers["seeds"]), numbers["rolled_out"]
    return str(count) if rolled_out in (0, count) else f"{count}, {rolled_out} rolled out"


def _kind(numbers):
    score = numbers["last"]["score"]
    kinds = {"seeds": f"t, {numbers['rolled_out']} seeds", "episodes": "episodes", "none": "none: summary.json is gone"}
    return kinds[score["kind"]] if score else "–"


def _range(steps):
    steps = sorted({step for step in steps if step is not None})
    return "–" if not steps else f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"


# The page ------------------------------------------------------------------------------------------------------------


def html_page(tasks, keys, left_out, *, command, base, home, max_video):
    """The page as text. base: folder that names are relative to; home: folder of the page, for links; max_video: bytes
    up to which a film is put in."""
    parts = ["<h1>Training runs</h1>", f"<p class='note'><code>{escape(command)}</code></p>", paragraph(NOTE)]
    for task, groups in tasks.items():
        parts += [f"<h2>{escape(task)}</h2>", html_table(group_table(groups))]
        pictures = {"Score and success against steps": plot_scores(groups), "Losses against steps": plot_losses(groups)}
        caption = ": mean (thick, where all seeds have values), every seed (thin), 95 % interval (band)"
        parts += [picture_of(png, name + caption) for name, png in pictures.items() if png is not None]
        if keys[task]:
            parts += ["<h3>What differs</h3>", html_table(difference_table(groups, keys[task]))]
        parts += ["<h3>Runs</h3>", html_table(run_table(groups, base))]
        films = [_film(group, base, home, max_video) + _reconstruction(group, base) for group in groups]
        if any(films):
            parts += ["<h3>The best run of every group</h3>", f"<div class='films'>{''.join(films)}</div>"]
    if left_out:
        parts += ["<h2>Left out</h2>", "<ul>", *(f"<li>{escape(reason)}</li>" for reason in left_out), "</ul>"]
    return "\n".join([HEAD, *parts, "</body></html>", ""])


def markdown_page(tasks, keys, left_out, *, command, base):
    """The tables as Markdown."""
    lines = ["# Training runs", "", f"`{command}`", "", NOTE]
    for task, groups in tasks.items():
        lines += ["", f"## {task}", "", *_markdown(group_table(groups))]
        if keys[task]:
            lines += ["", "### What differs", "", *_markdown(difference_table(groups, keys[task]))]
        lines += ["", "### Runs", "", *_markdown(run_table(groups, base))]
    if left_out:
        lines += ["", "## Left out", "", *(f"* {reason}" for reason in left_out)]
    return "\n".join([*lines, ""])


def _markdown(rows):
    return markdown_table([[cell.replace("|", "\\|") for cell in row] for row in rows])


def paragraph(text):
    return f"<p class='note'>{escape(text)}</p>"


def html_table(rows):
    head, *body = rows
    lines = [_row(head, "th"), *(_row(row, "td") for row in body)]
    return f"<div class='wide'><table>{''.join(lines)}</table></div>"


def _row(cells, tag):
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def picture_of(png, caption):
    image = f"<img alt='{escape(caption)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _film(group, base, home, max_video):
    """The newest film of the group's best run, inside the page or, beyond ``max_video`` bytes, as a link."""
    folders = [rollout["folder"] for rollout in reversed(group.best_run.rollouts)]
    film = next((file for folder in folders for file in sorted(folder.glob("*.mp4"))), None)
    if film is None:
        return ""
    caption = escape(f"{_label(group)}, {os.path.relpath(film, base)}")
    size = film.stat().st_size
    if size > max_video:
        link = escape(os.path.relpath(film, home))
        return f"<figure><a href='{link}'>{caption}</a>, {size / 1e6:.1f} MB</figure>"
    data = base64.b64encode(film.read_bytes()).decode()
    video = f"<video controls loop muted preload='metadata' src='data:video/mp4;base64,{data}'></video>"
    return f"<figure>{video}<figcaption>{caption}</figcaption></figure>"


def _reconstruction(group, base):
    """The newest picture in reconstructions/ of the group's best run."""
    files = sorted((group.best_run.folder / "reconstructions").glob("*.png"), key=lambda file: file.stat().st_mtime_ns)
    return picture_of(files[-1].read_bytes(), f"{_label(group)}, {os.path.relpath(files[-1], base)}") if files else ""
