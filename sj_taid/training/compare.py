"""Compare runs: ``sj-taid compare FOLDER ... [--out FOLDER]``.

Every finished run below the folders counts. The terminal shows each combination of choices with its
mean and standard deviation over seeds, as ``results.md`` does; ``results.csv`` holds every run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from .files import atomic_write, check_replaceable
from .run import CONFIG, Run

#: The content of a run's ``metrics.json``.
Metrics = dict[str, Any]


class Column(NamedTuple):
    """The display of a metric or a cost."""

    title: str  # an arrow at its end says which direction is better
    unit: float  # values are divided by it
    decimals: int
    spread: bool = True  # whether the standard deviation over runs is shown too
    small: bool = False  # whether a value below the last decimal is shown by its first digits

    def text(self, values: pd.Series) -> str:
        """Mean ± standard deviation, or "" without a value."""
        values = values.dropna() / self.unit
        if values.empty:
            return ""
        mean = self.number(values.mean())
        # Whole numbers such as epochs are often equal in all runs.
        differ = len(values) > 1 if self.decimals else values.nunique() > 1
        return f"{mean} ± {self.number(values.std())}" if self.spread and differ else mean

    def number(self, value: float) -> str:
        """A value in the column's unit."""
        text = f"{value:.{self.decimals}f}"
        return f"{value:.1e}" if self.small and value and not float(text) else text

    def text_of_each(self, protocols: pd.Series, values: pd.Series) -> str:
        """The texts of values by their protocols, of which none compares with another."""
        groups = values.dropna().groupby(protocols, sort=False)
        return ", ".join(self.text(group) for _, group in groups)


#: The metrics, by their names in a run; "loss" is the name of a function, its value "test_loss".
METRICS = {
    "accuracy": Column("accuracy, last epoch, % ↑", 0.01, 2),
    "accuracy_best_test_epoch": Column("accuracy, best test epoch, % ↑", 0.01, 2),
    "accuracy_best_validation_epoch": Column("accuracy, best validation epoch, % ↑", 0.01, 2),
    "validation_accuracy": Column("validation accuracy, % ↑", 0.01, 2),
    "test_loss": Column("loss, last epoch ↓", 1, 4, small=True),
    "reconstruction": Column("reconstruction ↓", 1, 4),
    "validation_reconstruction": Column("validation reconstruction ↓", 1, 4),
    "fad": Column("FAD, own autoencoder ↓", 1, 2),
    "validation_fad": Column("validation FAD, own autoencoder ↓", 1, 2),
    "fad_precision": Column("precision, FAD's features ↑", 1, 2),
    "fad_recall": Column("recall, FAD's features ↑", 1, 2),
    "fad_published": Column("FAD as published ↓", 1, 2),
    "fid": Column("FID ↓", 1, 2),
    "inception_score": Column("IS ↑", 1, 3),
    "fad_learned": Column("FAD, own autoencoder, learned prior ↓", 1, 2),
    "fad_published_learned": Column("FAD as published, learned prior ↓", 1, 2),
    "fid_learned": Column("FID, learned prior ↓", 1, 2),
    "inception_score_learned": Column("IS, learned prior ↑", 1, 3),
}
COSTS = {
    "firing_rate": Column("spikes per neuron and step", 1, 3, spread=False),
    "epochs": Column("epochs", 1, 0),
    "parameters": Column("parameters, M", 1e6, 2, spread=False),
    "training_seconds": Column("training, min", 60, 1, spread=False),
}
COLUMNS = METRICS | COSTS


