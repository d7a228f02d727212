"""The tables of docs/economics.md are those that the program prints."""

from pathlib import Path

import pytest

from benchmarks import economics

PAGE = (Path(__file__).parents[2] / "docs/economics.md").read_text()


@pytest.mark.parametrize("number", range(len(economics.CASES)))
def test_tables(number):
    assert f"\n{economics.tables()[number]}\n" in PAGE


def test_what_the_page_says_of_them():
    report = economics.report(economics.CASES[0])
    sparse, dense = (model["training"]["chip_hours"] for model in report["models"])
    assert f"by {100 * (1 - sparse / dense):.0f} % here" in PAGE
    (pair,) = report["beside"]
    assert [span["faster"] for span in pair["faster"]] == [0, 1, 0]


def test_the_picture_can_be_drawn(tmp_path):
    economics.draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
