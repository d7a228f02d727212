"""Every file and folder that a page of the documentation names is there."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])
TOP = ("benchmarks", "configs", "docs", "dsmoe_jax", "experiments", "launch", "notebooks", "tests")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    named = re.findall(rf"`((?:{'|'.join(TOP)})/[\w./-]*)`", page.read_text())
    missing = {path for path in named if not (REPOSITORY / path).exists()}
    assert not missing
