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
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dsmoe_jax.report import blocks, plots, tables
from dsmoe_jax.report.html_page import to_html
from dsmoe_jax.report.markdown import to_markdown
from dsmoe_jax.report.names import literal, one_line, short
from dsmoe_jax.report.numbers import NONE
from dsmoe_jax.report.style import PALETTE
from dsmoe_jax.report.text import to_text
from dsmoe_jax.study import verdicts
from dsmoe_jax.study.claims import bounded
from experiments.recipe import batches
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
    pictures = plots.PLOTS.keys() - {"over_x", "panels_over_x"}  # which is of probes
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


def test_a_legend_of_many_long_names_stays_in_its_picture(fake_run):
    experiment = dataclasses.replace(batches.EXPERIMENT, pictures=("domains",))
    figure = plots.draw(fake_run(experiment=experiment))["domains"]
    FigureCanvasAgg(figure).draw()
    legend = figure.legends[0].get_window_extent()
    assert len(figure.legends[0].texts) == 14
    assert figure.bbox.x0 <= legend.x0 < legend.x1 <= figure.bbox.x1
    assert figure.axes[0].get_window_extent().y1 <= legend.y0 < legend.y1 <= figure.bbox.y1


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
    for log in sorted((tmp_path / "runs/models-smoke").glob("gshard_2b/seed*/metrics.jsonl")):
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


NAMES = {  # as a cell of a table shows it; None: as it is
    "a$x^$b": None,
    "line\nbreak\ttab": "line break tab",
    "a|b|c": None,
    "<b>bold</b> & <script>": None,
    "`code` **stars** _x_ [link](y)": None,
    "back\\slash": None,
    "long " * 60: ("long " * 60).strip() + " ",
    "עברית العربية": None,
    "emoji 🎉 族 \U000e0041": None,
    "turned \u202e round": "turned \ufffd round",
    "null \x00 half \udce4": "null \ufffd half \ufffd",
    "_underscore": None,
}


@pytest.fixture(scope="module")
def odd_names(tmp_path_factory):
    """Directory and comparison of a report in which arms and domains have such names."""
    results = tmp_path_factory.mktemp("odd")
    names = list(NAMES)
    arms = [
        dataclasses.replace(EXPERIMENT.arms[2 + i % 3], label=f"{i} {name}"[:150])
        for i, name in enumerate(names)
    ]
    labels = [arm.label for arm in arms]
    experiment = dataclasses.replace(
        EXPERIMENT, arms=tuple(arms), equal=(), claims=(bounded(labels[0], above=1),)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("made_up_runs.DOMAINS", names)
        comparison = run_made_up(
            results, experiment=experiment, report=True, overrides={"data.corpus": "a`b`$c$ d"}
        )
    return results / "table1-smoke", comparison


def test_odd_names_are_shown_literally_in_html(odd_names):
    directory, comparison = odd_names
    text = (directory / "report.html").read_text()
    Page(text)
    cells = {html.unescape(cell) for cell in re.findall(r"<td>(.*?)</td>", text, re.DOTALL)}
    for name, shown in NAMES.items():
        assert (shown or name) in cells, name
    assert "<script>" not in text
    assert "<code>a`b`$c$ d</code>" in text
    best = next(iter(tables.ranking(comparison, "validation_loss")))
    assert f"<strong>{html.escape(one_line(best))}</strong> has the lowest" in text


def test_odd_names_break_no_table_in_markdown(odd_names):
    """As CommonMark with tables reads it: every row has as many cells as its head."""
    directory, _ = odd_names
    text = (directory / "report.md").read_text()
    for block in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        rows = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in block.splitlines()]
        assert len(set(rows)) == 1, block
    cells = [re.sub(r"\\(.)", r"\1", cell) for cell in re.findall(r"^\| (.*?) \| ", text, re.M)]
    cells = {html.unescape(cell) for cell in cells}
    for name, shown in NAMES.items():
        if "|" not in name:
            assert (shown or name) in cells, name
    assert "a\\$x^\\$b" in text
    assert "`` a`b`$c$ d ``" in text
    assert "<b>" not in text


def test_odd_names_are_shown_literally_in_pictures(odd_names):
    """In the text of the SVGs, which are whole; long ones are cut."""
    directory, _ = odd_names
    shown = {}
    for path in directory.glob("pictures/*.svg"):
        tree = ElementTree.parse(path)
        shown[path.stem] = "".join(tree.getroot().itertext())
    assert set(shown) == set(plots.PLOTS) - {"over_x", "panels_over_x"}
    for name, text in NAMES.items():
        assert short(text or name) in shown["domains"], name
        assert short(f" {text or name}".strip(), 18)[:-1] in shown["final_loss"], name
    assert "a$x^$b" in shown["expert_load"]


def test_odd_names_keep_the_lines_of_a_terminal(odd_names):
    _, comparison = odd_names
    table = tables.domains_table(comparison)
    lines = to_text(table).split("\n")
    assert len(lines) == 2 + len(NAMES)
    assert blocks.plain(rf"**a \*\* {literal('`b`')}** `c`") == "a ** `b` c"


@pytest.mark.parametrize("label", ["🎉", "!", "x" * 300])
def test_an_arm_without_a_name_for_its_directory_is_refused(label):
    arms = (dataclasses.replace(EXPERIMENT.arms[0], label=label),)
    with pytest.raises(ValueError, match=r"table1: arm.*(letters or digits|bytes of letters)"):
        dataclasses.replace(EXPERIMENT, arms=arms, equal=(), claims=())


def test_markdown_cells_keep_their_bars():
    table = blocks.Table(["", "x"], [["a|b", "1"]])
    assert "| a\\|b | 1 |" in to_markdown("t", [table], "pictures")
