"""Compare runs: ``sj-taid compare [FOLDER ...] [--out FOLDER] [--keep] [--heat-maps KEY KEY KEY]``.

Every run below the folders counts. The terminal shows each combination of choices with its mean and
standard deviation over seeds; ``results.md`` and ``results.png`` hold the same, ``results.csv``
every run. With ``--heat-maps`` ``results.png`` holds a heat map over two choices for each value of
a third, side by side, and ``results.md`` how many cells are near the best. With ``--keep`` runs of
experiments are copied into ``results`` of the current folder, and its ``RESULTS.md`` is made of all
that is there, beside ``results/published.csv``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table

from .columns import METRICS
from .files import atomic_write
from .gather import STUDIES, Metrics, beyond_study, gather, overrides, store, store_studies
from .heat_maps import Maps
from .plot import save
from .results_page import REPORT, draw_start_maps, fill, tables
from .tables import frame, heading, markdown, present, summary


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "sj-taid compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="folders that hold runs")
    parser.add_argument("--out", type=Path, help="where to write; by default the first folder")
    parser.add_argument("--keep", action="store_true", help="into results and RESULTS.md")
    parser.add_argument(
        "--heat-maps",
        nargs=3,
        metavar=("ROW", "COLUMN", "PANEL"),
        help="draw these choices, as neuron_start.tau neuron_start.v_threshold neuron",
    )
    parser.add_argument(
        "--difference",
        nargs=2,
        metavar="PANEL",
        help="two values of which the first minus the second is drawn; by default last and first",
    )
    options = parser.parse_args(arguments)
    if not options.folders and not options.keep:
        parser.error("give folders that hold runs")
    if options.keep and not REPORT.is_file():
        parser.error(f"no {REPORT} here, which --keep fills; go to the root of a checkout")
    if options.difference and not options.heat_maps:
        parser.error("--difference is of --heat-maps: give that too")
    try:
        finished, left_out = gather(options.folders) if options.folders else ({}, {})
    except FileNotFoundError as error:
        parser.error(str(error))
    for folder, reason in left_out.items():
        print(f"left out: {folder} ({reason})")
    if options.folders and not finished:
        parser.error("no finished run; one that is cut off goes on when its command is repeated")
    if finished:
        try:
            maps = options.heat_maps and heat_maps([*finished.values()], *options.heat_maps)
            show_and_write(finished, options.out or options.folders[0], maps, options.difference)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    if options.keep:
        for path in store_studies(finished, Path()):
            print(f"kept: {path}")
        for folder, metrics in finished.items():
            if overrides(metrics).get("experiment") in STUDIES:
                if other := beyond_study(metrics):
                    print(f"not kept: {folder} (no row says its {', '.join(sorted(other))})")
                continue
            try:
                print(f"kept: {store(metrics, Path())}")
            except ValueError as error:
                print(f"not kept: {folder} ({error})")
        with atomic_write(REPORT) as whole:
            page = REPORT.read_text(encoding="utf-8")
            whole.write_text(fill(page, tables(Path())), encoding="utf-8")
        draw_start_maps(Path())
        print(f"filled: {REPORT}")


def heat_maps(runs: Sequence[Metrics], row: str, column: str, panel: str) -> Maps:
    """Of the first of ``METRICS`` that the runs have."""
    table, keys = frame(runs)
    return Maps.of(table, keys, present(table, METRICS)[0], row, column, panel)


def show_and_write(
    finished: dict[Path, Metrics],
    out: Path,
    maps: Maps | None = None,
    difference: tuple[str, str] | None = None,
) -> None:
    runs = list(finished.values())
    shown = [summary(runs).astype(str), *([maps.regions()] if maps else [])]
    for table in shown:
        show(table)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "results.csv") as whole:
        frame(runs)[0].assign(folder=[*map(str, finished)]).to_csv(whole, index=False)
    with atomic_write(out / "results.md") as whole:
        whole.write_text("\n".join(map(markdown, shown)), encoding="utf-8")
    if maps:
        maps.draw(out / "results.png", difference)
    else:
        draw(runs, out / "results.png")
    print(f"results.csv, results.md and results.png are in {out}")


def show(table: pd.DataFrame) -> None:
    shown = Table(*(Column(str(name), overflow="fold") for name in table))
    for row in table.itertuples(index=False):
        shown.add_row(*row)
    # Rich cuts columns to 80 characters where it knows no width, as in a pipe.
    Console(width=None if sys.stdout.isatty() else 10_000).print(shown)


def draw(runs: Sequence[Metrics], path: Path) -> None:
    """A panel for each metric: every run a dot, each combination's mean and standard deviation."""
    table, keys = frame(runs)
    names = present(table, METRICS)
    groups = dict(iter(table.groupby(keys or [""] * len(table), sort=False)))
    figure = Figure((1.5 + 3.2 * len(names), 1.6 + 0.4 * len(groups)), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        for row, group in enumerate(groups.values()):
            values = group[name].dropna() / METRICS[name].unit
            color, spread = f"C{row}", values.std() if len(values) > 1 else 0.0
            axis.plot(values, [row] * len(values), "o", ms=4, color=color, alpha=0.5)
            axis.errorbar(values.mean(), row, xerr=spread, fmt="|", ms=14, capsize=3, color=color)
        axis.set_xlabel(heading(name, table))
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(groups)), [", ".join(label) for label in groups])
    axes[0].set(ylabel=", ".join(keys), ylim=(len(groups) - 0.5, -0.5))
    figure.suptitle("Mean and standard deviation over seeds; each dot is a run", fontsize=10)
    save(figure, path)
