"""The report: self-contained, well-formed, and honest about what is missing."""

import dataclasses
import html.parser
import json
import pathlib
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from made_up_runs import FakeTrain, run_made_up

from dsmoe_jax.report import blocks, plots, tables
from dsmoe_jax.report.html_page import to_html
from dsmoe_jax.report.markdown import to_markdown
from dsmoe_jax.report.numbers import NONE
from dsmoe_jax.report.style import PALETTE
from dsmoe_jax.study import verdicts
from experiments.v1.table1 import EXPERIMENT

VOID = {"meta", "br"}


class Page(html.parser.HTMLParser):
    """Collects tags, ids, references and the text of cells; complains of bad nesting."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.ids, self.references = [], set(), [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self._attributes(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def _attributes(self, attrs):
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("href", "xlink:href", "src", "srcset", "data", "action", "poster"):
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> pathlib.Path:
    """Blocks of a report with two seeds."""
    results = tmp_path_factory.mktemp("runs")
    run_made_up(results, seeds=2, report=True)
    return results / "table1-smoke"


@pytest.fixture
def page(directory) -> str:
    return (directory / "report.html").read_text()


def test_page_is_well_formed_and_refers_to_nothing_outside(page):
    parsed = Page(page)
    assert parsed.tags.isdisjoint({"script", "link", "img", "iframe", "object", "base"})
    assert parsed.references, "pictures refer to their own parts"
    inside = [r for r in parsed.references if r.startswith("data:image/png;base64,")]
    assert inside, "maps of loads are images in the page"
    for reference in set(parsed.references) - set(inside):
        assert reference.startswith("#"), reference
        assert reference[1:] in parsed.ids
    assert len(set(parsed.ids)) == len(parsed.ids)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style
    # Addresses that nothing follows: the names of XML namespaces.
    addresses = set(re.findall(r"https?://[^\"'\s<>]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_every_picture_is_in_the_page_and_beside_the_markdown(page, directory):
    pictures = plots.PLOTS.keys() - {"over_x"}  # which is of probes
    markdown = (directory / "report.md").read_text()
    assert page.count("<svg") == len(pictures)
    for name in pictures:
        assert f"(pictures/{name}.svg)" in markdown
        ElementTree.parse(directory / f"pictures/{name}.svg")


def test_an_experiment_chooses_its_pictures_and_a_measure_is_one(fake_run):
    experiment = dataclasses.replace(EXPERIMENT, pictures=("domains", "maxvio"))
    comparison = fake_run(experiment=experiment)
    figures = plots.draw(comparison)
    assert list(figures) == ["domains", "maxvio"]
    (ax,) = plots.draw(dataclasses.replace(comparison, experiment=dots("dead_experts")))[
        "dead_experts"
    ].axes
    assert ax.get_xlabel() == "dead experts on held-out text (lower is better)"
    found = comparison.by_seed("dead_experts")
    assert [line.get_xdata()[0] for line in ax.lines[1::2]] == [v[0] for v in found.values()]
    with pytest.raises(ValueError, match=r"picture 'los': must be a measure or one of final_loss,"):
        plots.plot("los")


def dots(measure):
    return dataclasses.replace(EXPERIMENT, pictures=(measure,))


def test_every_colour_of_the_palette_changes_at_night(page):
    body = page[page.index("<body>") :]
    assert not [colour for colour in PALETTE if colour in body]


def test_numbers_of_the_table_are_those_of_the_results(fake_run):
    comparison = fake_run(seeds=2)
    table = tables.results_table(comparison)
    losses = [row["validation_loss"] for row in comparison.rows if row.arm == "GShard"]
    cells = dict(zip(table.head, table.rows[3], strict=True))
    mean, spread = sum(losses) / 2, abs(losses[0] - losses[1]) / 2**0.5
    assert cells["validation loss"] == f"{mean:.3f} ± {spread:.3f}"
    assert cells["seeds"] == "2"
    assert table.best == 4


def test_load_over_training_is_that_of_the_logs(fake_run, tmp_path):
    table = tables.load_table(fake_run(seeds=2))
    assert [row[0] for row in table.rows] == ["Hash Layer", "Switch", "GShard", "DeepSeekMoE"]
    rows = {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}
    highest, worst, dead = [], [], []
    for log in sorted((tmp_path / "runs/table1-smoke").glob("gshard/seed*/metrics.jsonl")):
        logged = [json.loads(line) for line in log.read_text().splitlines()]
        highest.append(max(np.mean(row["maxvio"]) for row in logged))
        worst.append(max(logged[-1]["maxvio_running"]))
        dead.append(max(sum(row["dead_experts"]) for row in logged))
    assert len(highest) == 2
    spread = f"{np.mean(worst):.2f} ± {np.std(worst, ddof=1):.2f}"
    assert rows["GShard"]["its worst layer"] == spread
    assert rows["GShard"]["MaxVio of a batch: highest"].startswith(f"{np.mean(highest):.1f} ")
    assert rows["GShard"]["dead experts in a batch: most"].startswith(f"{np.mean(dead):.0f} ")


def test_missing_numbers_are_shown_as_missing(fake_run):
    with pytest.raises(KeyboardInterrupt):
        fake_run(FakeTrain(stop_after=3))
    comparison = fake_run(report_only=True)
    table = tables.results_table(comparison)
    rows = {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}
    for label in ("Switch", "GShard"):
        for column in ("validation loss", "bits / byte", "tokens", "MaxVio", "dead experts"):
            assert rows[label][column] == NONE, (label, column)
    assert rows["Dense"]["MaxVio"] == NONE
    assert rows["Dense"]["validation loss"] != NONE
    said = [row[1] for row in tables.claims_table(verdicts.judge(comparison)).rows]
    assert said.count("missing") == 9


def test_a_report_before_the_first_run_has_no_pictures_and_no_numbers(fake_run, tmp_path):
    comparison = fake_run(report_only=True, report=True)
    assert plots.draw(comparison) == {}
    Page((tmp_path / "runs/table1-smoke/report.html").read_text())
    assert all(row[1] == NONE for row in tables.results_table(comparison).rows)


def test_one_seed_is_said_to_be_one(fake_run, tmp_path):
    fake_run(seeds=1, report=True)
    text = (tmp_path / "runs/table1-smoke/report.md").read_text()
    assert "With a single seed nothing is known about its reliability" in text
    assert "going by the bare signs" in text
    assert "±" not in text.split("## Pictures")[0].replace("± is", "")


def test_text_is_escaped():
    page = to_html("a < b", [blocks.Text("1 < 2 & `x<y>`"), blocks.Code("<pre>")])
    assert "1 &lt; 2 &amp; <code>x&lt;y&gt;</code>" in page
    assert "<pre>&lt;pre&gt;</pre>" in page
    assert "<title>a &lt; b</title>" in page


def test_markdown_cells_keep_their_bars():
    table = blocks.Table(["", "x"], [["a|b", "1"]])
    assert "| a\\|b | 1 |" in to_markdown("t", [table], "pictures")
