"""Columns of the tables of runs: title, unit and decimals of every metric and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

#: the metrics of samples; of an ESVAE with a flow also NAME_learned, from the learned prior
OF_SAMPLES = ("fad", "fad_published", "fid", "features", "inception_score")


class Column(NamedTuple):
    """The display of a metric or a cost.

    Attributes:
        title: the heading; an arrow at its end says which direction is better.
        unit: values are divided by it.
        decimals: digits after the point.
        spread: whether the standard deviation over runs is shown too.
    """

    title: str
    unit: float
    decimals: int
    spread: bool = True

    @property
    def less_is_better(self) -> bool:
        return self.title.endswith("↓")

    def of(self, what: str) -> Column:
        """The same column for other samples, which its title names before the arrow."""
        return self._replace(title=f"{self.title[:-2]}, {what}{self.title[-2:]}")

    def text(self, values: pd.Series) -> str:
        """Mean ± standard deviation, or "" without a value."""
        values = values.dropna() / self.unit
        if values.empty:
            return ""
        mean = f"{values.mean():.{self.decimals}f}"
        # Whole numbers such as epochs are often equal in all runs.
        differ = len(values) > 1 if self.decimals else values.nunique() > 1
        return f"{mean} ± {values.std():.{self.decimals}f}" if self.spread and differ else mean


#: The metrics. A published value that was measured by another protocol than ours, or by an
#: unknown one, has a column of its own.
METRICS = {
    "accuracy": Column("accuracy, last epoch, % ↑", 0.01, 2),
    "accuracy_best_test_epoch": Column("accuracy, best test epoch, % ↑", 0.01, 2),
    "accuracy_best_validation_epoch": Column("accuracy, best validation epoch, % ↑", 0.01, 2),
    "accuracy_published": Column("accuracy as published, % ↑", 0.01, 2),
    "validation_accuracy": Column("validation accuracy, % ↑", 0.01, 2),
    "reconstruction": Column("reconstruction ↓", 1, 4),
    "inception_score": Column("IS ↑", 1, 3),
    "inception_score_published": Column("IS as published ↑", 1, 3),
    "fid": Column("FID ↓", 1, 2),
    "fid_published": Column("FID as published ↓", 1, 2),
    "features": Column("Fréchet distance, EfficientNet-Lite0 ↓", 1, 2),
    "fad": Column("FAD, own autoencoder ↓", 1, 2),
    "fad_published": Column("FAD as published ↓", 1, 2),
    "fad_precision": Column("precision, FAD's features ↑", 1, 2),
    "fad_recall": Column("recall, FAD's features ↑", 1, 2),
    "fad_published_median": Column("FAD as published, median of draws ↓", 1, 2),
    "validation_reconstruction": Column("validation reconstruction ↓", 1, 4),
    "validation_fad": Column("validation FAD, own autoencoder ↓", 1, 2),
}
METRICS |= {f"{name}_learned": METRICS[name].of("learned prior") for name in OF_SAMPLES}
#: The costs of a run.
COSTS = {
    "energy": Column("energy of a sample, µJ", 1, 2, spread=False),
    "firing_rate": Column("spikes per neuron and step", 1, 3, spread=False),
    "epochs": Column("epochs", 1, 0),
    "parameters": Column("parameters, M", 1e6, 2, spread=False),
    "training_seconds": Column("training, min", 60, 1, spread=False),
}
COLUMNS = METRICS | COSTS


def format_metrics(metrics: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Title and value, as text, of each metric, by its name."""
    return {
        key: (column.title, f"{metrics[key] / column.unit:.{column.decimals}f}")
        for key, column in METRICS.items()
        if key in metrics
    }


def are_alike(metrics: Mapping[str, Any]) -> bool:
    """Whether a generator's samples are all the same."""
    return metrics.get("sample_variance", 1.0) < 1e-6


def learned_nothing(metrics: Mapping[str, Any]) -> bool:
    """Whether a generator's samples are all alike, or no better than those before its training."""
    return are_alike(metrics) or metrics.get("fad", 0.0) >= metrics.get("fad_untrained", math.inf)
