"""Tables of runs: a row per run, or a row per combination of choices over its seeds."""

from collections.abc import Iterable, Sequence
from functools import partial

import pandas as pd

from .columns import COLUMNS, METRICS
from .gather import Metrics, overrides


def frame(runs: Sequence[Metrics]) -> tuple[pd.DataFrame, list[str]]:
    """A row for each run, and the columns of the choices in which they differ, except the seed."""
    table = pd.DataFrame(
        {name: value for name, value in metrics.items() if not isinstance(value, dict | list)}
        # A choice takes precedence over a metric of its name, as loss.
        | overrides(metrics)
        # A chosen folder of images has its name here, and its path on the command line.
        | metrics["choices"]
        | {name: metrics[name] for name in ("seed", *COLUMNS) if name in metrics}
        | {f"{name} protocol": metrics.get("protocol", {}).get(name, "") for name in METRICS}
        for metrics in runs
    )
    keys = list(dict.fromkeys(key for m in runs for key in overrides(m) if key != "seed"))
    table[keys] = table[keys].fillna("default")
    return table, [key for key in keys if table[key].nunique() > 1]


def present(table: pd.DataFrame, columns: Iterable[str] = COLUMNS) -> list[str]:
    """The columns in which some run has a value."""
    return [name for name in columns if name in table and table[name].notna().any()]


def heading(name: str, table: pd.DataFrame) -> str:
    """The title of a column, which says if its values are of different protocols."""
    mixed = name in METRICS and table[f"{name} protocol"][table[name].notna()].nunique() > 1
    return COLUMNS[name].title + (" (of different protocols)" if mixed else "")


def text(name: str, table: pd.DataFrame, values: pd.Series) -> str:
    """Mean and spread of a column over some runs, for each protocol by itself."""
    protocol = table.loc[values.index].get(f"{name} protocol", pd.Series("", values.index))
    by_protocol = values.dropna().groupby(protocol, sort=False)
    return ", ".join(COLUMNS[name].text(group) for _, group in by_protocol)


def summary(runs: Sequence[Metrics]) -> pd.DataFrame:
    """A row for each combination of choices, with mean and spread over its seeds."""
    table, keys = frame(runs)
    groups = table.groupby(keys or [""] * len(table), sort=False)
    names = present(table)
    cells = groups.agg({name: partial(text, name, table) for name in names})
    cells.columns = pd.Index([heading(name, table) for name in names])
    return cells.assign(runs=groups.size()).reset_index(drop=not keys)


def markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, tablefmt="github", disable_numparse=True) + "\n"
