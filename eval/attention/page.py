"""The page of ``python -m eval.attention``; it needs nothing beside itself."""

from html import escape

from eval.attention.tables import describe_settings, notes, tables
from eval.report.page import HEAD, html_table, paragraph, picture_of

TITLE = "Attention mechanisms side by side"
CAPTIONS = {
    "latency.png": "Time against the number of patches",
    "tradeoff.png": "Error to softmax attention against time and FLOPs: the nearer to the lower left corner the better",
    "training.png": "Accuracy against time and FLOPs: the nearer to the upper left corner the better",
    "gallery.png": "What each mechanism weighs, for the same queries, keys and picture",
}


def html_page(results, pictures):
    """The page as text; pictures {file name: PNG}."""
    parts = [
        f"<h1>{TITLE}</h1>",
        paragraph(describe_settings(results)),
        f"<p><code>{escape(results['command'])}</code></p>",
    ]
    (title, text, rows), *others = tables(results)
    parts += [f"<h2>{escape(title)}</h2>", paragraph(text), html_table(rows), _facts(results)]
    parts += [picture_of(png, CAPTIONS[name]) for name, png in pictures.items()]
    for title, text, rows in others:
        parts += [f"<h2>{escape(title)}</h2>", paragraph(text), html_table(rows)]
    parts += ["<h2>Options</h2>", html_table(_options(results))]
    return "\n".join([HEAD.replace("<title>Training runs", f"<title>{TITLE}"), *parts, "</body></html>", ""])


def _facts(results):
    lines = [f"<li>{escape(name)}: {escape('; '.join(facts))}</li>" for name, facts in notes(results).items()]
    return f"<ul class='note'>{''.join(lines)}</ul>"


def _options(results):
    rows = [["mechanism", "options"]]
    for name, module in results["mechanisms"].items():
        options = ", ".join(f"{key} {value}" for key, value in module["options"].items() if key != "name")
        rows.append([name, options or "none"])
    return rows
