"""A report as one HTML page that loads nothing: style and pictures are inside, without scripts."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Sequence

from dsmoe_jax.report.blocks import (
    Block,
    Code,
    Facts,
    Heading,
    Index,
    Pictures,
    Table,
    Text,
    spans,
)
from dsmoe_jax.report.names import one_line
from dsmoe_jax.report.numbers import NONE
from dsmoe_jax.report.style import PALETTE
from dsmoe_jax.report.svg import themed_svg

CSS = (pathlib.Path(__file__).parent / "report.css").read_text(encoding="utf-8")


def to_html(title: str, blocks: Sequence[Block], refresh: int | None = None) -> str:
    """HTML of a report, with style and pictures inside.

    Args:
      title: of the page.
      blocks: of the report, in order.
      refresh: seconds after which a browser loads the page again; None is never.
    """
    day = "".join(f"--c{key[1:]}:{key};" for key in PALETTE)
    night = "".join(f"--c{key[1:]}:{value};" for key, value in PALETTE.items())
    colours = f":root{{{day}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{night}}}}}\n"
    body = "\n".join(_html(block) for block in blocks)
    again = "" if refresh is None else f'<meta http-equiv="refresh" content="{refresh}" />\n'
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8" />\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1" />\n'
        f"{again}<title>{html.escape(title)}</title>\n<style>\n{CSS}{colours}</style>\n</head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level, linked):
            anchor = f" id='{html.escape(block.anchor)}'" if linked else ""
            return f"<h{level}{anchor}>{html.escape(text)}</h{level}>"
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
        case Index(lines):
            items = (f"<dt>{_inline(k)}</dt><dd>{_links(v)}</dd>" for k, v in lines.items())
            return "<dl class='index'>\n" + "\n".join(items) + "\n</dl>"


def _links(places: Sequence[tuple[str, Heading]]) -> str:
    return ", ".join(
        f"<a href='#{html.escape(heading.anchor)}'>{_cell(text)}</a>" for text, heading in places
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{_cell(cell)}</th>" for cell in table.head)
    rows = []
    for i, row in enumerate(table.rows):
        cells = "".join(_td(table, column, cell) for column, cell in enumerate(row))
        rows.append(f"<tr class='best'>{cells}</tr>" if i == table.best else f"<tr>{cells}</tr>")
    kind = "wide left" if table.prose else "wide cards" if table.cards else "wide"
    body = "\n".join(rows)
    return (
        f"<div class='{kind}'><table>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _td(table: Table, column: int, cell: str) -> str:
    kind = "blank" if table.cards and cell == NONE else table.marks.get(cell)
    mark = f" class='{kind}'" if kind else ""
    head = f" data-head='{_cell(table.head[column])}'" if table.cards and column else ""
    return f"<td{mark}{head}>{_cell(cell)}</td>"


def _cell(text: str) -> str:
    return html.escape(one_line(text).replace("'", "’"))


_TAGS = {"code": "<code>{}</code>", "bold": "<strong>{}</strong>", "text": "{}"}


def _inline(text: str) -> str:
    return "".join(
        _TAGS[kind].format(html.escape(part) if kind == "code" else _cell(part))
        for kind, part in spans(text)
    )
