"""One page of any set of runs: ``sj-taid report FOLDER ... [--out FILE]``.

Every finished run below the folders is in its table and curves. The best of them are looked at more
closely, on the CPU: what their checkpoints draw from one seed, and how they fire at one image. The
page is one HTML file that needs no network.
"""

from __future__ import annotations

import argparse
import base64
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain, combinations, cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import OmegaConf
from rich.progress import track
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor
from torchvision.utils import save_image

from .._extras import needs
from ..layer import TAID, FixedDecoder
from .callbacks import Pictures
from .columns import COLUMNS as MEASURED
from .columns import METRICS, Column
from .evaluation import seeded
from .files import atomic_write
from .gather import Metrics, gather
from .plot import time_shares
from .run import Run, build, read_checkpoint
from .tables import frame, heading, means, present

with needs("'spikingjelly>=2' plotly jinja2"):
    import jinja2
    import plotly.express as px
    from plotly.graph_objects import Figure
    from plotly.offline import get_plotlyjs
    from spikingjelly.activation_based.op_counter import estimate_simple_energy

#: of what is drawn and fed, the same for all runs
SEED, IMAGES, NEURONS = 0, 8, 12
#: of one pass of one image
OPERATIONS = {
    "synop": Column("synaptic operations, k", 1e3, 1),
    "mac": Column("multiply-accumulates, k", 1e3, 1),
    "compute": Column("arithmetic, µJ", 1e6, 3),
    "energy": Column("with memory, µJ", 1e6, 3),
}
COLUMNS = MEASURED | OPERATIONS


# ---- one run ----


@cache
def first_images(dataset: str, trust: tuple[str, ...] = ()) -> Tensor:
    """The first images ``[N, C, H, W]``, or frames ``[T, N, C, H, W]``, of a test set."""
    data = build(OmegaConf.create(dataset), trust, num_workers=0, batch_size=IMAGES)
    data.prepare_data()
    data.setup()
    x, _ = next(iter(data.test_dataloader()))
    return x.transpose(0, 1) if x.dim() == 5 else x


