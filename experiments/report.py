"""Keep the figures of runs: ``python experiments/report.py [FOLDER...]``.

Copies the metrics of the experiments below the folders to ``results/<experiment>/<choices>.json``
and makes ``RESULTS.md`` of all that is there, beside what the papers publish.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from sj_taid.training import run
from sj_taid.training.compare import (
    COSTS,
    FIGURES,
    Metrics,
    gather,
    grouped,
    markdown,
    overrides,
    protocol,
    read,
    table,
    values,
)
from sj_taid.training.files import replacing

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
RESULTS = ROOT / "results"
REPORT = ROOT / "RESULTS.md"
ESVAE = RESULTS / "esvae.yaml"

LAPTOP = "_cpu"  # ends the name of an experiment with a laptop's budget
BASELINES = {"neuron": "lif", "decoder": "fixed"}

INTRODUCTION = """\
# Results

Made by `python experiments/report.py` from the runs' metrics in [results](results) and the
published figures in [conf/experiment](conf/experiment); not edited by hand.

Reconstruction is the mean squared error on the test set, of images in [-1, 1]. FAD compares samples
with the test set in the latent space of an autoencoder that this project trains, so its values
compare only with each other, and only where the protocol, at the end, names the same weights of it.
↓ means that lower is better; ± is the standard deviation over seeds. Minutes are by the clock on
machines with other work beside, so they are a hint, not a comparison.
"""
LAPTOP_TITLE = """\
## What ALIF and TAID buy

One small budget for all choices of a table. Below it: what a choice changes against `lif` or
`fixed`, all else equal.

`lif` is SpikingJelly's leaky integrate-and-fire neuron; `plif` learns its time constant, `alif` its
threshold too. `fixed` is the original FSVAE's image decoder; `taid` learns a weight for each time
step and channel, `taid_temporal` for each time step.
"""
PAPER_TITLE = """\
## The papers' tables

Figures as published, and ours with their budget. A run of fewer epochs than the paper's is a start,
not a comparison. What is blank was not published or not measured.
"""
RUNS_TITLE = """\
## Every run

