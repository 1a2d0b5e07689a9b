"""The limit on the length of functions, which ruff does not check."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: numba compiles a loop over time steps as one function
LOOPS = ROOT / "sj_taid" / "ops" / "alif" / "cpu" / "loops.py"


def test_functions_fit_a_page():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for folder in ("sj_taid", "experiments", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if path != LOOPS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 80
    ]
    assert not long, long
