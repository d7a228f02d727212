"""The report of an experiment: its blocks and their order.

Every number and every verdict is computed from the results; a missing one is shown as missing.
"""

from __future__ import annotations

import datetime
import os
import pathlib

from matplotlib.figure import Figure

from dsmoe_jax.report import analyses, facts, plots, sentences, tables
from dsmoe_jax.report.blocks import Block, Code, Heading, Picture, Pictures, Text
from dsmoe_jax.report.html_page import to_html
from dsmoe_jax.report.markdown import to_markdown
from dsmoe_jax.report.svg import standalone_svg
from dsmoe_jax.study import verdicts
from dsmoe_jax.study.results import Comparison


def write(comparison: Comparison, directory: pathlib.Path) -> pathlib.Path:
    """Writes report.html (self-contained), report.md and pictures/*.svg; returns the first."""
    title = comparison.experiment.title
    figures = plots.draw(comparison)
    blocks = build(comparison, figures, directory.parent)
    pictures = directory / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for picture in (p for block in blocks if isinstance(block, Pictures) for p in block.pictures):
        _replace(pictures / f"{picture.name}.svg", standalone_svg(picture.figure))
    _replace(directory / "report.md", to_markdown(title, blocks, pictures.name))
    _replace(directory / "report.html", to_html(title, blocks))
    return directory / "report.html"


def _replace(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def build(comparison: Comparison, figures: dict[str, Figure], results: pathlib.Path) -> list[Block]:
    """The report's blocks in order; `results` holds NAME-SCALE of all experiments."""
    source = f"{comparison.experiment.source}, repeated at the {comparison.scale} scale"
    return [
        Text(source, "source"),
        *(Text(sentence, "finding") for sentence in sentences.findings(comparison)),
        tables.results_table(comparison),
        Text(sentences.results_note(comparison), "note"),
        *_claims(comparison),
        *analyses.analyse(comparison, results),
        *_load(comparison),
        *_pictures(figures),
        *_domains(comparison),
        Heading("What was run"),
        facts.facts(comparison),
        Heading("What was kept equal"),
        *facts.equal_blocks(comparison),
        Heading("How to repeat it"),
        Code(comparison.command),
        Text(
            "The command continues where it was interrupted and skips what is finished. The numbers"
            " are in `results.jsonl`, one line a run, rebuilt from the runs' own logs."
            f" Report made on {datetime.date.today().isoformat()}.",
            "note",
        ),
    ]


def _claims(comparison: Comparison) -> list[Block]:
    found = verdicts.judge(comparison)
    if not found:
        return []
    blocks: list[Block] = [
        Heading("What the paper says, and what came out here"),
        Text(comparison.experiment.summary),
    ]
    if any(arm.paper_loss is not None for arm in comparison.arms):
        blocks.append(tables.paper_table(comparison))
    note = Text(sentences.claims_note(comparison, found), "note")
    return [*blocks, tables.claims_table(found), note]


def _load(comparison: Comparison) -> list[Block]:
    table = tables.load_table(comparison)
    if table is None:
        return []
    return [Heading("Load over training"), Text(sentences.LOAD_NOTE, "note"), table]


def _pictures(figures: dict[str, Figure]) -> list[Block]:
    if not figures:
        return []
    known = {name: plots.plot(name) for name in figures}
    pictures = [
        Picture(name, known[name].title, known[name].caption, figure)
        for name, figure in figures.items()
    ]
    return [Heading("Pictures"), Pictures(pictures)]


def _domains(comparison: Comparison) -> list[Block]:
    table = tables.domains_table(comparison)
    if table is None:
        return []
    return [Heading("Held-out text by domain"), Text("Bits per byte, mean over seeds."), table]