def look(run: Run, trust: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a run's checkpoint draws, how it fires, and what a pass costs.

    Raises:
        OSError, RuntimeError, ValueError: its checkpoint or its data is not there, or not whole.
    """
    model: Any = run.model(trust)
    images = first_images(OmegaConf.to_yaml(run.config.dataset), trust)
    spikes: dict[str, Tensor] = {}
    seen: dict[str, Any] = {}

    def watch_neuron(name: str) -> Callable[..., None]:
        # A model that also steps through time ends with its pass over the whole sequence.
        return lambda node, inputs, output: spikes.update({name.removesuffix(".1"): output})

    def watch_decoder(decoder: Any, inputs: tuple[Tensor]) -> None:
        seen["shares"] = time_shares(decoder.attention(*inputs))

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, BaseNode):
            hooks.append(module.register_forward_hook(watch_neuron(name)))
        elif isinstance(module, TAID | FixedDecoder):
            hooks.append(module.register_forward_pre_hook(watch_decoder))
    with seeded(SEED), torch.no_grad():
        output = model(images)
    for hook in hooks:
        hook.remove()
    if hasattr(output, "image"):
        seen["reconstructions"] = png(images, output.image)
    if hasattr(model, "sample"):
        with seeded(SEED):
            seen["samples"] = png(*model.sample(2 * IMAGES).chunk(2))
    with seeded(SEED):
        energy = estimate_simple_energy(model, (images.narrow(-4, 0, 1),))
    seen["operations"] = {
        **energy.counts,
        "compute": energy.energy_compute_pj,
        "energy": energy.energy_total_pj,
    }
    return seen | {
        "rates": {name: float(s.mean()) for name, s in spikes.items()},
        "raster": [*raster({name: s[:, 0].flatten(1) for name, s in spikes.items()})],
    }


def png(*rows: Tensor) -> str:
    """Rows of images ``[N, C, H, W]`` in [-1, 1], as a URL that holds them."""
    file = io.BytesIO()
    options = {"padding": 1, "normalize": True, "value_range": (-1, 1)}
    save_image(torch.cat(rows), file, format="png", nrow=len(rows[0]), **options)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# ---- figures ----


def finished(figure: Figure, height: int = 300, steps: int = 0) -> str:
    """A figure as JSON, over so many whole steps; the page gives width and the theme's colours."""
    if steps:
        figure.update_xaxes(dtick=max(1, round(steps / 8)))
    figure.update_layout(
        height=height,
        margin={"l": 50, "r": 10, "t": 36, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        title_font_size=14,
        legend={"font_size": 10, "title": None},
        yaxis={"title": None, "automargin": True, "ticklabelstandoff": 4},
        coloraxis_showscale=False,
    )
    return figure.to_json()


def lines(rows: pd.DataFrame, x: str, y: str, height: int = 300, **options: Any) -> str:
    """One figure of lines over whole steps; the table is the legend of the runs."""
    figure = px.line(rows, x=x, y=y, **options).update_layout(showlegend="run" not in rows)
    return finished(figure, height, rows[x].max())


def curves(epochs: list[dict[str, Any]], by_run: dict[str, Any]) -> Iterator[str]:
    """What was logged over the epochs, one figure a name, all runs in it."""
    dashes: dict[str, Any] = {
        "line_dash": "stage",
        "line_dash_map": {"train": "dot", "val": "solid"},
    }
    for name, part in pd.DataFrame(epochs).groupby("name", sort=False) if epochs else ():
        title = f"{name} over the epochs (dotted: in training)"
        yield lines(part, "epoch", "value", markers=True, title=title, **dashes, **by_run)


def heat_maps(table: pd.DataFrame, keys: Sequence[str], name: str) -> Iterator[str]:
    """The mean of a figure for every two values that were swept."""
    scale = "Viridis_r" if MEASURED[name].less_is_better else "Viridis"
    for one, other in combinations(keys, 2):
        mean = means(table, name, one, other)
        if 1 in mean.shape:
            continue  # of some runs alone, in which one of the two is the same
        figure = px.imshow(
            mean.to_numpy(),
            x=[*map(str, mean.columns)],
            y=[*map(str, mean.index)],
            text_auto=f".{MEASURED[name].decimals}f",
            color_continuous_scale=scale,
            aspect="auto",
            labels={"x": other, "y": one, "color": MEASURED[name].title},
            title=f"{MEASURED[name].title}: {one} by {other}",
        )
        figure.update_xaxes(type="category").update_yaxes(type="category")
        yield finished(figure)


def rates(runs: Mapping[str, dict[str, Any]], by_run: dict[str, Any]) -> Iterator[str]:
    rows = [
        {"run": label, "layer": layer, "rate": rate}
        for label, seen in runs.items()
        for layer, rate in seen.get("rates", {}).items()
    ]
    if rows:
        title = "spikes per neuron and time step"
        figure = px.bar(rows, x="rate", y="layer", barmode="group", title=title, **by_run)
        figure.update_layout(showlegend=False, xaxis_title=None)
        figure.update_yaxes(autorange="reversed")
        layers = len({row["layer"] for row in rows})
        yield finished(figure, 110 + layers * (14 + 7 * len(runs)))


def attention(runs: Mapping[str, dict[str, Any]], by_run: dict[str, Any]) -> Iterator[str]:
    """The share of each time step in the image: mean, and 10 to 90 % of the test images."""
    rows = [
        {"run": label, "channel": channel, "time step": step, "share": mean}
        | {"below": mean - low, "above": high - mean}
        for label, seen in runs.items()
        for channel, shares in enumerate(seen["shares"].unbind(2) if "shares" in seen else ())
        for step, share in enumerate(shares.numpy(), 1)
        for mean, (low, high) in [(share.mean(), np.quantile(share, [0.1, 0.9]))]
    ]
    if rows:
        options: dict[str, Any] = {
            "line_dash": "channel",
            "error_y": "above",
            "error_y_minus": "below",
        }
        title = "share of each time step in the image"
        yield lines(pd.DataFrame(rows), "time step", "share", title=title, **options, **by_run)


def parameters(history: list[dict[str, dict[str, float]]]) -> Iterator[str]:
    """tau and V_th of every layer over the epochs; entry 0 is the start."""
    rows = [
        {"epoch": epoch, "layer": layer.removesuffix(".1"), **values}
        for epoch, layers in enumerate(history)
        for layer, values in layers.items()
    ]
    for name, title in (("tau", "τ, time steps"), ("v_threshold", "V_th")) if rows else ():
        finite = pd.DataFrame(rows).replace(np.inf, np.nan)
        shades = px.colors.sample_colorscale("Turbo", np.linspace(0.1, 0.9, len(history[0])))
        options = {"color": "layer", "color_discrete_sequence": shades, "title": title}
        yield lines(finite, "epoch", name, max(300, 100 + 20 * len(history[0])), **options)


def raster(layers: Mapping[str, Tensor]) -> Iterator[str]:
    """Spikes ``[T, n]`` of each layer: a row for each of some neurons, a gap between the layers."""
    rows: list[Tensor] = []
    ticks, steps = {}, 0
    for name, spikes in layers.items():
        steps, n = spikes.shape
        picked = spikes[:, torch.linspace(0, n - 1, min(n, NEURONS)).int()].T
        ticks[name] = sum(len(row) for row in rows) + len(picked) / 2
        rows += [picked, torch.full((2, steps), torch.nan)]
    if rows:
        figure = px.imshow(
            torch.cat(rows).numpy(),
            x=np.arange(1, steps + 1),
            aspect="auto",
            color_continuous_scale=["rgba(128,128,128,0.15)", "#e4572e"],
            labels={"x": "time step", "y": "neuron", "color": "spike"},
            title=f"spikes of one image, {NEURONS} neurons a layer",
        )
        figure.update_xaxes(showgrid=False)
        figure.update_yaxes(showgrid=False, tickvals=[*ticks.values()], ticktext=[*ticks])
        yield finished(figure, 80 + 5 * sum(len(row) for row in rows), steps)


# ---- the page ----


def ranked_by(folders: Iterable[Path], names: Sequence[str]) -> str:
    """The figure that most of the runs were made for, of those there are."""
    objectives = Counter(Run(folder).config.get("objective") for folder in folders).most_common()
    return next((name for name, _ in objectives if name in names), names[0])


def page(
    runs: Mapping[Path, Metrics],
    left_out: Mapping[Path, str],
    best: int = 12,
    trust: Sequence[str] = (),
) -> str:
    """The HTML of the runs, and of what :func:`gather` left out; a closer look at the best."""
    table, keys = frame([*runs.values()])
    figure = ranked_by(runs, present(table, METRICS))
    low = METRICS[figure].less_is_better
    table = table.assign(folder=[*runs]).sort_values(figure, ascending=low, kind="stable")
    keys += ["seed"] if table["seed"].nunique() > 1 else []
    labels = [
        " ".join([f"{rank}.", *(f"{key.rpartition('.')[2]}={row[key]}" for key in keys)])
        for rank, row in enumerate(table.to_dict("records"), 1)
    ]
    colours = dict(zip(labels, cycle(px.colors.qualitative.Plotly), strict=False))

    epochs: list[dict[str, Any]] = []
    seen: dict[str, dict[str, Any]] = {}
    read = [*zip(labels, table["folder"], strict=True)]
    for label, folder in track(read, "Reading runs", transient=True):
        command = runs[folder]["command"]
        one: dict[str, Any] = {"folder": folder, "command": command, "parameters": [], "raster": []}
        seen[label] = one
        try:
            states = read_checkpoint(Run.find(folder).checkpoint).get("callbacks", {})
            kept = states.get(Pictures.__qualname__, {"epochs": [], "history": []})
            epochs += [
                {"run": label, "epoch": epoch, "stage": stage, "name": name, "value": value}
                for epoch, figures in enumerate(kept["epochs"], 1)
                for (stage, _, name), value in ((k.partition("/"), v) for k, v in figures.items())
            ]
            one["parameters"] = [*parameters(kept["history"])]
            if len(seen) <= best:
                one |= look(Run(folder), tuple(trust))
        except Exception as error:  # whatever is wrong with one run, the others are shown
            one["note"] = f"{type(error).__name__}: {error}"

    operations = pd.DataFrame([one.get("operations", {}) for one in seen.values()])
    table = table.reset_index(drop=True).join(operations)
    shown = present(table, COLUMNS)
    by_run = {"color": "run", "color_discrete_map": colours}
    sections = {
        "Learning curves": curves(epochs, by_run),
        "Swept values": heat_maps(table, keys, figure),
        "Firing and decoding": chain(rates(seen, by_run), attention(seen, by_run)),
    }
    return jinja2.Template(
        Path(__file__).with_name("report.html").read_text(encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).render(
        plotly=get_plotlyjs(),
        ranked_by=METRICS[figure].title,
        heads=[*keys, *(heading(n, table) if n in METRICS else COLUMNS[n].title for n in shown)],
        rows={
            label: [(row[key], row[key]) for key in keys]
            + [(row[n], COLUMNS[n].text(pd.Series([row[n]]))) for n in shown]
            for label, row in zip(labels, table.to_dict("records"), strict=True)
        },
        runs=seen,
        colours=colours,
        left_out=left_out,
        sections={
            title: [*parts] for title, parts in track(sections.items(), "Drawing", transient=True)
        },
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "sj-taid report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders that hold runs")
    parser.add_argument("--out", type=Path, help="by default report.html in the first folder")
    parser.add_argument("--best", type=int, default=12, help="how many to look at more closely")
    parser.add_argument("--trust", nargs="+", default=(), help="classes of your own that runs name")
    options = parser.parse_args(arguments)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # Triton is not there
    try:
        runs, left_out = gather(options.folders)
    except FileNotFoundError as error:
        parser.error(str(error))
    if not runs:
        parser.error("no finished run; one that is cut off goes on when its command is repeated")
    out = options.out or options.folders[0] / "report.html"
    html = page(runs, left_out, options.best, options.trust)
    try:
        with atomic_write(out) as whole:
            whole.write_text(html, encoding="utf-8")
    except OSError as error:
        parser.error(str(error))
    print(f"{len(runs)} runs are in {out}; left out: {len(left_out)}")
