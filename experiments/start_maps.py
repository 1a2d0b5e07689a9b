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

#: A map for each neuron, for each setting of the other choices, as text.
Maps = dict[str, dict[str, pd.DataFrame]]


def make_maps(table: pd.DataFrame) -> Maps:
    """The mean accuracy in % over seeds for each start, NaN where no run is."""
    cells = means(table, "accuracy", TAU, THRESHOLD)
    neurons = [neuron for neuron in NEURONS if neuron in set(table["neuron"])]
    choices = ("dataset", "model.norm", "neuron_start.calibrate")
    keys = [key for key in choices if table[key].nunique() > 1]
    maps: Maps = {}
    for values, part in table.groupby(keys or [""] * len(table), sort=False):
        setting = ", ".join(f"{short(k)} {v}" for k, v in zip(keys, values, strict=False))
        maps[setting] = {
            neuron: means(rows, "accuracy", TAU, THRESHOLD).reindex_like(cells)
            for neuron in neurons
            for rows in [part[part["neuron"] == neuron]]
        }
    return maps


def count_good_starts(table: pd.DataFrame) -> pd.DataFrame:
    """For each map its best cell, and how many cells are near the best."""
    rows = []
    for setting, by_neuron in make_maps(table).items():
        best = {neuron: cells.max(axis=None) for neuron, cells in by_neuron.items()}
        for neuron, cells in by_neuron.items():
            near_all, near_own = (
                int((cells >= limit - NEAR_BEST).to_numpy().sum())
                for limit in (max(best.values()), best[neuron])
            )
            count = cells.count().sum()
            rows.append(
                {
                    "runs": setting,
                    "neuron": neuron,
                    f"best cell, {METRICS['accuracy'].title}": f"{best[neuron]:.2f}",
                    "cells near the best of all": f"{near_all} of {count}",
                    "near its own best": f"{near_own} of {count}",
                }
            )
    return pd.DataFrame(rows)


def draw_all(results: Path = RESULTS) -> None:
    """Draw docs/images/start-map-*.png, for each data set with and without calibration."""
    table = load_study("start_map", results)
    for (dataset, rate), part in table.groupby(["dataset", "neuron_start.calibrate"]):
        name = f"start-map-{dataset}" + ("" if rate == "null" else "-calibrated")
        draw(make_maps(part), results.parent / "docs" / "images" / f"{name}.png")


def draw(maps: Maps, path: Path) -> None:
    """Draw a row of maps for each setting in one scale, and what ALIF gains over PLIF."""
    grids = [cells for by_neuron in maps.values() for cells in by_neuron.values()]
    gains = [by_neuron["alif"] - by_neuron["plif"] for by_neuron in maps.values()]
    low, high = np.nanmin(grids), np.nanmax(grids)
    most = max(np.nanmax(np.abs(gains)), 1e-9)
    neurons = [*next(iter(maps.values()))]
    rows, columns = grids[0].shape
    width = 1.4 + (0.3 + 0.5 * columns) * (len(neurons) + 1)
    height = 0.8 + (0.45 + 0.4 * rows) * len(maps)
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(len(maps), len(neurons) + 1, squeeze=False, sharex=True, sharey=True)
    for line, (setting, by_neuron), gain in zip(axes, maps.items(), gains, strict=True):
        for axis, (neuron, cells) in zip(line[:-1], by_neuron.items(), strict=True):
            shown = draw_map(axis, cells, "viridis", low, high)
            axis.set_title(neuron, fontsize=9)
        signed = draw_map(line[-1], gain, "RdBu", -most, most, sign="+")
        line[-1].set_title("alif - plif", fontsize=9)
        line[0].set_ylabel(f"{setting}\n{short(TAU)}" if setting else short(TAU))
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
