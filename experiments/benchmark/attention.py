"""What image decoders weigh: the share of each time step, and what the weights depend on.

    python experiments/benchmark/attention.py RUN ... [--picture FILE]

adds to ``results/attention.csv`` a row per run of a generator, on reconstructions of test images:

- ``sum`` of an image's weights; ``differs``: the share of power of the decoder's input that is
  not the same at all steps;
- ``reconstruction``: the error as it is; ``_permuted``: with the steps in another order; ``_mean``:
  with each step's weight averaged over images and pixels; ``_equal``: over steps, too;
- ``follows_step``, ``follows_content``: the weights of permuted steps, correlated over time with
  the weights before at the same step, and with those of the same content; means over permutations.

The picture shows the shares of each run with learned weights, per colour, and with the steps in
reverse order, next to the fixed decoder's.
"""

import argparse
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import write_csv
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F

from sj_taid import FixedDecoder
from sj_taid._context import seeded
from sj_taid.training.plot import save, time_shares
from sj_taid.training.process import reuse_freed_memory
from sj_taid.training.run import Run, build_data

RESULT = Path(__file__).resolve().parents[2] / "results" / "attention.csv"
COLOURS = ("tab:red", "tab:green", "tab:blue")
PERMUTATIONS = 10


def main(arguments: Sequence[str] | None = None, result: Path = RESULT) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="of a generator")
    parser.add_argument("--images", type=int, default=1000, help="of the test set")
    parser.add_argument("--picture", type=Path, help="PNG of the shares")
    options = parser.parse_args(arguments)
    reuse_freed_memory()
    rows, shares = [], {}
    for run in map(Run.find, options.runs):
        images = load_images(run, options.images)
        decoder, image_seq = decode(run.model(), images)
        rows.append(describe(run) | measure(decoder, image_seq, images))
        if rows[-1]["decoder"] != "fixed":
            title = "{model}, {decoder}, {neuron}\n{dataset}, {epochs} epochs, seed {seed}"
            title = title.format(**rows[-1])
            shares[title] = [share(decoder, x_seq) for x_seq in (image_seq, image_seq.flip(0))]
    write_csv(pd.DataFrame(rows), result, keys=["trained_by"])
    if options.picture:
        draw(shares, options.picture)


def load_images(run: Run, n: int) -> Tensor:
    """The first ``n`` test images of a run's data."""
    data = build_data(OmegaConf.create({"dataset": run.config.dataset}))
    batches = islice(data.test_dataloader(), -(-n // data.batch_size))
    return torch.cat([image for image, _ in batches])[:n]


def describe(run: Run) -> dict[str, Any]:
    """A run's choices, command, commit, seed and epochs, without its paths."""
    words = run.metrics["command"].split()
    command = " ".join(word for word in words if not re.search(r"root=|run\.dir=", word))
    chosen = {k: run.metrics["choices"][k] for k in ("model", "decoder", "neuron", "dataset")}
    trained = {"trained_by": command, "trained_at": run.metrics["commit"], "seed": run.config.seed}
    return chosen | trained | {"epochs": run.metrics["epochs"]}


@seeded(0)
@torch.no_grad()
def decode(model: Any, images: Tensor) -> tuple[Any, Tensor]:
    """The image decoder of a generator and its input ``[T, N, C, H, W]`` for ``images``."""
    batches = images.split(100)
    parts = [model.decode_sequence(model.latent_spikes(batch)) for batch in batches]
    return model.image_decoder, torch.cat(parts, 1)


@torch.no_grad()
def measure(decoder: Any, image_seq: Tensor, images: Tensor) -> dict[str, float]:
    """A row's metrics, see the module."""
    T = len(image_seq)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(T, generator=generator) for _ in range(PERMUTATIONS)]
    weights = spread(decoder.attention(image_seq), image_seq)
    per_step = weights.mean(1, keepdim=True)
    errors, step, content = [], [], []
    for order in orders:
        permuted = image_seq[order]
        again = spread(decoder.attention(permuted), image_seq)
        errors.append(error(decoder(permuted), images))
        step.append(correlate(again, weights))
        content.append(correlate(again, weights[order]))
    mean = [sum(values) / PERMUTATIONS for values in (errors, step, content)]
    return {
        "sum": weights.sum(0).mean().item(),
        "differs": (image_seq.var(0, correction=0).mean() / image_seq.square().mean()).item(),
        "reconstruction": error(decoder(image_seq), images),
        "reconstruction_permuted": mean[0],
        "reconstruction_mean": error(weigh(per_step, image_seq), images),
        "reconstruction_equal": error(weigh(per_step.mean(0, keepdim=True), image_seq), images),
        "follows_step": mean[1],
        "follows_content": mean[2],
    }


def spread(weights: Tensor, image_seq: Tensor) -> Tensor:
    """Weights ``[T, N, C]``, averaged over pixels where each has its own."""
    weights = weights.flatten(3).mean(3) if weights.dim() == 5 else weights
    return weights.expand(image_seq.shape[:3])


def weigh(weights: Tensor, image_seq: Tensor) -> Tensor:
    return (weights[..., None, None] * image_seq).sum(0)


def error(output: Tensor, images: Tensor) -> float:
    """The mean squared error of images before tanh."""
    return F.mse_loss(output.tanh(), images).item()


def correlate(a: Tensor, b: Tensor) -> float:
    """The correlation over time and channels of weights' means over images."""
    a, b = (x.mean(1) - x.mean((0, 1)) for x in (a, b))
    return F.cosine_similarity(a.flatten(), b.flatten(), 0).item()


@torch.no_grad()
def share(decoder: Any, x_seq: Tensor) -> Tensor:
    """The mean share of each step and channel, ``[T, C]``."""
    return time_shares(spread(decoder.attention(x_seq), x_seq)).mean(1)


def draw(shares: dict[str, list[Tensor]], path: Path) -> None:
    """A plot per run: as it is, with the steps in reverse order, and the fixed decoder's."""
    figure = Figure((3.2 * len(shares), 3.3), layout="constrained")
    axes = figure.subplots(1, len(shares), sharey=True, squeeze=False)[0]
    for axis, (title, pair) in zip(axes, shares.items(), strict=True):
        T = len(pair[0])
        steps = range(1, T + 1)
        colours = COLOURS if pair[0].shape[1] > 1 else ("tab:orange",)
        for values, style in zip(pair, ("-o", ":"), strict=True):
            for channel, colour in zip(values.T, colours, strict=True):
                axis.plot(steps, channel, style, color=colour, markersize=3)
        fixed = time_shares(FixedDecoder(T).attention(torch.ones(T, 1, 1)))
        axis.plot(steps, fixed.flatten(), "k--", linewidth=1)
        axis.set(title=title, xlabel="time step t")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel=r"share of the image, $a[t] / \sum a$")
    axes[0].set_ylim(bottom=0)
    styles = {"learned": "o-k", "learned, steps in reverse": ":k", "fixed decoder": "--k"}
    lines = [axes[0].plot([], [], style, markersize=3)[0] for style in styles.values()]
    figure.legend(lines, styles, loc="outside lower center", ncols=3)
    save(figure, path)


if __name__ == "__main__":
    main()
