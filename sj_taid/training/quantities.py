"""What is measured of a run and what it cost: headings, units and decimals; the order of values."""

from typing import Any, NamedTuple

import pandas as pd


class Quantity(NamedTuple):
    """A column: its heading, its unit and decimals, and whether its spread is of interest."""

    title: str
    unit: float
    decimals: int
    spread: bool = True

    @property
    def less_is_better(self) -> bool:
        return self.title.endswith("↓")

    def text(self, values: pd.Series, sign: str = "-") -> str:
        """Mean and standard deviation; nothing where there is no value. ``sign="+"`` shows both."""
        values = values.dropna() / self.unit
        if values.empty:
            return ""
        mean = f"{values.mean():{sign}.{self.decimals}f}"
        differ = len(values) > 1 if self.decimals else values.nunique() > 1  # counts may be equal
        several = self.spread and differ
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
    "epochs": Quantity("epochs", 1, 0),
    "parameters": Quantity("parameters, M", 1e6, 2, spread=False),
    "training_seconds": Quantity("training, min", 60, 1, spread=False),
}
COLUMNS = METRICS | COSTS


def natural(value: Any) -> tuple[bool, float, str]:
    """Sorts numbers by size, before words."""
    try:
        return (False, float(value), "")
    except ValueError:
        return (True, 0.0, str(value))
