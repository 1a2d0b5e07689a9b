"""Maps of results/maps/start_map.csv: the accuracy over tau and threshold at the start."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from store import FOLDERS, RESULTS, load_study, sort_key

from sj_taid.training.columns import METRICS
from sj_taid.training.plot import save

TAU, THRESHOLD = "neuron_start.tau", "neuron_start.v_threshold"
NEURONS = ["lif", "plif", "alif", "alif_channel"]  # each learns more than the one before
#: A cell at most so many points below the best one counts as near it.
NEAR_BEST = 2.0


def load_start_map(results: Path = RESULTS) -> pd.DataFrame:
    """The runs, with neurons in the order of ``NEURONS``."""
    table = load_study("start_map", results).replace({"dataset": FOLDERS})
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
    """Draw a map for each neuron, with and without norm in a row; a cell without runs is empty."""
    maps = {
        key: means(part) for key, part in table.groupby(["model.norm", "neuron"], observed=True)
    }
    norms, neurons = table["model.norm"].nunique(), table["neuron"].nunique()
    grid = means(table)
    every = pd.concat(maps).to_numpy()
    low, high = np.nanmin(every), np.nanmax(every)
    figure = Figure((1 + 2.8 * neurons, 1 + 2.4 * norms), layout="constrained")
    axes = figure.subplots(norms, neurons, squeeze=False, sharex=True, sharey=True)
    for axis, ((norm, neuron), cells) in zip(axes.flat, maps.items(), strict=True):
        values = cells.reindex_like(grid).to_numpy()
        shown = axis.imshow(values, vmin=low, vmax=high, aspect="auto")
        axis.set_title(neuron + (", norm" if norm == "true" else ""), fontsize=9)
        axis.set_xticks(range(values.shape[1]), grid.columns)
        axis.set_yticks(range(values.shape[0]), grid.index)
        axis.set(xlabel=short(THRESHOLD), ylabel=short(TAU))
        axis.label_outer()
        for (row, column), value in np.ndenumerate(values):
            text = f"{value:.1f}" if np.isfinite(value) else ""
            color = "white" if value < (low + high) / 2 else "black"
            axis.text(column, row, text, color=color, fontsize=8, ha="center", va="center")
    figure.colorbar(shown, ax=axes, label=METRICS["accuracy"].title)
    save(figure, path)


def means(table: pd.DataFrame) -> pd.DataFrame:
    """The mean accuracy in % of every start, in order."""
    mean = (100 * table["accuracy"]).groupby([table[TAU], table[THRESHOLD]]).mean().unstack()
    return mean.loc[sorted(mean.index, key=sort_key), sorted(mean.columns, key=sort_key)]


def short(key: str) -> str:
    """The last part of a choice's key."""
    return key.rpartition(".")[2]
