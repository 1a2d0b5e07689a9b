"""Pictures of images, parameters, attention and curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.utilities.plot import plot_confusion_matrix
from torchvision.utils import make_grid, save_image

from ..layer import FixedDecoder
from .files import atomic_write

#: of figures
DPI = 130
#: what the curves of these names are
MEANINGS = {
    "reconstruction": "mean squared error of images",
    "latent": "distance of latents from the prior's",
    "gradient": "weighted error of edges",
    "chroma": "weighted error of colour",
    "features": "weighted error of features",
    "accuracy": "share of correct classes",
}


def draw_grid(images: Tensor, path: Path, columns: int, names: Sequence[str] = ()) -> None:
    """Draw a grid of images ``[n, C, H, W]`` in [-1, 1], row by row, about 1000 pixels wide.

    ``names`` stand at the left of the rows.
    """
    columns = min(columns, len(images))
    factor = max(1, round(1000 / (columns * images.shape[-1])))
    enlarged = F.interpolate(images, scale_factor=factor)
    options = {"padding": 4, "normalize": True, "value_range": (-1, 1), "pad_value": 1}
    grid = make_grid(enlarged, nrow=columns, **options)
    if not names:
        with atomic_write(path) as temporary:
            save_image(grid, temporary, format="png")
        return
    height, width = grid.shape[1:]
    figure = Figure((width / DPI, height / DPI))
    axis = figure.add_axes((0, 0, 1, 1), frameon=False)
    axis.imshow(grid.permute(1, 2, 0).cpu(), interpolation="none")
    row = (height - 4) / len(names)
    axis.set_yticks([2 + (n + 0.5) * row for n in range(len(names))], names)
    axis.tick_params(left=False, bottom=False, labelbottom=False)
    save(figure, path, bbox_inches="tight", pad_inches=0.05)


def draw_classes(
    model: Any, labels: Sequence[int], path: Path, columns: int, names: Sequence[str] = ()
) -> None:
    """Draw a row of samples for each class of ``labels``, with its name or else its number."""
    each = [label for label in labels for _ in range(columns)]
    titles = [names[label] if names else str(label) for label in labels]
    draw_grid(model.sample(len(each), label=each), path, columns, titles)


def draw_pairs(
    images: Tensor, others: Tensor, path: Path, columns: int, names: tuple[str, str]
) -> None:
    """Draw rows of images, each above a row of the others; ``names`` say what the two are."""
    columns = min(columns, len(images))
    blank = images.new_ones(-len(images) % columns, *images.shape[1:])  # white
    first, second = (torch.cat([part, blank]).split(columns) for part in (images, others))
    rows = [row for pair in zip(first, second, strict=True) for row in pair]
    draw_grid(torch.cat(rows), path, columns, names * len(first))


def draw_parameters(history: list[dict[str, float]], path: Path) -> None:
    """Draw tau and V_th of every layer over the epochs; entry 0 is the start."""
    table = pd.DataFrame(history)
    figure = Figure((11, 4.2), layout="tight")
    axes = figure.subplots(1, 2)
    for axis, name, label in (
        (axes[0], "tau/", r"membrane time constant $\tau$ (time steps)"),
        (axes[1], "v_threshold/", r"threshold $V_{th}$ (dimensionless)"),
    ):
        layers = table.filter(regex=f"^{name}")
        axis.set_prop_cycle(color=colormaps["viridis"](np.linspace(0, 0.95, layers.shape[1])))
        axis.plot(layers, label=layers.columns.str.removeprefix(name))
        _label(axis, "epoch", label)
    axes[1].legend(
        fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5), title="layer", frameon=False
    )
    figure.suptitle("What the neurons learned")
    save(figure, path)


def draw_attention(attention: Tensor, path: Path) -> None:
    """Draw each time step's share of an image decoder's weights, next to the fixed decoder's.

    They are ``[T, N, C]`` or, averaged over the pixels first, ``[T, N, C, H, W]``.
    """
    weights = attention.flatten(3).mean(3) if attention.dim() == 5 else attention
    shares = (weights / weights.sum(0)).detach().cpu().numpy()
    T, _, channels = shares.shape
    steps = np.arange(1, T + 1)
    figure = Figure((6.4, 4), layout="tight")
    axis = figure.subplots()
    for channel in range(channels):
        label = "this decoder" + (f", channel {channel}" if channels > 1 else "")
        share = shares[:, :, channel]
        (line,) = axis.plot(steps, share.mean(1), marker="o", markersize=3, label=label)
        low, high = np.quantile(share, [0.1, 0.9], axis=1)
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
    fixed = FixedDecoder(T).attention(torch.ones(T, 1, 1)).flatten().numpy()
    axis.plot(steps, fixed / fixed.sum(), "k--", linewidth=1, label=r"fixed, $0.8^{T-t}$")
    _label(axis, "time step t", r"share of the image, $a[t] / \sum a$")
    axis.set_ylim(bottom=0)
    axis.set_title("What each time step adds (mean and 10-90 % of test images)", fontsize=10)
    axis.legend(fontsize=8)
    save(figure, path)


def draw_curves(epochs: list[dict[str, float]], path: Path, validated_on: str) -> None:
    """Draw metrics over the epochs: ``train/<name>`` and ``val/<name>`` in one plot per name."""
    table = pd.DataFrame(epochs, index=range(1, len(epochs) + 1))
    names = list(dict.fromkeys(key.split("/")[1] for key in table))
    figure = Figure((5.2 * len(names), 4), layout="tight")
    axes = figure.subplots(1, len(names), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for stage, label in (("train", "training"), ("val", validated_on)):
            if f"{stage}/{name}" in table:
                curve = table[f"{stage}/{name}"].dropna()
                axis.plot(curve, marker="o", markersize=3, label=label)
        _label(axis, "epoch", ": ".join(filter(None, (name, MEANINGS.get(name)))))
        axis.legend(fontsize=8)
    save(figure, path)


def draw_confusion(counts: Tensor, names: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix: rows are true classes, columns predicted ones."""
    few = len(counts) <= 40  # of more, the counts are colours alone
    size = 1 + 0.6 * min(len(counts), 40)
    figure = Figure((size, size))
    labels = [*(names or map(str, range(len(counts))))]
    plot_confusion_matrix(counts, figure.subplots(), add_text=few, labels=labels, cmap="Blues")
    save(figure, path, bbox_inches="tight")  # as large as the names need


def _label(axis: Axes, x: str, y: str) -> None:
    """Label the axes; the horizontal one has whole numbers, none beyond the curves."""
    axis.set(xlabel=x, ylabel=y)
    first, last = axis.dataLim.intervalx
    ticks = MaxNLocator(integer=True).tick_values(first, last)
    axis.set_xticks([tick for tick in ticks if first <= tick <= last])
    axis.grid(alpha=0.3)


def save(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure as PNG, atomically; ``options`` are the options of ``savefig``."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png", **options)
