"""FSVAE: a training step and sampling, ours against SpikingJelly's PLIF and prefixes.

    python -m sj_taid.benchmark.fsvae

writes ``fsvae.csv`` and ``fsvae.png``.

The rival is the same model with SpikingJelly's PLIF neurons, each prefix run anew when the latent
spikes are sampled, as the original does. Between the two stand the mixed models, so that one sees
what the neuron buys and what the stepping does. Then layouts and precisions, where the time goes
(on a CPU alone), and how it grows with T and with the batch; ``--parts`` leaves some of it out, and
the picture is drawn of all.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from spikingjelly.activation_based import neuron
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..model import FSVAE
from ..model.latent import pick
from ..model.spiking_vae import original_neuron
from ..training.allocator import reuse_freed_memory
from ..training.plot import save
from .common import conditions, interleaved, parser, write_csv

OURS, RIVAL = "ours", "SpikingJelly PLIF, prefixes"

plif = partial(neuron.ParametricLIFNode, **original_neuron.keywords)

#: name -> neuron, presampling
MODELS = {
    OURS: (original_neuron, "step"),
    "ALIF (torch backend), stepping": (partial(original_neuron, backend="torch"), "step"),
    "SpikingJelly PLIF, stepping": (plif, "step"),
    "ALIF, prefixes": (original_neuron, "prefix"),
    RIVAL: (plif, "prefix"),
}

#: T and batch for the fitted growth
SIZES = (4, 8, 16, 32)

#: kind of work -> what the profiler calls its operators
KINDS = {
    "convolution": ("convolution",),
    "linear": ("aten::addmm", "aten::mm", "aten::bmm"),
    "norm": ("batch_norm",),
    "fused neuron": ("sj_taid::",),
}


def make(name: str, options: argparse.Namespace) -> FSVAE:
    torch.manual_seed(0)
    node, presampling = MODELS[name]
    model = FSVAE(options.channels, options.size, options.T, neuron=node, presampling=presampling)
    if options.channels_last:  # torch declares no such overload
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(options.device)


def train_step(model: FSVAE, image: Tensor, precision: torch.dtype = torch.float32) -> None:
    model.zero_grad()
    with torch.autocast(image.device.type, precision, enabled=precision != torch.float32):
        loss = model.loss(image, model(image, 0.2))["loss"]
    loss.backward()


@torch.no_grad()
def sample(model: FSVAE, n: int) -> Tensor:
    """As the model does, or with every prefix run anew, as the original does."""
    if model.posterior.presampling == "step":
        return model.sample(n)
    model.eval()
    device = next(model.parameters()).device
    index = torch.randint(model.k, (model.T, n, model.latent_channels), device=device)
    previous = torch.zeros(1, n, model.latent_channels, device=device)
    for t in range(model.T):
        z = pick(model.prior.run(previous)[-1], index[t])
        previous = torch.cat([previous, z.unsqueeze(0)])
    image = model.decode(previous[1:])
    model.train()
    return image


def images(options: argparse.Namespace) -> Tensor:
    shape = (options.batch, options.channels, options.size, options.size)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return image.to(options.device)


def works(options: argparse.Namespace) -> dict[str, Callable[[FSVAE], object]]:
    """What is timed, by name."""
    image = images(options)
    return {
        "training step": lambda model: train_step(model, image),
        "sampling": lambda model: sample(model, options.batch),
    }


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    models = {name: make(name, options) for name in MODELS}
    rows = []
    for work, function in works(options).items():
        timings = interleaved(
            {name: partial(function, model) for name, model in models.items()},
            options.repeats,
            options.device,
        )
        for name, timing in timings.items():
            ratio = timing.median_ms / timings[RIVAL].median_ms
            rows.append(_case(work, name, options) | timing._asdict() | {"ratio": ratio})
    return rows


def formats(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Our training step by the layout of images in memory and by precision."""
    steps = {}
    for layout, channels_last in (("channels first", False), ("channels last", True)):
        given = argparse.Namespace(**{**vars(options), "channels_last": channels_last})
        for precision in (torch.float32, torch.bfloat16):
            name = f"{layout}, {str(precision).removeprefix('torch.')}"
            steps[name] = partial(train_step, make(OURS, given), images(options), precision)
    timings = interleaved(steps, options.repeats, options.device)
    first, *_ = timings.values()
    return [
        _case(f"training step, {name}", OURS, options)
        | timing._asdict()
        | {"ratio": timing.median_ms / first.median_ms}
        for name, timing in timings.items()
    ]


