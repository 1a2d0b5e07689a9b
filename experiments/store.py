"""The measured runs in results/: a JSON file per run, and a CSV per sweep over starts."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from sj_taid.training.compare import Metrics, overrides
from sj_taid.training.config import folder_name
from sj_taid.training.files import atomic_write
from sj_taid.training.run import Run

RESULTS = Path(__file__).resolve().parents[1] / "results"
#: What the folders of images in results/ hold
FOLDERS = {"image_folder": "cifar10"}  # as JPEG
#: The experiments of so many runs that each run is a row of a CSV, and the choices in a row.
STUDIES = ("start_map", "lr_scale")
STUDIED = [
    "dataset",
    "model.norm",
    "neuron_start.calibrate",
    "task.lr_scale",
    "neuron",
    "neuron_start.tau",
    "neuron_start.v_threshold",
    "seed",
]


def load_runs(experiment: str, results: Path = RESULTS) -> list[Metrics]:
    """The metrics of an experiment's runs."""
    paths = sorted((results / "runs" / experiment).glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def experiments() -> list[str]:
    """The names of the experiments that have runs."""
    return sorted(path.name for path in (RESULTS / "runs").iterdir())


def load_study(study: str, results: Path = RESULTS) -> pd.DataFrame:
    """The rows of a study, all but the accuracy as text."""
    rows = pd.read_csv(results / "maps" / f"{study}.csv", dtype=str, keep_default_na=False)
    return rows.astype({"accuracy": float})


def store(finished: Mapping[Path, Metrics], results: Path = RESULTS) -> Iterator[str]:
    """Copy the metrics of experiments' runs into results; yields a line for each."""
    rows = defaultdict(list)
    for folder, metrics in finished.items():
        choices = overrides(metrics) | {"seed": str(metrics["seed"])}
        experiment = choices.pop("experiment", "")
        if not experiment:
            yield f"not stored: {folder} (it is no run of experiment=...)"
        elif experiment not in STUDIES:
            name = folder_name([f"{key}={value}" for key, value in choices.items()])
            path = results / "runs" / experiment / f"{name}.json"
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
            yield f"stored: {path}"
        elif others := choices.keys() - {*STUDIED}:
            yield f"not stored: {folder} ({experiment}.csv has no {', '.join(sorted(others))})"
        else:
            rows[experiment].append(study_row(folder, metrics))
    for study, new in rows.items():
        path = results / "maps" / f"{study}.csv"
        before = [load_study(study, results)] if path.is_file() else []
        table = pd.concat([*before, pd.DataFrame(new)]).drop_duplicates(STUDIED, keep="last")
        with atomic_write(path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.5f")
        yield f"stored: {path}"


def study_row(folder: Path, metrics: Metrics) -> dict[str, Any]:
    choices, config = metrics["choices"], Run(folder).config
    # A group's choice is a name; all others are values of the config.
    values = {key: choices.get(key, OmegaConf.select(config, key)) for key in STUDIED}
    row = {key: json.dumps(value).strip('"') for key, value in values.items()}
    return row | {key: metrics[key] for key in ("accuracy", "commit", "machine")}
