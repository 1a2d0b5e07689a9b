"""Maps of results/maps/start_map.csv: the accuracy over tau and threshold at the start."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from store import RESULTS, load_study

from sj_taid.training.columns import METRICS
from sj_taid.training.plot import save
from sj_taid.training.tables import means

TAU, THRESHOLD = "neuron_start.tau", "neuron_start.v_threshold"
NEURONS = ["lif", "plif", "alif", "alif_channel"]  # each learns more than the one before
#: A cell at most so many points below the best one counts as near it.
NEAR_BEST = 2.0


def load_start_map(results: Path = RESULTS) -> pd.DataFrame:
    """The runs, with neurons in the order of ``NEURONS``."""
    table = load_study("start_map", results)
    return table.assign(neuron=pd.Categorical(table["neuron"], NEURONS, ordered=True))


def count_good_starts(table: pd.DataFrame) -> pd.DataFrame:
    """The best cell of each map, a mean over seeds, and how many cells are near the best."""
    setting = ["dataset", "model.norm", "neuron_start.calibrate"]
    by_map = [*setting, "neuron"]
    percent = table.assign(accuracy=table["accuracy"] / METRICS["accuracy"].unit)
    cells = percent.groupby([*by_map, TAU, THRESHOLD], observed=True)["accuracy"].mean()
    count = cells.groupby(by_map, observed=True).size().astype(str)

    def near(group: list[str]) -> pd.Series:
        best = cells.groupby(group, observed=True).transform("max")
        good = (cells >= best - NEAR_BEST).groupby(by_map, observed=True).sum()
        return good.astype(str) + " of " + count

    best = cells.groupby(by_map, observed=True).max().map("{:.2f}".format)
    columns = {
        f"best cell, {METRICS['accuracy'].title}": best,
        "cells near the best of all": near(setting),
        "near its own best": near(by_map),
    }
    return pd.DataFrame(columns).reset_index().rename(columns=short)


def draw_all(results: Path = RESULTS) -> None:
    """Draw docs/images/start-map-*.png, for each data set with and without calibration."""
    groups = load_start_map(results).groupby(["dataset", "neuron_start.calibrate"])
    for (dataset, rate), table in groups:
        name = f"start-map-{dataset}" + ("" if rate == "null" else "-calibrated")
        draw(table, results.parent / "docs" / "images" / f"{name}.png")


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw a map for each neuron and what ALIF gains over PLIF, with and without norm in a row."""
    grid = means(table, "accuracy", TAU, THRESHOLD)
    maps = {
        key: means(part, "accuracy", TAU, THRESHOLD).reindex_like(grid)
        for key, part in table.groupby(["model.norm", "neuron"], observed=True)
    }
    norms, neurons = (list(dict.fromkeys(names)) for names in zip(*maps, strict=True))
    gains = {norm: maps[norm, "alif"] - maps[norm, "plif"] for norm in norms}
    low, high = np.nanmin([*maps.values()]), np.nanmax([*maps.values()])
    most = max(np.nanmax(np.abs([*gains.values()])), 1e-9)
    width = 1.4 + (0.3 + 0.5 * grid.shape[1]) * (len(neurons) + 1)
    height = 0.8 + (0.45 + 0.4 * grid.shape[0]) * len(norms)
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(len(norms), len(neurons) + 1, squeeze=False, sharex=True, sharey=True)
    for line, norm in zip(axes, norms, strict=True):
        for axis, neuron in zip(line, neurons, strict=False):
            shown = draw_map(axis, maps[norm, neuron], "viridis", low, high)
            axis.set_title(neuron, fontsize=9)
        signed = draw_map(line[-1], gains[norm], "RdBu", -most, most, sign="+")
        line[-1].set_title("alif - plif", fontsize=9)
        line[0].set_ylabel(f"norm {norm}\n{short(TAU)}" if len(norms) > 1 else short(TAU))
    for axis in axes[-1]:
        axis.set_xlabel(short(THRESHOLD))
    title = METRICS["accuracy"].title
    figure.colorbar(shown, ax=axes[:, :-1], label=title, shrink=0.8, pad=0.01)
    figure.colorbar(signed, ax=axes[:, -1], label="difference", shrink=0.8)
    save(figure, path)


def draw_map(
    axis: Axes, cells: pd.DataFrame, scale: str, low: float, high: float, sign: str = "-"
) -> AxesImage:
    """Draw colours and numbers; a cell without a value is hatched."""
    axis.patch.set(facecolor="0.9", hatch="////", edgecolor="0.7")
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