def breakdown(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of each work by kind of operator, by the profiler."""
    rows = []
    for work, function in works(options).items():
        for name in (OURS, RIVAL):
            rows += [
                {"work": f"{work}: {kind}", "model": name, "median_ms": milliseconds}
                for kind, milliseconds in by_kind(partial(function, make(name, options))).items()
            ]
    return rows


def by_kind(function: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of a second call by kind of operator, by the profiler."""
    function()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    spent = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in profiler.key_averages():
        names = (k for k, keys in KINDS.items() if any(s in event.key for s in keys))
        spent[next(names, "other")] += event.self_cpu_time_total / 1e3
    return spent


def scaling(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in (OURS, RIVAL):
        for axis in ("T", "batch"):
            cases = {
                str(size): argparse.Namespace(**{**vars(options), axis: size}) for size in SIZES
            }
            steps = {
                size: partial(train_step, make(name, case), images(case))
                for size, case in cases.items()
            }
            timings = interleaved(steps, max(options.repeats // 2, 3), options.device)
            rows += [
                _case(f"scaling in {axis}", name, cases[size]) | timing._asdict()
                for size, timing in timings.items()
            ]
            times = [timing.median_ms for timing in timings.values()]
            exponent, _ = np.polyfit(np.log(SIZES), np.log(times), 1)
            rows.append({"work": f"exponent in {axis}", "model": name, "exponent": exponent})
    return rows


def _case(work: str, model: str, options: argparse.Namespace) -> dict[str, Any]:
    case = {"work": work, "model": model, "T": options.T, "batch": options.batch}
    return case | conditions(options.device)


PARTS = {part.__name__: part for part in (compare, formats, breakdown, scaling)}


def draw(table: pd.DataFrame, path: Path) -> None:
    figure = Figure((17, 4.2), layout="constrained")
    axes = figure.subplots(1, 4)
    for axis, work in zip(axes, ("training step", "sampling"), strict=False):
        rows = table[table["work"] == work]
        bars = axis.barh("model", "median_ms", data=rows, color="tab:blue")
        axis.bar_label(bars, [f" {ratio:.2f}x" for ratio in rows["ratio"]], fontsize=8)
        axis.margins(x=0.18)
        axis.invert_yaxis()
        axis.set(xlabel="ms (median)", title=work)
        axis.tick_params(labelsize=8)
    axes[1].set_yticklabels([])
    left = 0.0
    for kind in (*KINDS, "other"):  # ours comes first
        widths = table[table["work"] == f"training step: {kind}"]["median_ms"].to_numpy()
        axes[2].barh(["ours", "rival"], widths, left=left, label=kind)
        left += widths
    axes[2].invert_yaxis()
    axes[2].set(xlabel="ms of one training step (profiled)", title="where the time goes")
    axes[2].legend(fontsize=7)
    cases = table.set_index(["work", "model"])
    for name, label, color in ((OURS, "ours", "tab:blue"), (RIVAL, "rival", "tab:red")):
        for work, style in (("T", "o-"), ("batch", "s--")):
            exponent = cases.loc[(f"exponent in {work}", name), "exponent"].item()
            points = cases.loc[[(f"scaling in {work}", name)]]
            title = f"{label}: {work}^{exponent:.2f}"
            axes[3].loglog(work, "median_ms", style, data=points, color=color, label=title, ms=4)
    axes[3].set_xticks(SIZES, SIZES)
    axes[3].tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes[3].set(xlabel="T, or batch", ylabel="ms per training step", title="growth")
    axes[3].legend(fontsize=7)
    axes[3].grid(alpha=0.3)
    save(figure, path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, repeats=10)
    for name, default in {"batch": 16, "T": 16, "channels": 3, "size": 32}.items():
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument("--parts", nargs="+", choices=PARTS, help="all; breakdown on a CPU alone")
    options = made.parse_args(arguments)
    on_cpu = options.device.type == "cpu"
    parts = [PARTS[name] for name in options.parts or PARTS]
    if options.parts is None and not on_cpu:
        parts.remove(breakdown)
    elif breakdown in parts and not on_cpu:
        made.error("breakdown is made for a CPU; leave it out on a GPU")
    torch.set_num_threads(options.threads)
    reuse_freed_memory()
    table = write_csv([row for part in parts for row in part(options)], options.out / "fsvae.csv")
    print(table.iloc[:, :9].to_string())
    if len(parts) == len(PARTS):
        draw(table, options.out / "fsvae.png")


if __name__ == "__main__":
    main()
