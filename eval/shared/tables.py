"""Tables, rows of text of which the first one is the head, as Markdown and HTML; and how numbers are written."""

import re

from markupsafe import Markup, escape

NONE = "–"  # where there is no number


def show(value, form, scale=1):
    """The number ``value`` times ``scale`` in the format ``form``; NONE for None."""
    return NONE if value is None else f"{scale * value:{form}}"


def show_interval(value, interval, form, scale=1):
    """ "0.91 [0.88, 0.94]", or without the brackets where there is no interval."""
    bounds = "" if value is None or interval is None else " [{}, {}]".format(*(show(b, form, scale) for b in interval))
    return show(value, form, scale) + bounds


def short(number):
    """Three digits, without an exponent; NONE for None."""
    if number is None:
        return NONE
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}" if number >= 0.01 else f"{number:.4f}"


def markdown_table(rows):
    """Lines of Markdown, aligned so that they also read well in a terminal."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]]


def html_table(rows):
    """HTML of a table that scrolls within the page; a number and its interval break before the bracket alone."""
    lines = [_html_row(row, "td" if number else "th") for number, row in enumerate(rows)]
    return Markup("<div class='wide'><table>{}</table></div>").format(Markup("").join(lines))


def _html_row(cells, tag):
    kept = (re.sub(r"\[[^\]]*\]", lambda found: found[0].replace(" ", "\u00a0"), cell) for cell in cells)
    return Markup(f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in kept)}</tr>")
