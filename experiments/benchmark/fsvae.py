"""FSVAE on the CPU: a training step and sampling, ours against SpikingJelly's PLIF and prefixes.

    python experiments/benchmark/fsvae.py --out results/

The rival is the same model with SpikingJelly's PLIF neurons, each prefix run anew when the latent
spikes are sampled, as the original does. Between the two stand the mixed models, so that one sees
what the neuron buys and what the stepping does. Then where the time goes, and how it grows with
T and with the batch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from experiments.benchmark.measure import Timing, interleaved, slope, write_csv
from sj_taid.model import FSVAE
from sj_taid.model.fsvae import original_neuron
from sj_taid.model.latent import pick
from sj_taid.training.allocator import reuse_freed_memory
from sj_taid.training.plot import plt, save

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


def make(name: str, options: argparse.Namespace, T: int | None = None) -> FSVAE:
    torch.manual_seed(0)
    node, presampling = MODELS[name]
    model = FSVAE(
        options.channels, options.size, T or options.T, neuron=node, presampling=presampling
    )
    return model.to(memory_format=torch.channels_last) if options.channels_last else model


def train_step(model: FSVAE, image: Tensor, precision: torch.dtype = torch.float32) -> None:
    model.zero_grad()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        loss = model.loss(image, model(image, 0.2))["loss"]
    loss.backward()


@torch.no_grad()
def sample(model: FSVAE, n: int) -> Tensor:
    """As the model does, or with every prefix run anew, as the original does."""
    if model.posterior.presampling == "step":
        return model.sample(n)
    model.eval()
    index = torch.randint(model.k, (model.T, n, model.latent_channels))
    previous = torch.zeros(1, n, model.latent_channels)
    for t in range(model.T):
        z = pick(model.prior.run(previous)[-1], index[t])
        previous = torch.cat([previous, z.unsqueeze(0)])
    image = model.decode(previous[1:])
    model.train()
    return image


def images(options: argparse.Namespace, batch: int | None = None) -> Tensor:
    shape = (batch or options.batch, options.channels, options.size, options.size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def works(options: argparse.Namespace) -> dict[str, Callable[[FSVAE], object]]:
    """What is timed, by name."""
    image = images(options)
    return {
        "training step": lambda model: train_step(model, image),
        "sampling": lambda model: sample(model, options.batch),
    }


def compare(options: argparse.Namespace) -> list[dict[str, object]]:
    models = {name: make(name, options) for name in MODELS}
    rows = []
    for work, function in works(options).items():
        timings = interleaved(
            {name: partial(function, model) for name, model in models.items()}, options.repeats
        )
        for name, timing in timings.items():
            ratio = timing.median / timings[RIVAL].median
            rows.append(_row(work, name, options.T, options.batch, timing) | {"ratio": ratio})
            print(f"{work:14} {name:34} {timing.median:8.1f} ms   {ratio:5.2f} x rival")
    return rows


def formats(options: argparse.Namespace) -> list[dict[str, object]]:
    """Our training step by the layout of images in memory and by precision."""

    steps = {}
    for layout, channels_last in (("channels first", False), ("channels last", True)):
        given = argparse.Namespace(**{**vars(options), "channels_last": channels_last})
        for precision in (torch.float32, torch.bfloat16):
            name = f"{layout}, {str(precision).removeprefix('torch.')}"
            steps[name] = partial(train_step, make(OURS, given), images(options), precision)
    timings = interleaved(steps, options.repeats)
    rows = []
    for name, timing in timings.items():
        ratio = timing.median / next(iter(timings.values())).median
        row = _row(f"training step, {name}", OURS, options.T, options.batch, timing)
        rows.append(row | {"ratio": ratio})
        print(f"{name:34} {timing.median:8.1f} ms   {ratio:5.2f} x the first")
    return rows


def breakdown(options: argparse.Namespace) -> list[dict[str, object]]:
    """Milliseconds of each work by kind of operator, by the profiler."""
    rows = []
    for work, function in works(options).items():
        for name in (OURS, RIVAL):
            model = make(name, options)
            function(model)
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                function(model)
            spent = dict.fromkeys((*KINDS, "other"), 0.0)
            for event in profiler.key_averages():
                names = (k for k, keys in KINDS.items() if any(s in event.key for s in keys))
                spent[next(names, "other")] += event.self_cpu_time_total / 1e3
            for kind, milliseconds in spent.items():
                share = milliseconds / sum(spent.values())
                rows.append({"work": f"{work}: {kind}", "model": name, "median_ms": milliseconds})
                print(f"{work:14} {name:34} {kind:14} {milliseconds:8.1f} ms   {share:5.0%}")
    return rows


def scaling(options: argparse.Namespace) -> list[dict[str, object]]:
    rows = []
    for name in (OURS, RIVAL):
        for axis in ("T", "batch"):
            steps, medians = {}, []
            for size in SIZES:
                T, batch = (size, options.batch) if axis == "T" else (options.T, size)
                model, image = make(name, options, T), images(options, batch)
                steps[str(size)] = partial(train_step, model, image)
            for size, timing in interleaved(steps, max(options.repeats // 2, 3)).items():
                T, batch = (int(size), options.batch) if axis == "T" else (options.T, int(size))
                rows.append(_row(f"scaling in {axis}", name, T, batch, timing))
                medians.append(timing.median)
            exponent = slope(SIZES, medians)
            rows.append({"work": f"exponent in {axis}", "model": name, "exponent": exponent})
            print(f"{name:34} cost ~ {axis}^{exponent:.2f}")
    return rows


def draw(rows: list[dict[str, object]], path: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.2))
    for axis, work in zip(axes, ("training step", "sampling"), strict=False):
        chosen = [row for row in rows if row["work"] == work]
        axis.barh([r["model"] for r in chosen], [r["median_ms"] for r in chosen], color="tab:blue")
        for i, row in enumerate(chosen):
            axis.text(row["median_ms"], i, f" {row['ratio']:.2f}x", va="center", fontsize=8)
        axis.margins(x=0.18)
        axis.invert_yaxis()
        axis.set_xlabel("ms (median)")
        axis.set_title(work)
        axis.tick_params(labelsize=8)
    axes[1].set_yticklabels([])
    left = dict.fromkeys((OURS, RIVAL), 0.0)
    for kind in (*KINDS, "other"):
        chosen = [row for row in rows if row["work"] == f"training step: {kind}"]
        names = [row["model"] for row in chosen]
        widths = [row["median_ms"] for row in chosen]
        axes[2].barh(names, widths, left=[left[name] for name in names], label=kind)
        for name, width in zip(names, widths, strict=True):
            left[name] += width
    axes[2].invert_yaxis()
    axes[2].set_yticks([0, 1], ["ours", "rival"])
    axes[2].set_xlabel("ms of one training step (profiled)")
    axes[2].set_title("where the time goes")
    axes[2].legend(fontsize=7)
    for name, color in ((OURS, "tab:blue"), (RIVAL, "tab:red")):
        for work, key, style in (("T", "T", "o-"), ("batch", "batch", "s--")):
            points = [r for r in rows if r["work"] == f"scaling in {work}" and r["model"] == name]
            exponent = next(
                r["exponent"]
                for r in rows
                if r["work"] == f"exponent in {work}" and r["model"] == name
            )
            label = f"{'ours' if name == OURS else 'rival'}: {work}^{exponent:.2f}"
            xs, ys = [p[key] for p in points], [p["median_ms"] for p in points]
            axes[3].loglog(xs, ys, style, color=color, label=label, markersize=4)
    axes[3].set_xticks(SIZES, SIZES)
    axes[3].tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes[3].set_xlabel("T, or batch")
    axes[3].set_ylabel("ms a training step")
    axes[3].set_title("growth")
    axes[3].legend(fontsize=7)
    axes[3].grid(alpha=0.3)
    figure.tight_layout()
    save(figure, path, dpi=120)


def _row(work: str, model: str, T: int, batch: int, timing: Timing) -> dict[str, object]:
    return {
        "work": work,
        "model": model,
        "T": T,
        "batch": batch,
        "median_ms": timing.median,
        "q20_ms": timing.low,
        "q80_ms": timing.high,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--T", type=int, default=16)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    reuse_freed_memory()

    rows = [*compare(options), *formats(options), *breakdown(options), *scaling(options)]
    write_csv(rows, options.out / "fsvae.csv")
    draw(rows, options.out / "fsvae.png")
    print(f"CSV and picture are in {options.out}")


if __name__ == "__main__":
    main()