def format_metrics(metrics: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Title and value, as text, of each metric, by its name."""
    return {
        key: (column.title, column.number(metrics[key] / column.unit))
        for key, column in METRICS.items()
        if key in metrics
    }


def are_alike(metrics: Mapping[str, Any]) -> bool:
    """Whether a generator's samples are all the same, as far as one sees: by half a grey level."""
    return metrics.get("sample_variance", 1.0) < (0.5 / 127.5) ** 2


def gather(folders: Iterable[Path]) -> dict[Path, Metrics]:
    """The metrics of every finished run below ``folders``; why others are left out is printed."""
    folders, finished = [*folders], {}
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise FileNotFoundError(f"no folder {', '.join(missing)}")
    # One folder may hold another of them.
    configs = {path.resolve() for folder in folders for path in folder.rglob(CONFIG)}
    for config in sorted(configs):
        try:
            run = Run(config.parent)
            finished[run.folder] = run.latest_metrics | {"evaluations": run.evaluations}
        except (OSError, ValueError) as error:
            print(f"left out: {config.parent} ({error})")
    if not finished:
        raise FileNotFoundError(
            f"no finished run below {', '.join(map(str, folders))}; an interrupted one resumes "
            "when its command is repeated"
        )
    return finished


def overrides(metrics: Metrics) -> dict[str, str]:
    """The choices on the command line, by key."""
    words = (word.partition("=") for word in metrics["overrides"])
    return {key.lstrip("+"): value for key, _, value in words}


def frame(runs: Sequence[Metrics]) -> tuple[pd.DataFrame, list[str]]:
    """A row for each run, and the columns of the choices in which they differ, except the seed."""
    table = pd.DataFrame(
        {
            "test_loss" if name == "loss" else name: value  # loss is the choice of its function
            for name, value in metrics.items()
            if not isinstance(value, dict | list)
        }
        | overrides(metrics)
        # A chosen folder of images has its name here, and its path on the command line.
        | metrics["choices"]
        | {name: metrics[name] for name in ("seed", *COLUMNS) if name in metrics}
        | {f"{name} protocol": metrics.get("protocol", {}).get(name, "") for name in METRICS}
        for metrics in runs
    )
    told = (table.filter(like=" protocol") != "").any()
    table = table.drop(columns=told.index[~told])
    keys = list(dict.fromkeys(key for m in runs for key in overrides(m) if key != "seed"))
    table[keys] = table[keys].fillna("default")
    return table, [key for key in keys if table[key].nunique() > 1]


def summary(runs: Sequence[Metrics]) -> pd.DataFrame:
    """A row for each combination of choices, with mean and spread over its seeds."""
    table, keys = frame(runs)
    groups = table.groupby(keys or [""] * len(table), sort=False)
    cells = {}
    for name in COLUMNS:
        if name in table and table[name].notna().any():
            protocols = table.get(f"{name} protocol", pd.Series("", table.index))
            mixed = protocols[table[name].notna()].nunique() > 1
            title = COLUMNS[name].title + (" (of different protocols)" if mixed else "")
            cells[title] = groups[name].agg(partial(COLUMNS[name].text_of_each, protocols))
    summed = pd.DataFrame(cells).assign(runs=groups.size())
    if "commit" in table and table["commit"].notna().any():
        summed["commit"] = groups["commit"].agg(lambda of: ", ".join(of.dropna().unique()))
    return summed.reset_index(drop=not keys)


def tables(runs: Sequence[Metrics]) -> str:
    """A table for each task and data set, under its heading if there are several."""
    groups: dict[str, list[Metrics]] = {}
    for run in runs:
        words = (run["choices"].get(part, "") for part in ("task", "dataset"))
        groups.setdefault(", ".join(filter(None, words)), []).append(run)
    texts = {title: markdown(summary(group)) for title, group in groups.items()}
    if len(texts) == 1:
        return "".join(texts.values())
    return "\n".join(f"## {title}\n\n{text}" for title, text in texts.items())


def markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, tablefmt="github", disable_numparse=True) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("sj-taid compare", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold runs")
    parser.add_argument("--out", type=Path, help="where to write; default: the first folder")
    options = parser.parse_args(arguments)
    out = options.out or options.folders[0]
    check_replaceable(out / "results.csv", ",folder\n")  # what ends the head of each
    check_replaceable(out / "results.md", "| runs ")
    finished = gather(options.folders)
    runs = [*finished.values()]
    text = tables(runs)
    print(text)
    with atomic_write(out / "results.csv") as temporary:
        table = frame(runs)[0].dropna(axis="columns", how="all")
        table.assign(folder=[*map(str, finished)]).to_csv(temporary, index=False)
    with atomic_write(out / "results.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"results.csv and results.md are in {out}")
