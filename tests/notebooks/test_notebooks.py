"""Every notebook runs from top to bottom: its asserts hold, and our own code gives no warning."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from tests.tools.patience import PATIENCE

REPOSITORY = Path(__file__).parents[2]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.py"))

# A kernel that starts may warn about itself; what the package or a cell does must not.
STRICT = """
import warnings
for own in ("dsmoe_jax", "configs", "__main__"):
    warnings.filterwarnings("error", module=own)
"""


def execute(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Runs all cells as Jupyter would, started in a folder."""
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, kernel_name="python3", timeout=PATIENCE, resources=where).execute()


# What Jupyter's client warns about in this process is no concern of ours.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch, tmp_path):
    """In any folder: what it needs is installed."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = jupytext.read(path)
    execute(notebook, tmp_path)
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert figures, "a notebook shows something"


def first_code(path: Path) -> str:
    """The cell of a notebook that finds the package."""
    return next(cell.source for cell in jupytext.read(path).cells if cell.cell_type == "code")


def test_all_notebooks_find_the_package_in_the_same_way():
    assert len({first_code(path) for path in NOTEBOOKS}) == 1


@pytest.mark.parametrize("start", ["notebooks", ".", "beside", "elsewhere"])
def test_without_the_package_the_checkout_is_installed(start, monkeypatch, tmp_path):
    """Folders in which Jupyter (the notebook's), VS Code (that or the root) and Colab start."""
    installed = []
    monkeypatch.setattr(metadata, "distributions", lambda name: iter(()))
    monkeypatch.setattr(subprocess, "run", lambda command, check: installed.append(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    checkout = REPOSITORY
    folder = tmp_path if start in ("beside", "elsewhere") else REPOSITORY / start
    if start == "beside":
        checkout = tmp_path / "cloned"
        (checkout / "dsmoe_jax").mkdir(parents=True)
        (checkout / "dsmoe_jax" / "__init__.py").touch()
    monkeypatch.chdir(folder)
    code = compile(first_code(NOTEBOOKS[0]), "first cell", "exec")
    if start == "elsewhere":
        with pytest.raises(AssertionError, match="clone it"):
            exec(code, {})
        return
    exec(code, {})
    assert installed == [[sys.executable, "-m", "pip", "install", "-qe", checkout]]
    assert sys.path[0] == str(checkout)


def test_the_index_has_every_notebook():
    index = (REPOSITORY / "notebooks" / "README.md").read_text()
    assert {path.name for path in NOTEBOOKS} == set(re.findall(r"\]\((\w+\.py)\)", index))
