"""What the benchmarks share: interleaved timing, quantiles, fitted slopes, CSV with provenance."""

from __future__ import annotations

import csv
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sj_taid.training.files import replacing
from sj_taid.training.provenance import provenance


class Timing(NamedTuple):
    """Milliseconds: the median and the 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Time CPU functions in turn, round by round, so that a slow moment hits them all alike."""
    for function in functions.values():
        function()  # compilation, caches, allocator
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: quantiles(values) for name, values in times.items()}


def quantiles(milliseconds: Iterable[float]) -> Timing:
    low, median, high = np.quantile(list(milliseconds), [0.2, 0.5, 0.8])
    return Timing(float(median), float(low), float(high))


def slope(sizes: Iterable[float], times: Iterable[float]) -> float:
    """The exponent of a power law through the points: 1 is linear."""
    return float(np.polyfit(np.log(list(sizes)), np.log(list(times)), 1)[0])


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Every row carries its command and its provenance, so that none is ever without them."""
    facts = provenance()
    versions = facts.pop("versions")
    shared = {"command": shlex.join(["python", *sys.argv]), **facts}
    shared |= {f"{name}_version": number for name, number in versions.items()}
    names = list(dict.fromkeys(key for row in rows for key in row)) + list(shared)
    with replacing(path) as whole, whole.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        # Rows of an earlier run that are written again keep their own.
        writer.writerows(shared | row for row in rows)
