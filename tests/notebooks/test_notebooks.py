"""Every notebook runs from top to bottom: its asserts hold, and our own code gives no warning."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from tests.tools.patience import PATIENCE

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.py"))

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
