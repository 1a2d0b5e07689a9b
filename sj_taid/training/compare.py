"""Compare runs: ``sj-taid compare [FOLDER ...] [--out FOLDER] [--keep]``.

Every run below the folders counts. The terminal shows each combination of choices with its mean and
standard deviation over seeds; ``results.md`` and ``results.png`` hold the same, ``results.csv``
every run. With ``--keep`` runs of experiments are copied into ``results/runs`` of the current
folder, and its ``RESULTS.md`` is made of all that is there, beside ``results/published.csv``.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table

from . import run
from .cli import folder_name
from .composing import CONF
from .files import atomic_write
from .plot import save

Metrics = dict[str, Any]

EXPERIMENTS = {path.stem: path for path in sorted(Path(CONF, "experiment").glob("*.yaml"))}
RUNS = Path("results", "runs")
REPORT = Path("RESULTS.md")
#: experiments that sweep by themselves, in any data set: too many runs to keep each
STUDIES = ("start_map", "lr_scale")
SMALL_BUDGET = "_cpu"  # ends the name of an experiment for a laptop
BASELINES = {"neuron": "lif", "decoder": "fixed"}


class Quantity(NamedTuple):
    """A column: its heading, its unit and decimals, and whether its spread is of interest."""

    title: str
    unit: float
    decimals: int
    spread: bool = True

    def text(self, values: pd.Series, sign: str = "-") -> str:
        """Mean and standard deviation; nothing where there is no value. ``sign="+"`` shows both."""
        values = values.dropna() / self.unit
        if values.empty:
            return ""
        mean = f"{values.mean():{sign}.{self.decimals}f}"
        several = self.spread and len(values) > 1
        return f"{mean} ± {values.std():.{self.decimals}f}" if several else mean


#: What is measured (the arrow says which way is better), and what it cost. A published value that
#: was measured by another protocol than ours, or by one that is not known, has a column of its own.
METRICS = {
    "accuracy": Quantity("accuracy, last epoch, % ↑", 0.01, 2),
    "accuracy_best_test_epoch": Quantity("accuracy, best test epoch, % ↑", 0.01, 2),
    "accuracy_best_validation_epoch": Quantity("accuracy, best validation epoch, % ↑", 0.01, 2),
    "accuracy_published": Quantity("accuracy as published, % ↑", 0.01, 2),
    "validation_accuracy": Quantity("validation accuracy, % ↑", 0.01, 2),
    "reconstruction": Quantity("reconstruction ↓", 1, 4),
    "inception_score": Quantity("IS ↑", 1, 3),
    "inception_score_published": Quantity("IS as published ↑", 1, 3),
    "fid": Quantity("FID ↓", 1, 2),
    "fid_published": Quantity("FID as published ↓", 1, 2),
    "fad": Quantity("FAD, own autoencoder ↓", 1, 2),
    "fad_published": Quantity("FAD as published ↓", 1, 2),
    "validation_reconstruction": Quantity("validation reconstruction ↓", 1, 4),
    "validation_fad": Quantity("validation FAD, own autoencoder ↓", 1, 2),
}
# ESVAE is measured by the other of its two priors too.
METRICS |= {
    f"{name}_{prior}": METRICS[name]._replace(title=f"{METRICS[name].title[:-2]}, {called} ↓")
    for name in ("fad", "fad_published", "fid")
    for prior, called in {"learned": "learned prior", "gaussian_mixture": "mixture"}.items()
}
COSTS = {
    "epochs": Quantity("epochs", 1, 0, spread=False),
    "parameters": Quantity("parameters, M", 1e6, 2, spread=False),
    "training_seconds": Quantity("training, min", 60, 1, spread=False),
}
COLUMNS = METRICS | COSTS


# ---- the runs ----


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
    """The metrics of a run, with those of later evaluations in the folder beside over them.

    Raises:
        ValueError: a file that is damaged, or not what a run writes.
    """
    metrics = _json(path)
    if not {"command", "choices"} <= metrics.keys():
        raise ValueError(f"{path.name} lacks command and choices, which a run writes")
    later = sorted((path.parent / run.EVALUATIONS).glob("*.json"))
    metrics.setdefault("evaluations", []).extend(map(_json, later))
    for evaluation in metrics["evaluations"]:
        if isinstance(evaluation["figures"], dict):  # in older files names of what is there already
            metrics |= evaluation["figures"]
            metrics["protocol"] = metrics.get("protocol", {}) | evaluation["protocol"]
    if not METRICS.keys() & metrics.keys():
        raise ValueError(f"{path.name} has none of {', '.join(METRICS)}")
    for name in COLUMNS:
        if not isinstance(metrics.get(name), int | float | None):
            raise ValueError(f"{path.name} has {metrics[name]!r} for {name}, not a number")
    return metrics


def _json(path: Path) -> Metrics:
    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}, so its run diverged")

    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    return content if isinstance(content, dict) else {}


def overrides(metrics: Metrics) -> dict[str, str]:
    """What was chosen on the command line, by key."""
    words = metrics.get("overrides") or shlex.split(metrics["command"])[2:]  # older runs have none
    return {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in words)}


def store(metrics: Metrics, root: Path) -> Path:
    """Copy the metrics of an experiment's run into ``root/results/runs``; returns where.

    Raises:
        ValueError: a run that is no experiment's.
    """
    choices = overrides(metrics)
    experiment = choices.pop("experiment", None)
    if experiment not in EXPERIMENTS:
        raise ValueError(f"{metrics['command']!r} is no run of an experiment in conf/experiment")
    choices["seed"] = str(metrics["seed"])
    name = folder_name([f"{key}={value}" for key, value in choices.items()])
    path = root / RUNS / experiment / f"{name}.json"
    with atomic_write(path) as whole:
        whole.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return path


# ---- tables ----


def frame(runs: Sequence[Metrics]) -> tuple[pd.DataFrame, list[str]]:
    """A row for every run, and the columns of the choices in which they differ, seeds apart."""
    table = pd.DataFrame(
        metrics["choices"]
        | overrides(metrics)
        | {name: value for name, value in metrics.items() if not isinstance(value, dict | list)}
        | {f"{name} protocol": metrics.get("protocol", {}).get(name, "") for name in METRICS}
        for metrics in runs
    )
    keys = list(dict.fromkeys(key for m in runs for key in overrides(m) if key != "seed"))
    table[keys] = table[keys].fillna("default")
    return table, [key for key in keys if table[key].nunique() > 1]


def present(table: pd.DataFrame, columns: Iterable[str] = COLUMNS) -> list[str]:
    return [name for name in columns if name in table and table[name].notna().any()]


def heading(name: str, table: pd.DataFrame) -> str:
    mixed = name in METRICS and table[f"{name} protocol"][table[name].notna()].nunique() > 1
    return COLUMNS[name].title + (" (of different protocols)" if mixed else "")


def summary(runs: Sequence[Metrics]) -> pd.DataFrame:
    """A row for each combination of choices, over its seeds."""
    table, keys = frame(runs)
    groups = table.groupby(keys or [""] * len(table), sort=False)
    names = present(table)
    cells = groups.agg({name: COLUMNS[name].text for name in names})
    cells.columns = pd.Index([heading(name, table) for name in names])
    return cells.assign(runs=groups.size()).reset_index(drop=not keys)


def changes(runs: Sequence[Metrics]) -> pd.DataFrame:
    """What each option changes against its baseline, over pairs of runs that are else equal."""
    table, keys = frame(runs)
    rows = []
    for key, baseline in ((key, BASELINES[key]) for key in keys if key in BASELINES):
        is_baseline = table[key] == baseline
        others = [*(other for other in keys if other != key), "seed"]
        pairs = table[~is_baseline].merge(table[is_baseline], on=others, suffixes=("", " before"))
        for option, group in pairs.groupby(key, sort=False):
            row = {"change": f"`{option}` instead of `{baseline}`"}
            for name in present(table, METRICS):
                alike = group[f"{name} protocol"] == group[f"{name} protocol before"]
                difference = (group[name] - group[f"{name} before"])[alike]
                row[METRICS[name].title] = METRICS[name].text(difference, "+")
            rows.append(row | {"pairs": str(len(group))})
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, tablefmt="github", disable_numparse=True) + "\n"


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


# ---- RESULTS.md ----


def fill(page: str, tables: Mapping[str, str]) -> str:
    """``page`` with that table in each ``<!-- table: NAME -->`` ... ``<!-- end -->``."""
    place = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return place.sub(lambda found: f"{found[1]}\n{tables[found[2]]}\n{found[3]}", page)


def stored(root: Path, experiment: str) -> list[Metrics]:
    return [read(path) for path in sorted((root / RUNS / experiment).glob("*.json"))]


def tables(root: Path) -> dict[str, str]:
    """What RESULTS.md holds of the runs and the published values in ``root/results``."""
    runs = {name: stored(root, name) for name in EXPERIMENTS if name not in STUDIES}
    small = {name: ours for name, ours in runs.items() if name.endswith(SMALL_BUDGET)}
    papers = {name: ours for name, ours in runs.items() if name not in small}
    sections = [small_section(name, ours) for name, ours in small.items() if ours]
    published = pd.read_csv(root / "results" / "published.csv")
    rows = paper_sections([*chain(*papers.values())], published)
    return {
        "small": "\n".join([*sections, not_run(small)]),
        "papers": "\n".join([*rows, not_run(papers)]),
        "runs": every_run([*chain(*runs.values())]),
    }


def small_section(experiment: str, runs: Sequence[Metrics]) -> str:
    """One budget for all: the table of its choices, and what they change."""
    both = [markdown(table) for table in (summary(runs), changes(runs)) if len(table)]
    return "\n".join([f"### `{experiment}`\n\n{comment(experiment)}\n", *both])


def comment(experiment: str) -> str:
    """What an experiment's file says of itself in its first lines."""
    lines = EXPERIMENTS[experiment].read_text(encoding="utf-8").splitlines()
    first = takewhile(lambda line: line.startswith("# "), lines[1:])  # after the package
    return "\n".join(line.removeprefix("# ") for line in first)


