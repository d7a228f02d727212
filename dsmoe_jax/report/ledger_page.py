"""The page of the ledger: a summary, then every claim with its rows, by theme."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsmoe_jax.report.blocks import Block, Code, Heading, Index, Table, Text
from dsmoe_jax.report.html_page import to_html
from dsmoe_jax.report.markdown import to_markdown
from dsmoe_jax.report.names import literal
from dsmoe_jax.report.numbers import NONE, fixed, signed
from dsmoe_jax.runs import json_files
from dsmoe_jax.study import ledger
from dsmoe_jax.study.ledger import (
    FIGURE,
    HOLDS_SO_FAR,
    MARGIN,
    MIXED,
    REVERSED_SO_FAR,
    STANDINGS,
    UNTESTABLE,
    Entry,
    JudgedClaim,
)
from dsmoe_jax.study.spread import CONFIDENCE
from dsmoe_jax.study.verdicts import HOLDS, REVERSED, UNDECIDED

TITLE = "Every claim, tested"
NAME = "ledger"  # of the files
SHOWN = {
    HOLDS: "✓ holds",
    REVERSED: "✗ reversed",
    UNDECIDED: "? not decided",
    UNTESTABLE: "– not testable here",
}
MARKS = dict(zip(SHOWN.values(), ("good", "bad", "open", "none"), strict=True))
STANDING_NAMES = {
    HOLDS: "✓ hold",
    HOLDS_SO_FAR: "✓ hold as far as decided",
    REVERSED: "✗ reversed",
    REVERSED_SO_FAR: "✗ reversed as far as decided",
    MIXED: "✓✗ hold in part",
    UNDECIDED: "? not decided",
    UNTESTABLE: "– not testable here",
}
assert tuple(STANDING_NAMES) == STANDINGS


def write(
    judged: Sequence[JudgedClaim], sources: Mapping[str, str], directory: Path
) -> tuple[Path, ...]:
    """Writes ledger.md, ledger.html (self-contained) and ledger.jsonl; returns their paths.

    The same claims and results give the same files.

    Args:
      judged: all claims, in the order of their numbers.
      sources: letter of a source -> the source, in words.
      directory: of the files; made if it is not there.

    Raises:
      OSError: naming the file, if one cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    blocks = build(judged, sources)
    texts = {
        "md": to_markdown(TITLE, blocks, pictures="."),
        "html": to_html(TITLE, blocks),
        "jsonl": ledger.to_jsonl(judged),
    }
    paths = {ending: directory / f"{NAME}.{ending}" for ending in texts}
    for ending, text in texts.items():
        json_files.write_text(paths[ending], text)
    return tuple(paths.values())


def summary(judged: Sequence[JudgedClaim]) -> str:
    """The counts of claims and rows in a sentence."""
    entries = [entry for claim in judged for entry in claim.entries]
    counts = collections.Counter(entry.verdict for entry in entries)
    found = ", ".join(f"{verdict} {counts[verdict]}" for verdict in SHOWN)
    return f"{len(judged)} claims, tested as {len(entries)} statements: {found}."


def build(judged: Sequence[JudgedClaim], sources: Mapping[str, str]) -> list[Block]:
    """The page's blocks in order."""
    headings = {claim.source.id: _heading(claim) for claim in judged}
    letters = "; ".join(f"**{letter}** {literal(text)}" for letter, text in sources.items())
    return [
        Text("Claims of the sources beside what came out here", "source"),
        Text(summary(judged), "finding"),
        _counts(judged),
        Text(_caution(judged), "note"),
        Heading("Claims by verdict"),
        _index(judged, headings),
        Heading("How to read it"),
        Text(_reading()),
        Text(f"Sources: {letters}.", "note"),
        *_themes(judged, headings),
        Heading("How to make it again"),
        Code("python -m experiments.ledger"),
        Text(
            "It reads the results of the experiments and trains nothing. The rows with all their"
            " numbers are in `ledger.jsonl`."
        ),
    ]


def _counts(judged: Sequence[JudgedClaim]) -> Table:
    """Statements by verdict and by what it rests on."""
    entries = [entry for claim in judged for entry in claim.entries]
    kinds = {
        "computed": [entry for entry in entries if entry.kind == FIGURE],
        "trained": [e for e in entries if e.kind == MARGIN and e.ours is not None],
        "no number": [e for e in entries if e.ours is None],
    }
    rows = []
    for verdict, name in SHOWN.items():
        counts = [sum(entry.verdict == verdict for entry in found) for found in kinds.values()]
        rows.append([name, str(sum(counts)), *(str(n or NONE) for n in counts)])
    return Table(["", "all", *kinds], rows, marks=MARKS)


def _caution(judged: Sequence[JudgedClaim]) -> str:
    """Note on what the verdicts of trained models rest on."""
    trained = [e for _, entries in judged for e in entries if e.kind == MARGIN and e.seeds]
    scales = collections.Counter(str(entry.scale) for entry in trained)
    listed = ", ".join(f"{n} at {scale} scale" for scale, n in scales.items()) or "none yet"
    text = (
        "Computed: from configs, formulas, pure functions and kept times. Trained: from trained"
        f" models, {listed}; only the scale called paper has the sizes of the papers' models."
    )
    one_seed = sum(entry.seeds == 1 for entry in trained)
    return text + (f" {one_seed} are the bare sign of a single seed." if one_seed else "")


