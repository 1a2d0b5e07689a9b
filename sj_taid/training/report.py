"""A page of runs: ``sj-taid report FOLDER ... [--out FILE]``.

It has the table of ``sj-taid compare``, the best first, and what the best runs drew: pictures and
learning curves. The page is one HTML file that needs no network.
"""

from __future__ import annotations

import argparse
import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import pandas as pd

from .compare import METRICS, Metrics, are_alike, frame, gather, present, summary
from .files import atomic_write, check_replaceable
from .run import Run

#: in the template: tells a page of ours
MARK = 'content="sj-taid report"'


def rank(runs: Mapping[Path, Metrics]) -> tuple[dict[Path, Metrics], str]:
    """The runs, the best first, and the metric: the first run's objective, or else the first.

    A generator whose samples are all alike comes last: by few test images one may be near.
    """
    names = present(frame([*runs.values()])[0], METRICS)
    objective = Run(next(iter(runs))).config.get("objective")
    metric = objective if objective in names else names[0]
    sign = 1 if METRICS[metric].title.endswith("↓") else -1

    def place(item: tuple[Path, Metrics]) -> tuple[bool, float]:
        return are_alike(item[1]), sign * item[1].get(metric, sign * math.inf)

    return dict(sorted(runs.items(), key=place)), metric


def pictures(folder: Path) -> list[str]:
    """What the run drew, as data URLs."""
    names = ("samples", "reconstructions", "confusion", "curves")
    files = [file for name in names if (file := folder / f"{name}.png").is_file()]
    codes = [base64.b64encode(file.read_bytes()).decode() for file in files]
    return [f"data:image/png;base64,{code}" for code in codes]


def page(runs: Mapping[Path, Metrics], best: int = 12) -> str:
    """The HTML of the runs, by their folders."""
    runs, metric = rank(runs)
    table, keys = frame([*runs.values()])
    shown: dict[str, list[str]] = {}
    for folder, row in zip(runs, table.to_dict("records"), strict=True):
        label = " ".join(f"{key}={row[key]}" for key in keys)
        if label not in shown and len(shown) < best and (drawn := pictures(folder)):
            shown[label] = drawn
    with pd.option_context("display.max_colwidth", None):
        text = summary([*runs.values()]).to_html(index=False, border=0)
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return jinja2.Template(template, autoescape=True, undefined=jinja2.StrictUndefined).render(
        count=len(runs),
        ranked_by=METRICS[metric].title,
        table=text,
        pictures=shown,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("sj-taid report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold runs")
    parser.add_argument("--out", type=Path, help="default: report.html in the first folder")
    parser.add_argument("--best", type=int, default=12, help="how many to show pictures of")
    options = parser.parse_args(arguments)
    out = options.out or options.folders[0] / "report.html"
    check_replaceable(out, MARK)
    runs = gather(options.folders)
    with atomic_write(out) as temporary:
        temporary.write_text(page(runs, options.best), encoding="utf-8")
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}")