def not_run(runs: Mapping[str, Sequence[Metrics]]) -> str:
    return f"Not run: {', '.join(f'`{name}`' for name in runs if not runs[name]) or 'none'}.\n"


def label(metrics: Metrics) -> str:
    """Ours, and in what it was run otherwise than the row's config says."""
    choices = overrides(metrics).items()
    otherwise = [f"{k}={v}" for k, v in choices if k not in ("experiment", "seed")]
    return f"ours, with `{' '.join(otherwise)}`" if otherwise else "ours"


def paper_sections(runs: Sequence[Metrics], published: pd.DataFrame) -> Iterator[str]:
    """A table for each data set and task: ours, then the published values."""
    index = ["dataset", "task", "row", "from"]
    parts = []
    if runs:
        table = frame(runs)[0].rename(columns={"experiment": "row"})
        groups = table.assign(**{"from": [*map(label, runs)]}).groupby(index, sort=False)
        ours = groups.agg({name: COLUMNS[name].text for name in present(table)})
        parts = [ours.assign(runs=groups.size().astype(str))]
    units = published["figure"].map(lambda name: COLUMNS[name].unit)
    parts.append(
        published.assign(value=(published["value"] / units).map("{:g}".format))
        .rename(columns={"source": "from"})
        .pivot(index=index, columns="figure", values="value")
    )
    both = pd.concat(parts).fillna("")
    for (dataset, task), rows in both.groupby(["dataset", "task"], sort=False):
        filled = [name for name in (*COLUMNS, "runs") if name in rows and any(rows[name] != "")]
        shown = rows[filled].rename(columns={name: COLUMNS[name].title for name in COLUMNS})
        yield f"### {dataset}: {task}\n\n{markdown(shown.droplevel([0, 1]).reset_index())}"