def _index(judged: Sequence[JudgedClaim], headings: Mapping[int, Heading]) -> Index:
    lines = {}
    for standing, name in STANDING_NAMES.items():
        ids = [claim.source.id for claim in judged if claim.standing == standing]
        if ids:
            lines[f"{name} ({len(ids)})"] = [(str(i), headings[i]) for i in ids]
    return Index(lines)


def _reading() -> str:
    return (
        "A claim of a source is tested as one or more statements. Where a statement compares"
        " trained models, the numbers say **by how much** it is met, so that those above 0 agree"
        " with it (losses in nats per token): what the paper's own numbers give, and ours with its"
        f" {CONFIDENCE:.0%} interval over the seeds. It holds, or is reversed, when that interval"
        " excludes 0. Each is judged by itself, so that of twenty statements without any effect"
        " about one looks decided. Other numbers follow from configs and formulas, at the papers'"
        " own sizes; they hold within the interval beside them. **Not decided** means that the runs"
        " are too few, or are not made yet."
    )


def _themes(judged: Sequence[JudgedClaim], headings: Mapping[int, Heading]) -> list[Block]:
    blocks: list[Block] = []
    for theme in dict.fromkeys(claim.source.theme for claim in judged):
        blocks.append(Heading(theme))
        for claim in judged:
            if claim.source.theme == theme:
                blocks += [headings[claim.source.id], *_claim_blocks(claim)]
    return blocks


def _heading(claim: JudgedClaim) -> Heading:
    return Heading(f"Claim {claim.source.id}", level=3, linked=True)


def _claim_blocks(claim: JudgedClaim) -> list[Block]:
    counts = collections.Counter(entry.verdict for entry in claim.entries)
    found = ", ".join(f"{SHOWN[verdict]} {counts[verdict]}" for verdict in SHOWN if counts[verdict])
    blocks: list[Block] = [
        Text(literal(claim.source.claim)),
        Text(f"Source: {literal(claim.source.source)}. **{found}**", "note"),
    ]
    for _, group in itertools.groupby(claim.entries, key=lambda entry: (entry.kind, entry.command)):
        blocks += _group_blocks(list(group))
    return blocks


def _group_blocks(entries: list[Entry]) -> list[Block]:
    """Blocks of the rows of one kind and command: a table, the command, what must be known."""
    tables = {MARGIN: _margins, FIGURE: _figures}
    whys = dict.fromkeys(entry.why for entry in entries if entry.why)
    kind = entries[0].kind
    if kind not in tables:
        return [block for entry in entries for block in _words(entry)]
    blocks: list[Block] = [tables[kind](entries)]
    notes = [why for why in whys if not any(why in other for other in whys if other != why)]
    blocks += [Text(literal(note), "note") for note in notes]
    return blocks + _command(entries[0])


def _words(entry: Entry) -> list[Block]:
    """Blocks of an entry without numbers."""
    about = f"{literal(entry.statement)}: " if entry.statement else ""
    text = Text(f"**{SHOWN[entry.verdict]}** {about}{literal(entry.why)}")
    return [text, *_command(entry)]


def _command(entry: Entry) -> list[Block]:
    return [Code(entry.command.replace(" && ", "\n"))] if entry.command else []


def _margins(entries: list[Entry]) -> Table:
    rows = []
    for entry in entries:
        width = None if entry.high is None or entry.ours is None else entry.high - entry.ours
        tail = f" ± {fixed(width, 3)}" if width is not None else ""
        seeds = "" if entry.seeds is None else f", {entry.seeds} seed{'s'[: entry.seeds != 1]}"
        scale = NONE if entry.scale is None else entry.scale + seeds
        ours = signed(entry.ours) + tail
        rows.append([entry.statement, SHOWN[entry.verdict], signed(entry.paper), ours, scale])
    head = ["statement", "here it", "paper: by", "here: by", "scale"]
    return Table(head, rows, cards=True, marks=MARKS)


def _figures(entries: list[Entry]) -> Table:
    rows = []
    for entry in entries:
        assert entry.accepted is not None
        said = entry.quantity in entry.statement
        rows.append(
            [
                entry.statement if said else f"{entry.statement}: {entry.quantity}",
                SHOWN[entry.verdict],
                _plain(entry.paper),
                _plain(entry.ours),
                _interval(*entry.accepted),
                NONE if entry.scale is None else entry.scale,
            ]
        )
    head = ["statement", "here it", "source", "here", "holds within", "scale"]
    return Table(head, rows, cards=True, marks=MARKS)


def _interval(low: float, high: float) -> str:
    if high == float("inf"):
        return f"above {_plain(low)}"
    return _plain(low) if low == high else f"{_plain(low)} to {_plain(high)}"


def _plain(value: float | None) -> str:
    """Four digits or one decimal, with the papers' letters: 0.2B, 16.38B, 2057.7T."""
    if value is None:
        return NONE
    for unit, letter in ((1e12, "T"), (1e9, "B")):
        if abs(value) >= unit / 10:
            return _digits(value / unit) + letter
    return _digits(value)


def _digits(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 1000 else f"{value:.4g}"
