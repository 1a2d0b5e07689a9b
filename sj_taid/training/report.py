"""A page of runs: ``sj-taid report FOLDER ... [--out FILE]``.

It has the table of ``sj-taid compare``, the best first, the learning curves of every finished run
below the folders, and the pictures of the best. The page is one HTML file that needs no network.
"""

from __future__ import annotations

import argparse
import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd

from .._extras import needs
from .callbacks import History, show_progress
from .checkpoint import read_checkpoint
from .compare import METRICS, Metrics, frame, gather, learned_nothing, present, summary
from .files import atomic_write, check_replaceable
from .process import silence_notes
from .run import Run

with needs("plotly jinja2"):
    import jinja2
    import plotly.express as px
    from plotly.offline import get_plotlyjs

#: in the template: tells a page of ours
MARK = 'content="sj-taid report"'


def rank(runs: Mapping[Path, Metrics]) -> tuple[dict[Path, Metrics], str]:
    """The runs, the best first, and the metric: the first run's objective, or else the first.

    A generator that learned nothing comes last, however near a grey image is to few test images.
    """
    names = present(frame([*runs.values()])[0], METRICS)
    objective = Run(next(iter(runs))).config.get("objective")
    metric = objective if objective in names else names[0]
    sign = 1 if METRICS[metric].title.endswith("↓") else -1

    def place(item: tuple[Path, Metrics]) -> tuple[bool, float]:
        return learned_nothing(item[1]), sign * item[1].get(metric, sign * math.inf)

    return dict(sorted(runs.items(), key=place)), metric


def pictures(folder: Path) -> list[str]:
    """What the run drew of its model, as data URLs."""
    files = [folder / f"{name}.png" for name in ("samples", "reconstructions", "confusion")]
    codes = [base64.b64encode(file.read_bytes()).decode() for file in files if file.is_file()]
    return [f"data:image/png;base64,{code}" for code in codes]


def read_curves(folder: Path) -> Iterator[dict[str, Any]]:
    """The logged values over the epochs, from the checkpoint."""
    checkpoint = read_checkpoint(Run.find(folder).checkpoint)
    for epoch, values in enumerate(checkpoint["callbacks"][History.__qualname__]["epochs"], 1):
        for key, value in values.items():
            stage, _, name = key.partition("/")
            yield {"epoch": epoch, "stage": stage, "name": name, "value": value}


def draw_curves(epochs: list[dict[str, Any]], colours: dict[str, str]) -> Iterator[str]:
    """A figure, as JSON, for each logged name, with all runs in it."""
    lines = {"color": "choices", "line_group": "run", "line_dash": "stage"}
    looks: dict[str, Any] = {"line_dash_map": {"train": "dot", "val": "solid"}, "markers": True}
    looks["color_discrete_map"] = colours
    for name, part in pd.DataFrame(epochs).groupby("name", sort=False) if epochs else ():
        title = f"{name} over the epochs (dotted: in training)"
        figure = px.line(part, "epoch", "value", title=title, **lines, **looks)
        figure.update_xaxes(dtick=max(1, round(part["epoch"].max() / 8)))  # whole ones
        figure.update_yaxes(title=None, automargin=True)
        clear = dict.fromkeys(("paper_bgcolor", "plot_bgcolor"), "rgba(0,0,0,0)")
        margin = {"l": 50, "r": 10, "t": 36, "b": 40}
        figure.update_layout(height=300, margin=margin, title_font_size=14, **clear)
        yield figure.update_layout(showlegend=False).to_json()


def page(runs: Mapping[Path, Metrics], best: int = 12) -> str:
    """The HTML of the runs, by their folders."""
    runs, metric = rank(runs)
    table, keys = frame([*runs.values()])
    rows = summary([*runs.values()])
    labels = [" ".join(f"{key}={row[key]}" for key in keys) for row in table.to_dict("records")]
    colours = dict(zip(dict.fromkeys(labels), cycle(px.colors.qualitative.Plotly), strict=False))
    epochs: list[dict[str, Any]] = []
    shown: dict[str, list[str]] = {}
    notes = []
    for folder, label in show_progress([*zip(runs, labels, strict=True)], "Reading runs"):
        try:
            of_run = {"run": str(folder), "choices": label}
            epochs += [of_run | value for value in read_curves(folder)]
            if label not in shown and len(shown) < best and (drawn := pictures(folder)):
                shown[label] = drawn
        except Exception as error:  # whatever is wrong with a run, the others are shown
            notes.append(f"{folder}: {type(error).__name__}: {error}")
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return jinja2.Template(template, autoescape=True, undefined=jinja2.StrictUndefined).render(
        plotly=get_plotlyjs(),
        count=len(runs),
        ranked_by=METRICS[metric].title,
        heads=rows.columns,
        rows=dict(zip(colours, rows.to_numpy().tolist(), strict=True)),
        colours=colours,
        curves=[*draw_curves(epochs, colours)],
        pictures=shown,
        notes=notes,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("sj-taid report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold runs")
    parser.add_argument("--out", type=Path, help="default: report.html in the first folder")
    parser.add_argument("--best", type=int, default=12, help="how many to show pictures of")
    options = parser.parse_args(arguments)
    silence_notes()
    out = options.out or options.folders[0] / "report.html"
    check_replaceable(out, MARK)
    runs = gather(options.folders)
    with atomic_write(out) as temporary:
        temporary.write_text(page(runs, options.best), encoding="utf-8")
    print(f"{out}: {len(runs)} runs")
