"""Blocks of a report, which HTML, Markdown and the terminal render each in their own way.

In running text `code` and **bold** are understood, and a backslash takes the meaning of the
character after it; everything else is literal.  So are the cells of tables, in all of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

_SPANS = re.compile(
    r"`(?P<code>(?:\\.|[^`\\])+)`|\*\*(?P<bold>(?:\\.|[^*\\])+)\*\*"
    r"|(?P<text>(?:\\.|[^`*\\])+|.)",
    re.DOTALL,
)


def spans(text: str) -> list[tuple[str, str]]:
    """Running text as (kind, literal text); the kind is "code", "bold" or "text"."""
    found = []
    for match in _SPANS.finditer(text):
        kind = match.lastgroup
        assert kind is not None
        found.append((kind, re.sub(r"\\(.)", r"\1", match[kind], flags=re.DOTALL)))
    return found


def plain(text: str) -> str:
    """Running text without its markup, for a terminal."""
    return "".join(part for _, part in spans(text))


@dataclasses.dataclass(frozen=True)
class Heading:
    """The heading of a section.

    Attributes:
      text: of the heading.
      level: 2, or 3 within a section.
      linked: whether an `Index` links to it; its text must then differ from other headings'.
    """

    text: str
    level: int = 2
    linked: bool = False

    @property
    def anchor(self) -> str:
        """The name that links use, as code-hosting sites make it: "Claim 8" -> "claim-8"."""
        kept = re.sub(r"[^\w\- ]", "", self.text.lower())
        return kept.replace(" ", "-")


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
      best: index of the row in bold; None for none.
      prose: whether the cells are words, which are set flush left.
      cards: whether the first column is a sentence; on a narrow page each row becomes a card, with
        the head beside its cells.
      marks: cells to set off, by their text: "good", "bad", "open" or "none".
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: int | None = None
    prose: bool = False
    cards: bool = False
    marks: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Facts:
    """Names and their values, one a line."""

    pairs: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Code:
    """Lines of a shell command."""

    text: str


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure with its name (NAME.svg beside the Markdown), title and caption."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Figures, side by side where there is room."""

    pictures: Sequence[Picture]


@dataclasses.dataclass(frozen=True)
class Index:
    """Links to headings of the page.

    Attributes:
      lines: name of a line -> the short texts and the headings that it links to.
    """

    lines: Mapping[str, Sequence[tuple[str, Heading]]]


Block = Heading | Text | Table | Facts | Code | Pictures | Index
