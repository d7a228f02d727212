"""The tables and the picture of docs/latency.md are those of the committed results."""

from pathlib import Path

import pytest

from benchmarks import latency_page
from dsmoe_jax.runs import json_files
from experiments import source_figures as figures

REPOSITORY = Path(__file__).parents[2]
REPORT = json_files.read(REPOSITORY / figures.LATENCY)


def test_tables_and_picture():
    page = (REPOSITORY / "docs/latency.md").read_text()
    assert latency_page.renewed(page, REPORT) == page
    assert latency_page.picture(REPORT) == (REPOSITORY / "docs/latency.svg").read_text()


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match=r"^--page: must have the lines <!-- tables --> and <!-- "):
        latency_page.renewed("no marks", REPORT)


def test_a_line_by_hand():
    """1 + 2 + 3 + 4 ms: shares in per cent of ten."""
    row = dict.fromkeys(("router", "exchange", "experts", "shared"))
    given = {f"{part}_ms": i + 1.0 for i, part in enumerate(row)}
    given |= {"devices": 8, "limit": 2, "tokens": 1024, "path": "p", "rows": 1.5}
    given |= {"layer_ms": 9.0, "call_ms": 0.5, "router_ratio": None, "exchange_ratio": 2.0}
    line = latency_page.times(given)
    assert list(line.values()) == [
        "8", "1,024", "2", "p", "1.50", "1 (10 %)", "2 (20 %)", "3 (30 %)", "4 (40 %)", "10", "9",
        "0.5",
    ]  # fmt: skip
    assert list(latency_page.gains(given).values())[4:] == ["-", "2.00", "-", "-", "-"]
