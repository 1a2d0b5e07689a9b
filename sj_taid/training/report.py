"""A page of runs: ``sj-taid report FOLDER ... [--out FILE]``.

Its table and learning curves have every finished run below the folders. The checkpoints of the best
runs are loaded too, on the CPU, for samples from one seed, firing rates and costs. The page is one
HTML file that needs no network.
"""

from __future__ import annotations

import argparse
import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torchvision.utils import save_image

from .. import _compat
from .._checks import check, integer
from .._context import seeded
from .._extras import needs
from .callbacks import History, show_progress
from .checkpoint import read_checkpoint
from .columns import COLUMNS as MEASURED
from .columns import METRICS, Column, learned_nothing
from .compare import Metrics, frame, gather, heading, present
from .files import atomic_write, check_replaceable
from .process import silence_notes
from .run import Run, build_data

with needs("'spikingjelly>=2' plotly jinja2"):
    import jinja2
    import plotly.express as px
    from plotly.graph_objects import Figure
    from plotly.offline import get_plotlyjs
    from spikingjelly.activation_based.op_counter import estimate_simple_energy

#: The same samples and images are shown of all runs.
SEED, IMAGES = 0, 8
#: The cost of one pass of one image.
OPERATIONS = {
    "synop": Column("synaptic operations, k", 1e3, 1),
    "mac": Column("multiply-accumulates, k", 1e3, 1),
    "compute": Column("arithmetic, µJ", 1e6, 3),
    "energy": Column("with memory, µJ", 1e6, 3),
}
COLUMNS = MEASURED | OPERATIONS
#: in the template: tells a page of ours
MARK = 'content="sj-taid report"'


# ---- a run ----


def first_images(run: Run, trust: Sequence[str] = ()) -> Tensor:
    """The first images ``[N, C, H, W]``, or frames ``[T, N, C, H, W]``, of a run's test set."""
    return _first_images(OmegaConf.to_yaml(run.config.dataset), tuple(trust))


@cache  # most runs of a page have the same data
def _first_images(dataset: str, trust: tuple[str, ...]) -> Tensor:
    cfg = OmegaConf.create({"dataset": OmegaConf.create(dataset)})
    data = build_data(cfg, trust, num_workers=0, batch_size=IMAGES)
    x, _ = next(iter(data.test_dataloader()))
    return x.transpose(0, 1) if x.dim() == 5 else x


def inspect(run: Run, trust: Sequence[str] = ()) -> dict[str, Any]:
    """Samples, reconstructions, firing rates and costs of a run's checkpoint."""
    model: Any = run.model(trust)
    images = first_images(run, trust)
    rates: dict[str, float] = {}
    found: dict[str, Any] = {}

    def record_rate(name: str) -> Callable[..., None]:
        # A model that also steps through time ends with its pass over the whole sequence.
        return lambda node, inputs, output: rates.update({name: float(output.mean())})

    with ExitStack() as hooks, seeded(SEED), torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, _compat.NEURONS):
                hooks.enter_context(module.register_forward_hook(record_rate(name)))
        output = model(images)
    if hasattr(output, "image"):
        found["reconstructions"] = png(images, output.image)
    if hasattr(model, "sample"):
        with seeded(SEED):
            found["samples"] = png(*model.sample(2 * IMAGES).chunk(2))
    with seeded(SEED):
        energy = estimate_simple_energy(model, (images.narrow(-4, 0, 1),))
    costs = {"compute": energy.energy_compute_pj, "energy": energy.energy_total_pj}
    return found | {"operations": energy.counts | costs, "rates": rates}


def png(*rows: Tensor) -> str:
    """Rows of images ``[N, C, H, W]`` in [-1, 1], as a data URL."""
    file = io.BytesIO()
    options = {"padding": 1, "normalize": True, "value_range": (-1, 1)}
    save_image(torch.cat(rows), file, format="png", nrow=len(rows[0]), **options)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def read_training(run: Run) -> Iterator[dict[str, Any]]:
    """The logged values over the epochs, from the checkpoint."""
    checkpoint = read_checkpoint(Run.find(run.folder).checkpoint)
    for epoch, values in enumerate(checkpoint["callbacks"][History.__qualname__]["epochs"], 1):
        for key, value in values.items():
            stage, _, name = key.partition("/")
            yield {"epoch": epoch, "stage": stage, "name": name, "value": value}


# ---- figures ----


