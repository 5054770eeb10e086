"""The report of ``python -m eval.attention``, as a page that needs nothing beside itself and as Markdown."""

from eval.attention.tables import describe_settings, notes, tables
from eval.shared.pages import Section, embedded, html_page, markdown_page

TITLE = "Attention mechanisms side by side"
CAPTIONS = {
    "latency.png": "Time against the number of patches",
    "tradeoff.png": "Error to softmax attention against time and FLOPs: the nearer to the lower left corner the better",
    "training.png": "Accuracy against time and FLOPs: the nearer to the upper left corner the better",
    "gallery.png": "What each mechanism weighs, for the same queries, keys and picture",
}


def pages(results, pictures):
    """(index.html, results.md) as text; pictures {file name: PNG}, in the page alone."""
    sections = [Section(title, text, rows) for title, text, rows in tables(results)]
    sections[0].facts = [f"{name}: {'; '.join(facts)}" for name, facts in notes(results).items()]
    sections[0].figures = [embedded("image", png, CAPTIONS[name]) for name, png in pictures.items()]
    sections.append(Section("Options", rows=_options(results)))
    told = {"intro": [describe_settings(results)], "command": results["command"]}
    return html_page(TITLE, sections, **told), markdown_page(TITLE, sections, **told)


def _options(results):
    rows = [["mechanism", "options"]]
    for name, module in results["mechanisms"].items():
        options = ", ".join(f"{key} {value}" for key, value in module["options"].items() if key != "name")
        rows.append([name, options or "none"])
    return rows
