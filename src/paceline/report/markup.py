"""Small pieces of HTML. Whatever comes from the run is escaped here, once, on its way into the page."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Sequence
from string import Template

from paceline.report.stylesheet import CSS
from paceline.report.theme import Drawing, Size, to_svg

_MOST_COLUMNS = 5
_UNIT = re.compile(
    r"(?<=\d) (?=%|(?:µs|ms|s|min|h|d|bytes|KiB|MiB|GiB|TiB|workers?|threads?|cores?|samples?|steps?)\b)"
)
_IN_LAYOUT = re.compile(r",(?=[a-z_]+=)")

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$css</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page of `parts` that are HTML already; its policy lets nothing load or run."""
    return _PAGE.substitute(title=text(title), css=CSS, body="\n".join(part for part in parts if part))


def text(value: object) -> str:
    """Escaped text; a number and its unit stay on one line."""
    return html.escape(_UNIT.sub("\u00a0", str(value)))


def wrapped(value: object) -> str:
    """`text` in which a line may also end within a layout, after a comma; not for attributes."""
    return _IN_LAYOUT.sub(",<wbr>", text(value))


def verbatim(value: object) -> str:
    """Escaped text in a fixed pitch, with its own line breaks."""
    return f"<pre>{html.escape(str(value))}</pre>"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number in a table, with a smaller remark below it."""

    value: str
    aside: str = ""


def table(head: Sequence[str], rows: Sequence[Sequence[str | Cell]], *, chosen: int | None = None) -> str:
    """A table whose first column names the row; `Cell`s are numbers, set to the right.

    On a phone each row of a table with many columns becomes a short list. `chosen` is the index of
    the row to set in bold.
    """
    numeric = [any(len(row) > i and isinstance(row[i], Cell) for row in rows) for i in range(len(head))]
    cells = "".join(
        f'<th scope="col"{_n(n)}>{text(h).replace("_", "_<wbr>")}</th>'
        for h, n in zip(head, numeric, strict=True)
    )
    shape = "stack" if len(head) > _MOST_COLUMNS else "plain"
    body = []
    for index, row in enumerate(rows):
        first, *others = row
        mark = ' class="chosen"' if index == chosen else ""
        line = [f'<tr{mark}><th scope="row"{_n(isinstance(first, Cell))}>{_content(first)}</th>']
        for label, value, right in zip(head[1:], others, numeric[1:], strict=True):
            line.append(f'<td data-label="{text(label)}"{_n(right)}>{_content(value)}</td>')
        body.append("".join(line) + "</tr>")
    return (
        f'<div class="table"><table class="{shape}"><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values; the values are HTML already."""
    return (
        '<dl class="facts">' + "".join(f"<dt>{text(n)}</dt><dd>{value}</dd>" for n, value in pairs) + "</dl>"
    )


def figure(drawing: Drawing, *, heading: bool = False, alone: bool = True) -> str:
    """The drawing at both sizes, of which the page shows the one that fits, and its caption."""
    svgs = "".join(
        f'<div class="{name}" role="img" aria-label="{text(drawing.title)}">{to_svg(drawing, size)}</div>'
        for size, name in ((Size.WIDE if alone else Size.HALF, "wide"), (Size.NARROW, "narrow"))
    )
    title = f"<h3>{text(drawing.title)}</h3>" if heading else ""
    return (
        f'<figure class="{"one" if alone else "half"}">{title}{svgs}'
        f"<figcaption>{wrapped(drawing.caption)}</figcaption></figure>"
    )


def section(title: str, *parts: str, note: str = "") -> str:
    """A section of the page; nothing where it has neither parts nor a note."""
    if not any(parts) and not note:
        return ""
    told = f'<p class="note">{text(note)}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{told}{''.join(parts)}</section>"


def _content(value: str | Cell) -> str:
    if isinstance(value, str):
        return wrapped(value)
    aside = f'<span class="aside">{text(value.aside)}</span>' if value.aside else ""
    return f"<span>{text(value.value)}{' ' if aside else ''}{aside}</span>"


def _n(numeric: bool) -> str:
    return ' class="n"' if numeric else ""
