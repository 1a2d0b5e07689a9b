"""Rows of reports on the neurons and norms of a net, and tables."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

State = Literal["fused", "ready", "swapped", "left alone"]


class Row(NamedTuple):
    """What was done with a neuron or norm.

    Attributes:
        layer: its path in the net, or several joined by " = " where it is used in several places.
        kind: the class it had.
        done: what was done, or "" if it was left alone.
        note: how equal the outputs are, or why it was left alone.
        state: how it is now; "ready" of a norm that a neuron may be fused with.
    """

    layer: str
    kind: str
    done: str
    note: str
    state: State


def table_of(rows: Iterable[Row]) -> str:
    """The rows as an aligned table."""
    cells = [(row.layer or "net", row.kind, row.done or "-", row.note) for row in rows]
    return table(("layer", "kind", "done", "note"), cells)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns; lines end with their text."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)
