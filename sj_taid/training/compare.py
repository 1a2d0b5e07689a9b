"""Compare runs: ``sj-taid compare FOLDER ... [--out FOLDER]``.

Every finished run below the folders counts. The terminal shows each combination of choices with its
mean and standard deviation over seeds; ``results.md`` and ``results.png`` hold the same,
``results.csv`` every run.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .columns import METRICS
from .files import atomic_write
from .gather import Metrics, gather_for_command
from .plot import save
from .tables import frame, heading, markdown, present, summary


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "sj-taid compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold runs")
    parser.add_argument("--out", type=Path, help="where to write; default: the first folder")
    options = parser.parse_args(arguments)
    finished, _ = gather_for_command(parser, options.folders)
    print(markdown(summary([*finished.values()])))
    try:
        write(finished, options.out or options.folders[0])
    except OSError as error:
        parser.error(str(error))


def write(finished: dict[Path, Metrics], out: Path) -> None:
    """Write ``results.csv``, ``results.md`` and ``results.png``."""
    runs = [*finished.values()]
    with atomic_write(out / "results.csv") as temporary:
        frame(runs)[0].assign(folder=[*map(str, finished)]).to_csv(temporary, index=False)
    with atomic_write(out / "results.md") as temporary:
        temporary.write_text(markdown(summary(runs)), encoding="utf-8")
    draw(runs, out / "results.png")
    print(f"results.csv, results.md and results.png are in {out}")


def draw(runs: Sequence[Metrics], path: Path) -> None:
    """Draw a panel for each metric: every run as a dot, mean and deviation of each combination."""
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
