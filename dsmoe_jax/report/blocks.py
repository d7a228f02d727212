"""A report written once, as blocks, and set as one self-contained HTML page and as Markdown.

The page loads nothing: style and pictures are inside, there are no scripts.  In running text
`code` and **bold** are understood; everything else is literal.
"""

from __future__ import annotations

import dataclasses
import html
import io
import pathlib
import re
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from dsmoe_jax.report.style import PALETTE, styled

CSS = (pathlib.Path(__file__).parent / "report.css").read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Heading:
    """A section begins."""

    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph; `kind` is "", "finding" (set off), "note" (small) or "source"."""

    text: str
    kind: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of strings.

    Attributes:
      head, rows: cells; the first column names the row.
      best: index of the row to stress, if any.
      prose: cells are words, set flush left.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: int | None = None
    prose: bool = False


@dataclasses.dataclass(frozen=True)
class Facts:
    """Names and their values, one a line."""

    pairs: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Code:
    """Lines to be typed."""

    text: str


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure with its name (of the file beside the Markdown), title and caption."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Figures, side by side where there is room."""

    pictures: Sequence[Picture]


Block = Heading | Text | Table | Facts | Code | Pictures


def svg(figure: Figure) -> str:
    """A figure as an <svg> element in its own colours; the same figure gives the same text."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with styled():
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    return text[text.index("<svg") :].strip()


def themed_svg(picture: Picture) -> str:
    """A figure for inside a page: by day and by night, of any width, its ids its own."""
    text = svg(picture.figure)
    for colour in PALETTE:
        text = text.replace(colour, f"var(--c{colour[1:]})")
    text = re.sub(r'\bid="', f'id="{picture.name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{picture.name}-", text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"\n\s*", "\n", text)
    label = html.escape(f"{picture.title}. {picture.caption}", quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page that needs nothing else."""
    day = "".join(f"--c{key[1:]}:{key};" for key in PALETTE)
    night = "".join(f"--c{key[1:]}:{value};" for key, value in PALETTE.items())
    colours = f":root{{{day}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{night}}}}}\n"
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8" />\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1" />\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{CSS}{colours}</style>\n</head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Text(text, kind):
            return f"<p class='{kind}'>{_inline(text)}</p>" if kind else f"<p>{_inline(text)}</p>"
        case Table():
            return _html_table(block)
        case Facts(pairs):
            items = (f"<dt>{_inline(k)}</dt><dd>{_inline(v)}</dd>" for k, v in pairs.items())
            return "<dl>\n" + "\n".join(items) + "\n</dl>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Pictures(pictures):
            items = (
                f"<figure>\n<h3>{html.escape(p.title)}</h3>\n{themed_svg(p)}\n"
                f"<figcaption>{_inline(p.caption)}</figcaption>\n</figure>"
                for p in pictures
            )
            return "<div class='pictures'>\n" + "\n".join(items) + "\n</div>"


def to_text(table: Table) -> str:
    """A table for a terminal."""
    lines = [list(table.head), *map(list, table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i and not table.prose else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [lines[0], rule, *lines[1:]]
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in table.head)
    rows = []
    for i, row in enumerate(table.rows):
        cells = "".join(f"<td>{_inline(cell)}</td>" for cell in row)
        rows.append(f"<tr class='best'>{cells}</tr>" if i == table.best else f"<tr>{cells}</tr>")
    kind = "wide left" if table.prose else "wide"
    body = "\n".join(rows)
    return (
        f"<div class='{kind}'><table>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _inline(text: str) -> str:
    text = html.escape(text.replace("'", "’"))
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def to_markdown(title: str, blocks: Sequence[Block], pictures: str) -> str:
    """The same as Markdown; `pictures` is the directory of NAME.svg, relative to the file."""
    return "\n\n".join([f"# {title}", *(_markdown(block, pictures) for block in blocks)]) + "\n"


def _markdown(block: Block, directory: str) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Text(text, kind):
            return {"finding": f"> {text}", "source": f"*{text}*"}.get(kind, text)
        case Table(head, rows, best, prose):
            stressed = [
                [f"**{c}**" if c else c for c in r] if i == best else r for i, r in enumerate(rows)
            ]
            rule = [":--"] + [":--" if prose else "--:"] * (len(head) - 1)
            lines = [head, rule, *stressed]
            return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)
        case Facts(pairs):
            return "\n".join(f"- {key}: {value}" for key, value in pairs.items())
        case Code(text):
            return f"```\n{text}\n```"
        case Pictures(pictures):
            return "\n\n".join(
                f"### {p.title}\n\n![{p.title}]({directory}/{p.name}.svg)\n\n{p.caption}"
                for p in pictures
            )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def standalone_svg(figure: Figure) -> str:
    """A figure as a file of its own, on white."""
    text = svg(figure)
    start = text.index(">") + 1
    return text[:start] + '\n<rect width="100%" height="100%" fill="#ffffff"/>' + text[start:]
