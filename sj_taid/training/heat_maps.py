"""A sweep over two values as heat maps side by side, and how many of their cells are good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from .columns import METRICS, natural
from .plot import save
from .tables import means

#: A cell at most so far from the best one, in the figure's unit, is in the region of success.
NEAR_BEST = 2.0


class Maps(NamedTuple):
    """The maps of a sweep: the mean over all seeds for each cell, NaN where no run has ended.

    Attributes:
        figure: a name of ``METRICS``.
        row: the choice that a map's rows differ in.
        column: the choice that its columns differ in.
        panel: the choice that maps side by side differ in.
        cells: for each combination of the other choices, as text, a map for each panel.
    """

    figure: str
    row: str
    column: str
    panel: str
    cells: dict[str, dict[str, pd.DataFrame]]

    @classmethod
    def of(
        cls,
        table: pd.DataFrame,
        keys: Sequence[str],
        figure: str,
        row: str,
        column: str,
        panel: str,
        order: Callable[[str], Any] = natural,
    ) -> Maps:
        """Make them.

        Args:
            table: a row for every run.
            keys: the columns of the choices in which the runs differ.
            figure: see above, as the others.
            order: sorts the maps side by side by their names.

        Raises:
            ValueError: the runs do not differ in one of the three choices.
        """
        missing = [key for key in (row, column, panel) if key not in keys]
        if missing:
            differ = ", ".join(keys) or "nothing"
            raise ValueError(f"the runs do not differ in {', '.join(missing)}, but in {differ}")
        everything = means(table, figure, row, column)
        others = [key for key in keys if key not in (row, column, panel)]
        names = sorted(table[panel].unique(), key=order)
        cells = {}
        for values, part in table.groupby(others or [""] * len(table), sort=False):
            label = ", ".join(f"{short(k)} {v}" for k, v in zip(others, values, strict=False))
            cells[label] = {
                name: means(part[part[panel] == name], figure, row, column).reindex_like(everything)
                for name in names
            }
        return cls(figure, row, column, panel, cells)

    def regions(self) -> pd.DataFrame:
        """For each map its best cell, and the number of cells that are near the best."""
        sign = -1 if METRICS[self.figure].less_is_better else 1
        rows = []
        for others, panels in self.cells.items():
            best = {name: (sign * cells).max(axis=None) for name, cells in panels.items()}
            for name, cells in panels.items():
                of_all, own = (
                    int((sign * cells >= limit - NEAR_BEST).to_numpy().sum())
                    for limit in (max(best.values()), best[name])
                )
                rows.append(
                    {
                        "runs": others,
                        short(self.panel): name,
                        f"best cell, {METRICS[self.figure].title}": f"{sign * best[name]:.2f}",
                        "cells near the best of all": f"{of_all} of {cells.count().sum()}",
                        "near its own best": f"{own} of {cells.count().sum()}",
                    }
                )
        table = pd.DataFrame(rows)
        return table if any(self.cells) else table.drop(columns="runs")

    def draw(self, path: Path, difference: tuple[str, str] | None = None) -> None:
        """A row of maps for each combination of the other choices, in one scale of colours.

        Args:
            path: the picture.
            difference: two panels, the first minus the second of which is a map of its own; by
                default the last and the first.

        Raises:
            ValueError: ``difference`` names no panel.
        """
        names = [*next(iter(self.cells.values()))]
        first, second = difference or (names[-1], names[0])
        if not {first, second} <= {*names}:
            raise ValueError(f"no {first} or {second} among the values of {self.panel}: {names}")
        maps = [cells for panels in self.cells.values() for cells in panels.values()]
        low, high = np.nanmin(maps), np.nanmax(maps)
        apart = [panels[first] - panels[second] for panels in self.cells.values()]
        most = max(np.nanmax(np.abs(apart)), 1e-9) if np.isfinite(apart).any() else 1.0
        rows, columns = maps[0].shape
        width = 1.4 + (0.3 + 0.5 * columns) * (len(names) + 1)
        height = 0.8 + (0.45 + 0.4 * rows) * len(apart)
        figure = Figure((width, height), layout="constrained")
        grid = figure.subplots(len(apart), len(names) + 1, squeeze=False, sharex=True, sharey=True)
        scale = "viridis_r" if METRICS[self.figure].less_is_better else "viridis"
        for line, (others, panels), differing in zip(grid, self.cells.items(), apart, strict=True):
            for axis, (name, cells) in zip(line[:-1], panels.items(), strict=True):
                shown = _heat_map(axis, cells, scale, low, high)
                axis.set_title(name, fontsize=9)
            signed = _heat_map(line[-1], differing, "RdBu", -most, most, sign="+")
            line[-1].set_title(f"{first} - {second}", fontsize=9)
            line[0].set_ylabel(f"{others}\n{short(self.row)}" if others else short(self.row))
        for axis in grid[-1]:
            axis.set_xlabel(short(self.column))
        title = METRICS[self.figure].title
        figure.colorbar(shown, ax=grid[:, :-1], label=title, shrink=0.8, pad=0.01)
        figure.colorbar(signed, ax=grid[:, -1], label="difference", shrink=0.8)
        save(figure, path)


def _heat_map(
    axis: Axes, cells: pd.DataFrame, scale: str, low: float, high: float, sign: str = "-"
) -> AxesImage:
    """Colours and numbers; a cell without a value is hatched."""
    axis.set_facecolor("0.9")
    axis.patch.set(hatch="////", edgecolor="0.7")
    shown = axis.imshow(cells.to_numpy(), cmap=scale, vmin=low, vmax=high, aspect="auto")
    axis.set_xticks(range(cells.shape[1]), cells.columns)
    axis.set_yticks(range(cells.shape[0]), cells.index)
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(cells.to_numpy()):
        if np.isfinite(value):
            red, green, blue, _ = shown.to_rgba(value)
            color = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "black"
            text = axis.text(column, row, f"{value:{sign}.1f}", color=color, fontsize=7)
            text.set(ha="center", va="center")
    return shown


def short(key: str) -> str:
    """The last part of a choice's key."""
    return key.rpartition(".")[2]
