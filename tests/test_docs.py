"""The Python in the documentation runs, each page from top to bottom."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.joinpath("docs").glob("*.md"))]


def python_of(page):
    return "\n\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))


@pytest.mark.parametrize("page", [p for p in PAGES if python_of(p)], ids=lambda page: page.stem)
def test_page_runs(page):
    exec(compile(python_of(page), str(page), "exec"), {"__name__": page.stem})


def test_most_pages_have_python():
    assert len([page for page in PAGES if python_of(page)]) >= 7
    assert python_of(ROOT / "README.md")