How our figures were measured, and the run of each. The commands leave out where the data lie.
Figures of different protocols do not compare.
"""


def keep(metrics: Metrics) -> Path:
    """Copy the metrics of an experiment's run to ``results/``; returns where.

    Raises:
        ValueError: a run that is no experiment's.
    """
    choices = overrides(metrics)
    experiment = choices.pop("experiment", None)
    if experiment not in experiments():
        raise ValueError(f"{metrics['command']!r} is no run of an experiment in conf/experiment")
    choices["seed"] = metrics["seed"]
    name = ",".join(sorted(f"{key}={value}" for key, value in choices.items()))
    path = RESULTS / experiment / f"{run.folder_name(name.replace('/', '-'))}.json"
    with replacing(path) as whole:
        whole.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return path


def kept(experiment: str) -> list[Metrics]:
    return [read(path) for path in sorted((RESULTS / experiment).glob("*.json"))]


@cache
def experiments() -> dict[str, DictConfig]:
    """Every ``conf/experiment/*.yaml``, composed."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return {
            path.stem: compose("train", [f"experiment={path.stem}"])
            for path in sorted((CONF / "experiment").glob("*.yaml"))
        }


def comment(experiment: str) -> str:
    """What an experiment's file says of itself in its first lines."""
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").splitlines()
    first = takewhile(lambda line: line.startswith("# "), lines[1:])  # after the package
    return "\n".join(line.removeprefix("# ") for line in first)


def changes(runs: Sequence[Metrics]) -> list[list[str]]:
    """What each option changes against its baseline, over pairs of runs that are else equal."""
    swept, groups = grouped(runs)
    by_choice = {(*label, m["seed"]): m for label, group in groups.items() for m in group}
    figures = {name: figure for name, figure in FIGURES.items() if values(runs, name)}
    rows = [["change", *(figure.title for figure in figures.values()), "pairs"]]
    for place, key in enumerate(swept):
        baseline = BASELINES.get(key)
        for option in dict.fromkeys(label[place] for label in groups):
            pairs = [
                (metrics, by_choice[other])
                for choice, metrics in by_choice.items()
                if choice[place] == option != baseline
                and (other := (*choice[:place], baseline, *choice[place + 1 :])) in by_choice
            ]
            if not pairs:
                continue
            differences = (
                figure.of([a[name] - b[name] for a, b in pairs if comparable(name, a, b)], "+")
                for name, figure in figures.items()
            )
            rows.append([f"`{option}` instead of `{baseline}`", *differences, str(len(pairs))])
    return rows


def comparable(name: str, a: Metrics, b: Metrics) -> bool:
    """Whether both have the figure, by the same protocol."""
    return a.keys() & b.keys() >= {name} and protocol(name, a) == protocol(name, b)


def laptop_section(experiment: str, runs: Sequence[Metrics]) -> str:
    """One budget for all: the table of its choices, and what they change."""
    tables = [markdown(rows) for rows in (table(runs), changes(runs)) if len(rows) > 1]
    return "\n".join([f"### `{experiment}`\n\n{comment(experiment)}\n", *tables])


def label(metrics: Metrics) -> str:
    """Ours, and in what it was run otherwise than the row's config says."""
    choices = overrides(metrics).items()
    otherwise = [f"{k}={v}" for k, v in choices if k not in ("experiment", "seed")]
    return f"ours, with `{' '.join(otherwise)}`" if otherwise else "ours"


def paper_section(dataset: str, kind: str, rows: Mapping[str, DictConfig]) -> str:
    """The papers' rows of one data set, each above ours."""
    runs = {name: kept(name) for name in rows}
    published = {name: cfg.get("published", {}) for name, cfg in rows.items()}
    if kind == "generation":
        esvae = OmegaConf.load(ESVAE)
        published["ESVAE, not in this project"] = {"source": esvae.source, **esvae[dataset]}
    blocks = [*published.values(), *(metrics for ours in runs.values() for metrics in ours)]
    columns = {n: f for n, f in FIGURES.items() if any(n in block for block in blocks)} | COSTS

    lines = [["experiment", "from", *(column.title for column in columns.values()), "runs"]]
    for name, block in published.items():
        title = f"`{name}`" if name in rows else name
        if block:
            cells = (f"{block[n] / c.unit:g}" if n in block else "" for n, c in columns.items())
            lines.append([title, block["source"], *cells, ""])
            title = ""
        groups: dict[str, list[Metrics]] = {}
        for metrics in runs.get(name, []):
            groups.setdefault(label(metrics), []).append(metrics)
        for ours, group in groups.items():
            cells = (column.of(values(group, n)) for n, column in columns.items())
            lines.append([title, ours, *cells, str(len(group))])
            title = ""
        if name in rows and not groups:
            lines.append([title, "ours: not run", *[""] * (len(columns) + 1)])
    return f"### {dataset}: {kind}\n\n{markdown(lines)}"


def runs_section(runs: Sequence[Metrics]) -> str:
    """The protocols, numbered, and what each run and each later evaluation of it measured."""
    protocols = [f"{name}: {how}" for m in runs for name, how in m.get("protocol", {}).items()]
    numbers = {how: number for number, how in enumerate(sorted(set(protocols)), 1)}
    rows = [["command", "protocols", "commit", "machine", "threads"]]
    for metrics in runs:
        its_own = metrics.get("protocol", {})
        evaluations = [(later, later["figures"]) for later in metrics.get("evaluations", [])]
        at_once = its_own.keys() - {name for _, figures in evaluations for name in figures}
        for origin, figures in ((metrics, at_once), *evaluations):
            by = sorted(numbers[f"{name}: {its_own[name]}"] for name in its_own if name in figures)
            facts = (origin["commit"], origin["machine"], str(origin["threads"]))
            rows.append([f"`{origin['command']}`", ", ".join(map(str, by)), *facts])
    return "".join(f"{n}. {how}\n" for how, n in numbers.items()) + "\n" + markdown(rows)


def text() -> str:
    """RESULTS.md."""
    configs = experiments()
    runs = {name: kept(name) for name in configs}
    laptop = [name for name in configs if name.endswith(LAPTOP)]
    papers: dict[tuple[str, str], dict[str, DictConfig]] = {}
    for name, cfg in configs.items():
        if name in laptop:
            continue
        kind = "classification" if cfg.objective == "accuracy" else "generation"
        papers.setdefault((cfg.dataset.name, kind), {})[name] = cfg
    not_run = ", ".join(f"`{name}`" for name in laptop if not runs[name]) or "none"
    every_run = [metrics for ours in runs.values() for metrics in ours]
    sections = [
        INTRODUCTION,
        LAPTOP_TITLE,
        *(laptop_section(name, runs[name]) for name in laptop if runs[name]),
        f"Not run: {not_run}.\n",
        PAPER_TITLE,
        *(paper_section(*table, rows) for table, rows in papers.items()),
        RUNS_TITLE,
        runs_section(every_run),
    ]
    return "\n".join(sections)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders that hold runs to keep")
    options = parser.parse_args(arguments)
    try:
        finished, left_out = gather(options.folders) if options.folders else ({}, {})
    except FileNotFoundError as error:
        parser.error(str(error))
    for folder, metrics in finished.items():
        try:
            print(f"kept: {keep(metrics)}")
        except ValueError as error:
            left_out[folder] = str(error)
    for folder, reason in left_out.items():
        print(f"left out: {folder} ({reason})")
    with replacing(REPORT) as whole:
        whole.write_text(text(), encoding="utf-8")
    print(f"made: {REPORT}")


if __name__ == "__main__":
    main()
