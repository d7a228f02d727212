"""The page of the ledger: whole, self-contained, and the same from the same results."""

import html.parser
import re

import pytest

from dsmoe_jax.report import ledger_page
from dsmoe_jax.study.ledger import (
    Computed,
    FromExperiment,
    NoExperiment,
    NotTestable,
    SourceClaim,
    judge_all,
)
from experiments.v1 import fig5, table1

SOURCES = {"A": "a blog", "V1": "a paper"}


def evidence(*ours):
    return tuple(Computed("<b>", "a|b", lambda x=x: x, (1.0, 2.0), paper=1.5) for x in ours)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    claims = (
        SourceClaim(1, "A", "One & two", "First", evidence(1.5, 3.0)),
        SourceClaim(2, "V1", "Odd `x` *y*", "Second", (FromExperiment(table1.EXPERIMENT),)),
        SourceClaim(3, "V1", "Probes", "First", (FromExperiment(fig5.EXPERIMENT),)),
        SourceClaim(4, "A", "Nothing", "Second", (NotTestable("No."), NoExperiment("a run"))),
    )
    return judge_all(claims, tmp_path_factory.mktemp("none"))


@pytest.fixture
def written(judged, tmp_path):
    return {path.suffix: path.read_text() for path in ledger_page.write(judged, SOURCES, tmp_path)}


class Links(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.hrefs = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.hrefs += [values["href"]] if "href" in values else []


def test_every_claim_has_a_place_that_the_index_links_to(written):
    page = Links(written[".html"])
    assert page.tags.isdisjoint({"script", "link", "img", "iframe"})
    assert sorted(page.hrefs) == [f"#claim-{i}" for i in (1, 2, 3, 4)]
    assert sorted(page.ids) == [f"claim-{i}" for i in (1, 2, 3, 4)]
    headings = re.findall(r"^### (Claim \d)$", written[".md"], re.MULTILINE)
    assert headings == ["Claim 1", "Claim 3", "Claim 2", "Claim 4"]  # by theme
    assert sorted(re.findall(r"\]\((#claim-\d)\)", written[".md"])) == sorted(page.hrefs)


def test_the_summary_counts_statements(judged):
    assert ledger_page.summary(judged) == (
        "4 claims, tested as 16 statements: holds 1, reversed 1, not decided 13, not testable"
        " here 1."
    )


def test_what_is_literal_stays_so(written):
    assert "&lt;b&gt;" in written[".html"]
    assert "<b>" not in written[".html"]
    for block in re.findall(r"(?:^\|.*\|\n?)+", written[".md"], re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", row)) for row in block.splitlines()}
        assert len(cells) == 1, block


def test_each_command_is_shown_a_line_each(written):
    probes = "python -m experiments.v1.table1 --scale=demo\npython -m experiments.v1.fig5"
    for text in (written[".html"], written[".md"]):
        assert probes in text


def test_cells_of_a_card_have_their_heads(written):
    assert "<td data-head='here'>1.5</td>" in written[".html"]
    assert "<td class='good' data-head='here it'>✓ holds</td>" in written[".html"]


def test_the_same_results_give_the_same_files(judged, written, tmp_path):
    again = ledger_page.write(judged, SOURCES, tmp_path / "again")
    assert {path.suffix: path.read_text() for path in again} == written
    assert not re.search(r"\d{4}-\d\d-\d\d", written[".md"])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (2e9, "2B"),
        (0.2e9, "0.2B"),
        (16.3756e9, "16.38B"),
        (2057.65e12, "2057.7T"),
        (39.5996, "39.6"),
    ],
)
def test_numbers_have_the_papers_letters(value, shown):
    assert ledger_page._plain(value) == shown
