"""A report as Markdown, with its pictures in files beside it."""

from __future__ import annotations

from collections.abc import Sequence

from dsmoe_jax.report.blocks import Block, Code, Facts, Heading, Pictures, Table, Text


def to_markdown(title: str, blocks: Sequence[Block], pictures: str) -> str:
    """Markdown of a report; `pictures` is the directory of NAME.svg, relative to the file."""
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