def every_run(runs: Sequence[Metrics]) -> str:
    """The protocols, numbered, and what each run and each later evaluation of it measured."""
    protocols = {f"{name}: {how}" for m in runs for name, how in m.get("protocol", {}).items()}
    numbers = {how: str(number) for number, how in enumerate(sorted(protocols), 1)}
    rows = []
    for metrics in runs:
        protocol, later = metrics.get("protocol", {}), metrics["evaluations"]
        at_once = protocol.keys() - {name for evaluation in later for name in evaluation["figures"]}
        for origin in (metrics | {"figures": at_once}, *later):
            names = sorted(name for name in origin["figures"] if name in protocol)
            by = ", ".join(numbers[f"{name}: {protocol[name]}"] for name in names)
            facts = {name: str(origin[name]) for name in ("commit", "machine", "threads")}
            rows.append({"command": f"`{origin['command']}`", "protocols": by, **facts})
    listed = "".join(f"{number}. {how}\n" for how, number in numbers.items())
    return f"{listed}\n{markdown(pd.DataFrame(rows))}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "sj-taid compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="folders that hold runs")
    parser.add_argument("--out", type=Path, help="where to write; by default the first folder")
    parser.add_argument("--keep", action="store_true", help="into results/runs and RESULTS.md")
    options = parser.parse_args(arguments)
    if not options.folders and not options.keep:
        parser.error("give folders that hold runs")
    if options.keep and not REPORT.is_file():
        parser.error(f"no {REPORT} here, which --keep fills; go to the root of a checkout")
    try:
        finished, left_out = gather(options.folders) if options.folders else ({}, {})
    except FileNotFoundError as error:
        parser.error(str(error))
    for folder, reason in left_out.items():
        print(f"left out: {folder} ({reason})")
    if options.folders and not finished:
        parser.error("no finished run; one that is cut off goes on when its command is repeated")
    if finished:
        show_and_write(finished, options.out or options.folders[0])
    if options.keep:
        for folder, metrics in finished.items():
            try:
                print(f"kept: {store(metrics, Path())}")
            except ValueError as error:
                print(f"not kept: {folder} ({error})")
        with atomic_write(REPORT) as whole:
            page = REPORT.read_text(encoding="utf-8")
            whole.write_text(fill(page, tables(Path())), encoding="utf-8")
        print(f"filled: {REPORT}")


def show_and_write(finished: dict[Path, Metrics], out: Path) -> None:
    runs = list(finished.values())
    table = summary(runs).astype(str)
    shown = Table(*(Column(str(name), overflow="fold") for name in table))
    for row in table.itertuples(index=False):
        shown.add_row(*row)
    # Rich cuts columns to 80 characters where it knows no width, as in a pipe.
    Console(width=None if sys.stdout.isatty() else 10_000).print(shown)
    out.mkdir(parents=True, exist_ok=True)
    frame(runs)[0].assign(folder=[*map(str, finished)]).to_csv(out / "results.csv", index=False)
    with atomic_write(out / "results.md") as whole:
        whole.write_text(markdown(table), encoding="utf-8")
    draw(runs, out / "results.png")
    print(f"results.csv, results.md and results.png are in {out}")