def to_json(figure: Figure, height: int = 300) -> str:
    """A figure as JSON; the page sets width and colours."""
    figure.update_layout(
        height=height,
        margin={"l": 50, "r": 10, "t": 36, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        title_font_size=14,
        legend={"font_size": 10, "title": None},
        yaxis={"title": None, "automargin": True, "ticklabelstandoff": 4},
    )
    return figure.to_json()


def curves(epochs: list[dict[str, Any]], by_run: dict[str, Any]) -> Iterator[str]:
    """Learning curves: a figure for each logged name, with all runs in it."""
    dashes = {"train": "dot", "val": "solid"}
    options: dict[str, Any] = {"line_dash": "stage", "line_dash_map": dashes, "markers": True}
    for name, part in pd.DataFrame(epochs).groupby("name", sort=False) if epochs else ():
        title = f"{name} over the epochs (dotted: in training)"
        figure = px.line(part, x="epoch", y="value", title=title, **options, **by_run)
        figure.update_layout(showlegend=False)
        figure.update_xaxes(dtick=max(1, round(part["epoch"].max() / 8)))  # whole ones
        yield to_json(figure)


def rates(runs: Mapping[str, dict[str, Any]], by_run: dict[str, Any]) -> Iterator[str]:
    """Firing rates by layer."""
    found = pd.DataFrame({label: one["rates"] for label, one in runs.items() if "rates" in one})
    if len(found):
        rows = found.rename_axis("layer").reset_index().melt("layer", None, "run", "rate").dropna()
        title = "spikes per neuron and time step"
        figure = px.bar(rows, x="rate", y="layer", barmode="group", title=title, **by_run)
        figure.update_layout(showlegend=False, xaxis_title=None)
        figure.update_yaxes(autorange="reversed")
        yield to_json(figure, 110 + len(found) * (14 + 7 * len(runs)))


# ---- the page ----


def rank(runs: Mapping[Path, Metrics]) -> tuple[pd.DataFrame, list[str], str]:
    """A row for each run, the best first, the keys in which they differ, and the metric.

    A generator that learned nothing comes last, however near a grey image is to few test images.

    The metric is the objective of the first run, or else the first there is.
    """
    table, keys = frame([*runs.values()])
    names = present(table, METRICS)
    objective = Run(next(iter(runs))).config.get("objective")
    metric = objective if objective in names else names[0]
    order = {"last": True, metric: METRICS[metric].less_is_better}
    table = table.assign(folder=[*runs], last=[*map(learned_nothing, runs.values())])
    table = table.sort_values([*order], ascending=[*order.values()], kind="stable")
    keys += ["seed"] if table["seed"].nunique() > 1 else []
    labels = [
        " ".join([f"{place}.", *(f"{key.rpartition('.')[2]}={row[key]}" for key in keys)])
        for place, row in enumerate(table.to_dict("records"), 1)
    ]
    return table.set_axis(labels), keys, metric


def page(runs: Mapping[Path, Metrics], best: int = 12, trust: Sequence[str] = ()) -> str:
    """The HTML of the runs, by their folders."""
    table, keys, metric = rank(runs)
    epochs: list[dict[str, Any]] = []
    details: dict[str, dict[str, Any]] = {}
    for label, folder in show_progress([*table["folder"].items()], "Reading runs"):
        details[label] = one = {"folder": folder, "command": runs[folder]["command"]}
        try:
            epochs += [{"run": label, **value} for value in read_training(Run(folder))]
            if len(details) <= best:
                one |= inspect(Run(folder), trust)
        except Exception as error:  # whatever is wrong with a run, the others are shown
            one["note"] = f"{type(error).__name__}: {error}"

    table = table.join(
        pd.DataFrame([one.get("operations", {}) for one in details.values()], table.index)
    )
    shown = present(table, COLUMNS)
    colours = dict(zip(details, cycle(px.colors.qualitative.Plotly), strict=False))
    by_run = {"color": "run", "color_discrete_map": colours}
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return jinja2.Template(template, autoescape=True, undefined=jinja2.StrictUndefined).render(
        plotly=get_plotlyjs(),
        ranked_by=METRICS[metric].title,
        heads=[*keys, *(heading(n, table) if n in METRICS else COLUMNS[n].title for n in shown)],
        rows={
            label: [(row[key], row[key]) for key in keys]
            + [(row[name], COLUMNS[name].text(pd.Series([row[name]]))) for name in shown]
            for label, row in table.iterrows()
        },
        runs=details,
        colours=colours,
        sections={
            "Learning curves": [*curves(epochs, by_run)],
            "Firing": [*rates(details, by_run)],
        },
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("sj-taid report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold runs")
    parser.add_argument("--out", type=Path, help="default: report.html in the first folder")
    parser.add_argument("--best", type=int, default=12, help="how many checkpoints to load")
    parser.add_argument("--trust", nargs="+", default=(), help="custom classes that runs name")
    options = parser.parse_args(arguments)
    check(integer(0), best=options.best)
    silence_notes()
    out = options.out or options.folders[0] / "report.html"
    check_replaceable(out, MARK)
    runs = gather(options.folders)
    with atomic_write(out) as temporary:
        temporary.write_text(page(runs, options.best, options.trust), encoding="utf-8")
    print(f"{out}: {len(runs)} runs")
