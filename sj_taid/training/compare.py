"""Compare runs: ``python experiments/compare.py FOLDER... [--out FOLDER]``.

Every run below the folders counts. The terminal shows each combination of choices with its mean and
standard deviation over seeds; ``results.md`` and ``results.png`` hold the same, ``results.csv``
every run.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from . import run
from .files import replacing
from .plot import plt, save

Metrics = dict[str, Any]


class Figure(NamedTuple):
    """A quantity: its heading, its unit and decimals, and whether its spread is of interest."""

    title: str
    unit: float
    decimals: int
    spread: bool = True

    def of(self, values: Sequence[float], sign: str = "-") -> str:
        """Mean and standard deviation; nothing where there is no value. ``sign="+"`` shows both."""
        if not values:
            return ""
        mean, spread = mean_and_spread([value / self.unit for value in values])
        text = f"{mean:{sign}.{self.decimals}f}"
        return f"{text} ± {spread:.{self.decimals}f}" if self.spread and len(values) > 1 else text


#: What is measured (the arrow says which way is better), and what it cost.
FIGURES = {
    "accuracy": Figure("accuracy, % ↑", 0.01, 2),
    "reconstruction": Figure("reconstruction ↓", 1, 4),
    "inception_score": Figure("IS ↑", 1, 3),
    "fid": Figure("FID ↓", 1, 2),
    "fad": Figure("FAD ↓", 1, 2),
}
COSTS = {
    "epochs": Figure("epochs", 1, 0, spread=False),
    "parameters": Figure("parameters, M", 1e6, 2, spread=False),
    "training_seconds": Figure("training, min", 60, 1, spread=False),
}


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, which is 0 for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def gather(folders: Iterable[Path]) -> tuple[dict[Path, Metrics], dict[Path, str]]:
    """The metrics of every finished run below ``folders``, and why the other runs have none.

    Raises:
        FileNotFoundError: a folder that is not there, or no run in any of them.
    """
    finished, left_out = {}, {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}; give folders that hold runs")
        for config in sorted(folder.rglob(run.CONFIG)):
            if config.parent.name == ".hydra":  # Hydra's own copy
                continue
            try:
                finished[config.parent] = read(config.parent / run.METRICS)
            except FileNotFoundError:
                left_out[config.parent] = "unfinished"
            except ValueError as error:
                left_out[config.parent] = str(error)
    if not finished and not left_out:
        raise FileNotFoundError(
            f"no run below {', '.join(map(str, folders))}: a run's folder holds {run.CONFIG}"
        )
    return finished, left_out


def read(path: Path) -> Metrics:
    """One metrics.json.

    Raises:
        ValueError: a file that is damaged, or not what experiments/train.py writes.
    """
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    if not isinstance(metrics, dict) or not {"command", "choices"} <= metrics.keys():
        raise ValueError(
            f"{path.name} lacks command and choices, which experiments/train.py writes"
        )
    if not FIGURES.keys() & metrics.keys():
        raise ValueError(f"{path.name} has none of {', '.join(FIGURES)}")
    for name in FIGURES | COSTS:
        if not isinstance(metrics.get(name), int | float | None):
            raise ValueError(f"{path.name} has {metrics[name]!r} for {name}, not a number")
    return metrics


def overrides(metrics: Metrics) -> dict[str, str]:
    """What was chosen on the command line, by key."""
    words = shlex.split(metrics["command"])[2:]  # after python experiments/train.py
    return {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in words)}


def grouped(runs: Sequence[Metrics]) -> tuple[list[str], dict[tuple[str, ...], list[Metrics]]]:
    """The keys in whose choice the runs differ, seeds apart, and the runs of each combination."""

    def choice(metrics: Metrics, key: str) -> str:
        return overrides(metrics).get(key) or str(metrics["choices"].get(key, "default"))

    keys = dict.fromkeys(key for metrics in runs for key in overrides(metrics) if key != "seed")
    swept = [key for key in keys if len({choice(metrics, key) for metrics in runs}) > 1]
    groups: dict[tuple[str, ...], list[Metrics]] = {}
    for metrics in runs:
        groups.setdefault(tuple(choice(metrics, key) for key in swept), []).append(metrics)
    return swept, groups


def protocol(name: str, metrics: Metrics) -> str | None:
    """How a figure was measured; figures of different protocols do not compare."""
    return metrics.get("protocol", {}).get(name)


def values(runs: Iterable[Metrics], name: str) -> list[float]:
    return [metrics[name] for metrics in runs if metrics.get(name) is not None]


def heading(name: str, runs: Iterable[Metrics]) -> str:
    protocols = {protocol(name, metrics) for metrics in runs if metrics.get(name) is not None}
    mixed = " (of different protocols)" if len(protocols) > 1 else ""
    return (FIGURES | COSTS)[name].title + mixed


def table(runs: Sequence[Metrics]) -> list[list[str]]:
    """Headings, then a row for each combination of choices."""
    swept, groups = grouped(runs)
    figures = {name: f for name, f in (FIGURES | COSTS).items() if values(runs, name)}
    rows = [
        [*label, *(f.of(values(group, name)) for name, f in figures.items()), str(len(group))]
        for label, group in groups.items()
    ]
    return [[*swept, *(heading(name, runs) for name in figures), "runs"], *rows]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body]) + "\n"


def write_csv(runs: dict[Path, Metrics], path: Path) -> None:
    """A row for every run: its folder, its choices and all single values of its metrics."""
    rows = [
        {
            "folder": folder,
            **metrics["choices"],
            **overrides(metrics),
            **{k: v for k, v in metrics.items() if not isinstance(v, dict | list)},
        }
        for folder, metrics in runs.items()
    ]
    with replacing(path) as whole, whole.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def draw(runs: Sequence[Metrics], path: Path) -> None:
    """A panel for each figure: every run a dot, each combination's mean and standard deviation."""
    swept, groups = grouped(runs)
    figures = {name: figure for name, figure in FIGURES.items() if values(runs, name)}
    picture, axes = plt.subplots(
        1,
        len(figures),
        figsize=(1.5 + 3.2 * len(figures), 1.6 + 0.4 * len(groups)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, figure) in zip(axes[0], figures.items(), strict=True):
        for row, group in enumerate(groups.values()):
            measured = [value / figure.unit for value in values(group, name)]
            if not measured:
                continue
            axis.plot(measured, [row] * len(measured), "o", ms=4, color=f"C{row}", alpha=0.5)
            mean, spread = mean_and_spread(measured)
            axis.errorbar(mean, row, xerr=spread, fmt="|", ms=14, capsize=3, color=f"C{row}")
        axis.set_xlabel(heading(name, runs))
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(range(len(groups)), [", ".join(label) for label in groups])
    axes[0, 0].set(ylabel=", ".join(swept), ylim=(len(groups) - 0.5, -0.5))
    picture.suptitle("Mean and standard deviation over seeds; each dot is a run", fontsize=10)
    save(picture, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold runs")
    parser.add_argument("--out", type=Path, help="where to write; by default the first folder")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        finished, left_out = gather(options.folders)
    except FileNotFoundError as error:
        parser.error(str(error))
    for folder, reason in left_out.items():
        console.print(f"left out: {folder} ({reason})", soft_wrap=True, markup=False)
    if not finished:
        parser.error("no finished run; one that is cut off goes on when its command is repeated")
    runs = list(finished.values())
    head, *body = table(runs)
    shown = Table(*head)
    for row in body:
        shown.add_row(*row)
    console.print(shown)

    out = options.out or options.folders[0]
    write_csv(finished, out / "results.csv")
    with replacing(out / "results.md") as whole:
        whole.write_text(markdown([head, *body]), encoding="utf-8")
    draw(runs, out / "results.png")
    console.print(f"results.csv, results.md and results.png are in {out}", soft_wrap=True)
