"""Reports on what was done with each neuron or norm of a net, printed as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Row(NamedTuple):
    """What was done with a neuron or norm.

    Attributes:
        layer: its path in the net, or several joined by " = " where it is used in several places.
        kind: the class it had.
        done: what was done, or "" if it was left alone.
        note: how equal the outputs are, or why it was left alone.
    """

    layer: str
    kind: str
    done: str
    note: str


@dataclass(frozen=True)
class Report:
    """What :func:`.swap_neurons` changed in a net; ``print`` it for a table.

    Attributes:
        rows: a :class:`Row` for each neuron.
        remark: what else there is to say of the net, or "".
    """

    rows: tuple[Row, ...]
    remark: str = ""

    @property
    def changed(self) -> tuple[Row, ...]:
        """The rows with something done."""
        return tuple(row for row in self.rows if row.done)

    @property
    def kept(self) -> tuple[Row, ...]:
        """The rows that were left alone, with the reason in ``note``."""
        return tuple(row for row in self.rows if not row.done)

    def __str__(self) -> str:
        head = f"{len(self.changed)} swapped, {len(self.kept)} left alone"
        return "\n".join(filter(None, (head, table_of(self.rows), self.remark)))

    __repr__ = __str__


def table_of(rows: Iterable[Row]) -> str:
    """The rows as an aligned table."""
    cells = [(row.layer or "net", row.kind, row.done or "-", row.note) for row in rows]
    return table(Row._fields, cells)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns; lines end with their text."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)
