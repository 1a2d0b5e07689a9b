"""The metrics of runs: those below folders, and those that are kept in ``results``."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from . import run
from .cli import folder_name
from .columns import COLUMNS, METRICS, natural
from .composing import CONF
from .files import atomic_write

Metrics = dict[str, Any]

EXPERIMENTS = {path.stem: path for path in sorted(Path(CONF, "experiment").glob("*.yaml"))}
RUNS = Path("results", "runs")
#: Experiments that sweep by themselves, in any data set: so many runs that each is kept as a row of
#: the experiment's CSV, with these choices.
STUDIES = ("start_map", "lr_scale")
STUDIED = (
    "dataset",
    "model.norm",
    "neuron_start.calibrate",
    "task.lr_scale",
    "neuron",
    "neuron_start.tau",
    "neuron_start.v_threshold",
    "seed",
)
MAPS = Path("results", "maps")


def gather(folders: Iterable[Path]) -> tuple[dict[Path, Metrics], dict[Path, str]]:
    """The metrics of every finished run below ``folders``, and why the other runs have none.

    Raises:
        FileNotFoundError: a folder that is not there, or no run in any of them.
    """
    finished, left_out = {}, {}
    seen = set()  # a folder may hold another of them
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}; give folders that hold runs")
        for config in sorted(folder.rglob(run.CONFIG)):
            if config.parent.name == ".hydra" or config.resolve() in seen:  # Hydra's own copy
                continue
            seen.add(config.resolve())
            here = run.Run(config.parent)
            try:
                if not here.is_finished:
                    left_out[here.folder] = "unfinished"
                    continue
                here.config  # noqa: B018 - what reads the runs relies on it
                finished[here.folder] = read(here.folder / run.METRICS)
            except (OSError, ValueError) as error:
                left_out[here.folder] = str(error)
    if not finished and not left_out:
        raise FileNotFoundError(
            f"no run below {', '.join(map(str, folders))}: a run's folder holds {run.CONFIG}"
        )
    return finished, left_out


def read(path: Path) -> Metrics:
    """The metrics of a run, with those of later evaluations of its checkpoints over them.

    Raises:
        ValueError: a file that is damaged, or not what a run writes.
    """
    metrics = run.read_json(path)
    if not {"command", "choices"} <= metrics.keys():
        raise ValueError(f"{path.name} lacks command and choices, which a run writes")
    evaluations = [*metrics.get("evaluations", []), *run.Run(path.parent).evaluations]
    metrics = run.with_evaluations(metrics, evaluations) | {"evaluations": evaluations}
    if not METRICS.keys() & metrics.keys():
        raise ValueError(f"{path.name} has none of {', '.join(METRICS)}")
    for name in COLUMNS:
        if not isinstance(metrics.get(name), int | float | None):
            raise ValueError(f"{path.name} has {metrics[name]!r} for {name}, not a number")
    return metrics


def overrides(metrics: Metrics) -> dict[str, str]:
    """What was chosen on the command line, by key."""
    words = (word.partition("=") for word in run.given_overrides(metrics))
    return {key.lstrip("+"): value for key, _, value in words}


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


def stored(root: Path, experiment: str) -> list[Metrics]:
    return [read(path) for path in sorted((root / RUNS / experiment).glob("*.json"))]


def chosen_alone(runs: Iterable[Metrics], *keys: str) -> list[Metrics]:
    """The runs that choose nothing beyond ``keys``, which a mean would hide."""
    return [m for m in runs if overrides(m).keys() <= {"experiment", "seed", *keys}]


def beyond_study(metrics: Metrics) -> set[str]:
    """The choices of a study's run that its row would not say."""
    return overrides(metrics).keys() - {"experiment", *STUDIED}


def store_studies(finished: Mapping[Path, Metrics], root: Path) -> Iterator[Path]:
    """Add the runs of ``STUDIES`` to the CSVs in ``root/results/maps``; gives those written.

    Runs of other choices than ``STUDIED`` are left out.
    The first lines, which start with ``#``, say on what and where the accuracies were measured.
    """
    for study in STUDIES:
        runs = {f: m for f, m in finished.items() if overrides(m).get("experiment") == study}
        runs = {folder: m for folder, m in runs.items() if not beyond_study(m)}
        if not runs:
            continue
        path = root / MAPS / f"{study}.csv"
        before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        origins = {line for line in before if line.startswith("#")} | {*map(origin, runs.values())}
        rows = pd.DataFrame([_row(folder, metrics) for folder, metrics in runs.items()])
        rows = pd.concat([studied(root, study), rows]).drop_duplicates([*STUDIED], keep="last")
        rows = rows.sort_values([*STUDIED], key=lambda values: values.map(natural))
        with atomic_write(path) as whole:
            table = rows.to_csv(index=False, float_format="%.5f")
            whole.write_text("\n".join([*sorted(origins), table]), encoding="utf-8")
        yield path


def origin(metrics: Metrics) -> str:
    """A line of comment on what was measured, by which commit and where."""
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    how = metrics.get("protocol", {}).get("accuracy", "")
    machine = f"{metrics['machine']}, {metrics['threads']} threads"
    return f"# {how}; commit {metrics['commit']}; {versions}; {machine}"


def _row(folder: Path, metrics: Metrics) -> dict[str, Any]:
    config = run.Run(folder).config
    # A group's choice is its name, and all others are values.
    values = {key: metrics["choices"].get(key, OmegaConf.select(config, key)) for key in STUDIED}
    return {key: json.dumps(value).strip('"') for key, value in values.items()} | {
        "accuracy": metrics["accuracy"]
    }


def studied(root: Path, study: str) -> pd.DataFrame:
    """The rows of a study's CSV, all but the accuracy as text."""
    path = root / MAPS / f"{study}.csv"
    if not path.is_file():
        return pd.DataFrame(columns=[*STUDIED, "accuracy"])
    rows = pd.read_csv(path, comment="#", dtype=str, keep_default_na=False)
    return rows.astype({"accuracy": float})
