"""Gathering the metrics of the runs below some folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import run
from .columns import METRICS

#: The content of a run's ``metrics.json``.
Metrics = dict[str, Any]


def gather(folders: Sequence[Path]) -> tuple[dict[Path, Metrics], dict[Path, str]]:
    """The metrics of every finished run below ``folders``, and why others are left out (printed).

    Raises:
        FileNotFoundError: there is no finished run, or no such folder.
    """
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}; give folders that hold runs")
    finished, left_out = {}, {}
    # One folder may hold another of them.
    configs = {path.resolve() for folder in folders for path in folder.rglob(run.CONFIG)}
    for config in sorted(configs):
        found = run.Run(config.parent)
        try:
            finished[found.folder] = read(found)
        except (OSError, ValueError) as error:
            left_out[found.folder] = str(error) if found.is_finished else "unfinished"
            print(f"left out: {found.folder} ({left_out[found.folder]})")
    if not finished:
        raise FileNotFoundError(
            f"no finished run below {', '.join(map(str, folders))}; an interrupted one resumes "
            "when its command is repeated"
        )
    return finished, left_out


def read(finished: run.Run) -> Metrics:
    """The metrics of a run, updated by later evaluations of its checkpoints."""
    metrics = finished.metrics
    finished.config  # noqa: B018 - a run with a damaged config is not whole
    evaluations = finished.evaluations
    metrics = run.merge_evaluations(metrics, evaluations) | {"evaluations": evaluations}
    if not METRICS.keys() & metrics.keys():
        raise ValueError(f"{run.METRICS} has none of {', '.join(METRICS)}")
    return metrics


def overrides(metrics: Metrics) -> dict[str, str]:
    """The choices on the command line, by key."""
    words = (word.partition("=") for word in metrics["overrides"])
    return {key.lstrip("+"): value for key, _, value in words}
