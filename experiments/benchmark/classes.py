"""Whether samples are of the class that is asked for, and how near each class is to test images.

    python experiments/benchmark/classes.py RUN ... --published FOLDER

adds rows to ``results/classes.csv``, for each class and for ``all``. ``read`` is the share of
images that a classifier, a small plain convolutional net trained on the training images, takes for
the class that was asked for. ``fad`` is FAD as published, of three draws of 5,120 images, of
classes by their shares; a class's is between its images of all draws and its test images, encoded
in the same batches of all classes.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from common import RESULTS, parser, write_csv
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import _compute_fid

from sj_taid._context import seeded
from sj_taid.data import ImageData
from sj_taid.data.samples import Samples
from sj_taid.metric.frechet import PublishedCodes
from sj_taid.training.evaluator import PUBLISHED
from sj_taid.training.process import reuse_freed_memory
from sj_taid.training.run import Run, build_data

BATCH, BATCHES, DRAWS = 256, 20, 3  # batches as the papers have them
EPOCHS = 4  # of the classifier
KEYS = ["dataset", "images", "fit_seed", "draw", "class"]


class Encoded(NamedTuple):
    """Codes of images, the classes asked for, and those that the classifier reads."""

    codes: Tensor
    asked: Tensor
    read: Tensor


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, device=False, out=RESULTS)
    add = options_parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="of an ESVAE whose flow knows classes")
    add("--published", type=Path, required=True, help="the papers' autoencoders")
    options = options_parser.parse_args(arguments)
    reuse_freed_memory()
    rows = [row for run in map(Run.find, options.runs) for row in measure(run, options.published)]
    write_csv(pd.DataFrame(rows), options.out / "classes.csv", keys=KEYS)


def describe(run: Run) -> dict[str, Any]:
    """A run's choices, command, commit, seed and epochs, without its paths."""
    words = run.metrics["command"].split()
    command = " ".join(word for word in words if not re.search(r"root=|run\.dir=", word))
    chosen = {k: run.metrics["choices"][k] for k in ("model", "decoder", "neuron", "dataset")}
    trained = {"trained_by": command, "trained_at": run.metrics["commit"], "seed": run.config.seed}
    return chosen | trained | {"epochs": run.metrics["epochs"]}


@seeded(0)
@torch.no_grad()
def measure(run: Run, published: Path) -> list[dict[str, Any]]:
    """A row for each kind of image, draw and class."""
    model: Any = run.model()
    data, classifier = load(OmegaConf.to_yaml(run.config.dataset))
    name = PUBLISHED[data.source]
    encoder = PublishedCodes(published / f"{name}_64.pth")
    with np.load(published / f"{name}_test_64.npz") as arrays:
        statistics = torch.tensor(arrays["mu"]), torch.tensor(arrays["sigma"])

    def encode(batches: Iterator[tuple[Tensor, Tensor]], n: int) -> Encoded:
        found = [(encoder(x), label, classifier(x).argmax(1)) for x, label in islice(batches, n)]
        return Encoded(*map(torch.cat, zip(*found, strict=True)))

    real = encode(shuffle(data, data.test_set), len(data.test_set) // BATCH)
    names = data.class_names
    rows = [r | {"images": "test images"} for r in compare([real], real, statistics, names)]
    kinds = {
        "training images": shuffle(data, data.train_set),
        "reconstructions": (
            (model.reconstruct(x), label) for x, label in shuffle(data, data.test_set)
        ),
        "samples": sample(model),
    }
    for images, batches in kinds.items():
        draws = [encode(batches, BATCHES) for _ in range(DRAWS)]
        rows += [row | {"images": images} for row in compare(draws, real, statistics, names)]
    fit = run.metrics.get("prior_fitted", run.metrics)
    return [describe(run) | {"fit_seed": fit["seed"]} | row for row in rows]


@cache
def load(dataset: str) -> tuple[Any, nn.Module]:
    """A run's data, and a classifier that is trained on them."""
    data = build_data(OmegaConf.create({"dataset": OmegaConf.create(dataset)}))
    with seeded(0), torch.enable_grad():
        return data, train_classifier(data)


def train_classifier(data: ImageData) -> nn.Module:
    """A plain convolutional net, trained on the training images."""
    widths = data.channels, 32, 64, 64
    blocks = (
        (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
        for a, b in pairwise(widths)
    )
    size = widths[-1] * (data.image_size // 8) ** 2
    layers = [layer for block in blocks for layer in block]
    classes = len(data.class_names)
    net = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(size, classes))
    steps = EPOCHS * (len(data.train_set) // BATCH)
    batches = shuffle(data, data.train_set)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for x, label in islice(batches, steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), label).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def shuffle(data: Any, samples: Samples) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of samples and their classes, in random order, without end."""
    data = data.without_augmentation()
    data.train_set, data.batch_size = samples, BATCH
    while True:
        yield from data.train_dataloader()


def sample(model: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of samples and the classes asked for, by their shares."""
    while True:
        index = torch.multinomial(model.flow.shares.float(), BATCH, replacement=True)
        asked = model.flow.labels[index]
        yield model.sample(BATCH, label=asked), asked


def compare(
    draws: Sequence[Encoded],
    real: Encoded,
    statistics: tuple[Tensor, Tensor],
    names: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """A row for all images of each draw, and for the images of each class of all draws."""
    for number, one in enumerate(draws):
        yield row_of(one, statistics) | {"draw": str(number), "class": "all"}
    whole = Encoded(*map(torch.cat, zip(*draws, strict=True)))
    for label in whole.asked.unique().tolist():
        of_class = Encoded(*(part[whole.asked == label] for part in whole))
        of_real = moments(real.codes[real.asked == label])
        yield row_of(of_class, of_real) | {"draw": "all", "class": names[label]}


def row_of(images: Encoded, real: tuple[Tensor, Tensor]) -> dict[str, Any]:
    read = (images.asked == images.read).double().mean().item()
    fad = _compute_fid(*real, *moments(images.codes)).item()
    return {"n": len(images.codes), "read": read, "fad": fad}


def moments(codes: Tensor) -> tuple[Tensor, Tensor]:
    codes = codes.double()
    return codes.mean(0), codes.T.cov()


if __name__ == "__main__":
    main()
