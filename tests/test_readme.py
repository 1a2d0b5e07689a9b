"""The Python of README and docs runs, block by block; `test_docs.py` tests the rest of the pages."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def read(path):
    return path.read_text(encoding="utf-8")


TEXTS = {page.stem: read(page) for page in PAGES}


def blocks(language):
    """Those of README and docs."""
    return [
        pytest.param(block, id=f"{name}-{number}")
        for name, text in TEXTS.items()
        for number, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("python"))
def test_python_block_runs_alone(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {"__name__": "block"})
