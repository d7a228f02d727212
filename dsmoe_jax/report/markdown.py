"""A report as Markdown, with its pictures in files beside it."""

from __future__ import annotations

import re
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


def to_markdown(title: str, blocks: Sequence[Block], pictures: str) -> str:
    """Markdown of a report; `pictures` is the directory of NAME.svg, relative to the file."""
    return "\n\n".join([f"# {title}", *(_markdown(block, pictures) for block in blocks)]) + "\n"


def _markdown(block: Block, directory: str) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text, kind):
            text = _inline(text)
            return {"finding": f"> {text}", "source": f"*{text}*"}.get(kind, text)
        case Table(head, rows, best, prose, cards):
            cells = [[_literal(cell) for cell in row] for row in rows]
            if best is not None:
                cells[best] = [f"**{cell}**" if cell else cell for cell in cells[best]]
            rule = [":--"] + [":--" if prose or cards else "--:"] * (len(head) - 1)
            lines = [[_literal(cell) for cell in head], rule, *cells]
            return "\n".join("| " + " | ".join(line) + " |" for line in lines)
        case Facts(pairs):
            return "\n".join(f"- {key}: {_inline(value)}" for key, value in pairs.items())
        case Code(text):
            fence = _fence(text, 3)
            return f"{fence}\n{text}\n{fence}"
        case Pictures(pictures):
            return "\n\n".join(
                f"### {p.title}\n\n![{p.title}]({directory}/{p.name}.svg)\n\n{_inline(p.caption)}"
                for p in pictures
            )

        case Index(lines):
            return "\n".join(f"- {_inline(key)}: {_links(value)}" for key, value in lines.items())


def _links(places: Sequence[tuple[str, Heading]]) -> str:
    return ", ".join(f"[{_literal(text)}](#{heading.anchor})" for text, heading in places)


def _inline(text: str) -> str:
    return "".join(_span(kind, part) for kind, part in spans(text))


def _span(kind: str, text: str) -> str:
    if kind == "code":
        fence = _fence(text, 1)
        padding = " " if "`" in text else ""
        return f"{fence}{padding}{text}{padding}{fence}"
    return f"**{_literal(text)}**" if kind == "bold" else _literal(text)


def _fence(text: str, shortest: int) -> str:
    """Backticks to quote a text: more in a row than it has itself."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(shortest, longest + 1)


def _literal(text: str) -> str:
    """Text in which Markdown, HTML and mathematics see nothing but text."""
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*\[\]|$~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
