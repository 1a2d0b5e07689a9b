"""The drawing of the house: which part of the package stands on which, by all imports in it."""

import ast
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

#: Top first. A part imports from the floors below it and from itself, in functions too. What is
#: not named stands on the floor of __init__.
FLOORS = """
    __main__
    training
    data doctor lightning metric
    __init__
    pretrained
    model
    binary_spikes
    nets
    calibration optim
    monitoring state
    nets.neurons
    clock_driven layer nets.report neuron
    fused_neuron
    functional kept
    counts
    ops
    _internal
"""
#: what runs up nevertheless, in a function, and why
UP = {("sj_taid.pretrained", "sj_taid.training.save_model"): "users import it from pretrained"}


FOLDER = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (FOLDER / "sj_taid").rglob("*.py")
}
HEIGHTS = {
    f"sj_taid.{part}".removesuffix(".__init__"): -i
    for i, floor in enumerate(FLOORS.split("\n"))
    for part in floor.split()
}


def part_of(module):
    return max((part for part in HEIGHTS if f"{module}.".startswith(f"{part}.")), key=len)


def imports_of(module):
    path = MODULES[module]
    home = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), home)
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else base for name in names)


def test_an_import_runs_down_and_none_in_a_circle():
    below = {module: MODULES.keys() & imports_of(module) for module in MODULES}
    parts = {(a, b): (part_of(a), part_of(b)) for a in below for b in below[a]}
    up = {pair for pair, (a, b) in parts.items() if a != b and HEIGHTS[a] <= HEIGHTS[b]}
    assert up == UP.keys()
    TopologicalSorter({a: {b for b in below[a] if (a, b) not in UP} for a in below}).prepare()
