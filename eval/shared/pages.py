"""Reports as Markdown and as one HTML page that needs nothing beside itself, both from the same sections."""

import base64
from dataclasses import dataclass, field

from jinja2 import Environment

from eval.shared.tables import html_table, markdown_table

PAGE = """<!DOCTYPE html>
<html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>
<title>{{ title }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 75rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid #ccd2d9; }
.wide { overflow-x: auto; margin: 1rem 0; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { font-size: 0.875rem; padding: 0.3rem 0.6rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid #e3e7eb; }
th { vertical-align: bottom; border-bottom: 2px solid #ccd2d9; }
th:first-child, td:first-child { text-align: left; min-width: 12rem; position: sticky; left: 0; background: #fff;
  overflow-wrap: anywhere; }
img, video { max-width: 100%; } figcaption, .note { color: #57606a; font-size: 0.9rem; }
pre { font-size: 0.8rem; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto; }
.figures { display: flex; flex-wrap: wrap; gap: 1.5rem; } .figures figure { margin: 0; }
.several figure { max-width: 36rem; }
</style></head>
<body>
<h1>{{ title }}</h1>
{% for line in intro %}<p class='note'>{{ line }}</p>
{% endfor %}<p class='note'><code>{{ command }}</code></p>
{% for part in sections %}<h{{ part.level }}>{{ part.title }}</h{{ part.level }}>
{% if part.text %}<p class='note'>{{ part.text }}</p>
{% endif %}{% if part.rows %}{{ table(part.rows) }}
{% endif %}{% if part.facts %}<ul class='note'>{% for fact in part.facts %}<li>{{ fact }}</li>{% endfor %}</ul>
{% endif %}{% if part.figures %}<div class='figures{{ " several" if part.figures|length > 2 }}'>
{% for figure in part.figures %}<figure>
{% if figure.kind == "image" %}<img alt='{{ figure.caption }}' src='data:image/png;base64,{{ figure.data }}'>
{% elif figure.kind == "video" %}<video controls loop muted preload='metadata' \
src='data:video/mp4;base64,{{ figure.data }}'></video>
{% elif figure.kind == "text" %}<pre>{{ figure.data }}</pre>
{% endif %}<figcaption>{% if figure.kind == "link" %}<a href='{{ figure.data }}'>{{ figure.caption }}</a>\
{% else %}{{ figure.caption }}{% endif %}</figcaption>
</figure>
{% endfor %}</div>
{% endif %}{% endfor %}</body></html>
"""


@dataclass
class Figure:
    """Something of the HTML page alone; kind: "image" (PNG), "video" (mp4), "text", or "link" to a path."""

    kind: str
    data: str
    caption: str


@dataclass
class Section:
    """A title, a paragraph, a table, a list and figures, of which all but the title may be missing."""

    title: str
    text: str = ""
    rows: list = ()
    facts: list = ()
    figures: list = field(default_factory=list)
    level: int = 2


def embedded(kind, content, caption):
    """A ``Figure`` of the bytes ``content``."""
    return Figure(kind, base64.b64encode(content).decode(), caption)


def html_page(title, sections, *, intro=(), command):
    """The page as text."""
    environment = Environment(autoescape=True, trim_blocks=False)
    return environment.from_string(PAGE).render(
        title=title, sections=sections, intro=intro, command=command, table=html_table
    )


def markdown_page(title, sections, *, intro=(), command):
    """The same as Markdown, without figures, and without sections of nothing else."""
    blocks = [f"# {title}", *intro, f"`{command}`"]
    for part in sections:
        if part.figures and not (part.text or part.rows or part.facts):
            continue
        facts = "\n".join(f"* {fact}" for fact in part.facts)
        table = "\n".join(markdown_table(part.rows)) if part.rows else ""
        blocks += [block for block in (f"{'#' * part.level} {part.title}", part.text, table, facts) if block]
    return "\n\n".join(blocks) + "\n"
