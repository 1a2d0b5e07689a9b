"""The metrics of runs: those below folders, and those that are kept in ``results/runs``."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import run
from .cli import folder_name
from .composing import CONF
from .files import atomic_write
from .quantities import COLUMNS, METRICS

Metrics = dict[str, Any]

EXPERIMENTS = {path.stem: path for path in sorted(Path(CONF, "experiment").glob("*.yaml"))}
#: experiments that sweep by themselves, in any data set: too many runs to keep each
STUDIES = ("start_map", "lr_scale")
RUNS = Path("results", "runs")


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


def stored(root: Path, experiment: str) -> list[Metrics]:
    return [read(path) for path in sorted((root / RUNS / experiment).glob("*.json"))]
