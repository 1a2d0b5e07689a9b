"""The notebooks are kept clean; ``make docs`` runs them, and fails where one does."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra test")

NOTEBOOKS = sorted(Path(__file__).parents[1].joinpath("docs", "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_without_outputs(path):
    """``make docs`` makes them, so that they are those of the code beside them."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not [cell for cell in code if cell.outputs or cell.execution_count]
