"""Tables of runs: a row for each combination of choices, and what a choice changes."""

from collections.abc import Iterable, Sequence
from functools import partial

import pandas as pd

from .columns import COLUMNS, METRICS, natural
from .gather import Metrics, overrides

BASELINES = {"neuron": "lif", "decoder": "fixed"}


def frame(runs: Sequence[Metrics]) -> tuple[pd.DataFrame, list[str]]:
    """A row for every run, and the columns of the choices in which they differ, seeds apart."""
    table = pd.DataFrame(
        {name: value for name, value in metrics.items() if not isinstance(value, dict | list)}
        # Over what the test logs by the same name, as loss.
        | overrides(metrics)
        | metrics["choices"]  # over overrides, since they name a folder of images
        | {name: metrics[name] for name in ("seed", *COLUMNS) if name in metrics}
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


def text(name: str, table: pd.DataFrame, values: pd.Series) -> str:
    """Mean and spread of a figure over some runs; apart for each protocol, which do not compare."""
    protocol = table.loc[values.index].get(f"{name} protocol", pd.Series("", values.index))
    by_protocol = values.dropna().groupby(protocol, sort=False)
    return ", ".join(COLUMNS[name].text(alike) for _, alike in by_protocol)


def summary(runs: Sequence[Metrics]) -> pd.DataFrame:
    """A row for each combination of choices, over its seeds."""
    table, keys = frame(runs)
    groups = table.groupby(keys or [""] * len(table), sort=False)
    names = present(table)
    cells = groups.agg({name: partial(text, name, table) for name in names})
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


def means(table: pd.DataFrame, name: str, row: str, column: str) -> pd.DataFrame:
    """The mean of a figure for every two values of two choices, both in order."""
    values = table.assign(value=table[name] / COLUMNS[name].unit)
    mean = values.pivot_table("value", row, column, sort=False)
    return mean.loc[sorted(mean.index, key=natural), sorted(mean.columns, key=natural)]


def markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, tablefmt="github", disable_numparse=True) + "\n"
