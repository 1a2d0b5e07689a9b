"""FAD as published of models of the package, as of several commits, from halves of the test images.

    python experiments/benchmark/halves.py NAME COMMIT ... --root DATA --published FOLDER

writes ``halves.csv``: three draws of each model and of training images in the place of samples. The
halves, ``A`` and ``B``, hold the classes in their proportions; ``all`` is FAD as published. A model
that is chosen by one half can be judged by the other.
"""

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import parser, write_csv
from torch import Tensor

from sj_taid._internal.context import seeded
from sj_taid.data.image import Torchvision
from sj_taid.data.samples import Samples
from sj_taid.metric import FrechetDistance, PublishedFrechetAutoencoderDistance
from sj_taid.metric.frechet import PublishedCodes
from sj_taid.pretrained import CONFIG, WEIGHTS, create_model, list_models
from sj_taid.training.evaluator import PUBLISHED

SOURCES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
#: batches as the papers have them
SIZE, BATCHES = 256, 20
DRAWS = 3
KEYS = ["model", "of", "draw", "images"]


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, device=False)
    add = options_parser.add_argument
    add("name", choices=list_models())
    add("commits", nargs="+", metavar="COMMIT", help="that shipped a model of this name")
    add("--root", type=Path, required=True, help="the folder of torchvision's data set")
    add("--published", type=Path, required=True, help="the papers' autoencoders")
    options = options_parser.parse_args(arguments)
    models = {commit: shipped(options.name, commit) for commit in options.commits}
    dataset = models[options.commits[0]][1]["choices"]["dataset"]
    shape: dict[str, Any] = {"channels": 1, "image_size": 32, "batch_size": SIZE, "classes": 10}
    data = Torchvision(name=dataset, source=SOURCES[dataset], root=options.root, **shape)
    data.setup()
    sources: dict[str, Callable[[int], Tensor]] = {c: m.sample for c, (m, _) in models.items()}
    training = forever(data, data.train_set)
    sources["training images"] = lambda n: next(training)
    metrics = distances(data, options.published)
    rows = [
        {"model": options.name, "dataset": dataset, "of": of, "draw": draw, **row}
        for of, sample in sources.items()
        for draw in range(DRAWS)
        for row in measure(metrics, sample, draw)
    ]
    write_csv(pd.DataFrame(rows), options.out / "halves.csv", keys=KEYS)


def shipped(name: str, commit: str) -> tuple[Any, dict[str, Any]]:
    """A model of the package as of a commit, and the metrics of its card."""
    with tempfile.TemporaryDirectory() as folder:
        for file in (CONFIG, WEIGHTS):
            command = ["git", "show", f"{commit}:sj_taid/pretrained/{name}/{file}"]
            Path(folder, file).write_bytes(subprocess.check_output(command))
        config = json.loads(Path(folder, CONFIG).read_bytes())
        config["model"]["image_decoder"].pop("kernel_size", None)  # an option that is gone
        Path(folder, CONFIG).write_text(json.dumps(config))
        return create_model(folder, pretrained=True), config["metrics"]


def forever(data: Torchvision, samples: Samples) -> Iterator[Tensor]:
    """Batches of images in random order, without end."""
    while True:
        for images, _ in data.loader(samples, shuffle=True, drop_last=True):
            yield images


@seeded(0)
def distances(data: Torchvision, published: Path) -> dict[str, FrechetDistance]:
    """Metrics that compare with each half of the test images, and with all as published."""
    name = PUBLISHED[data.source]
    codes = PublishedCodes(published / f"{name}_64.pth")
    metrics: dict[str, FrechetDistance] = {}
    metrics["all"] = PublishedFrechetAutoencoderDistance(published, name)
    halves = data.test_set.draw(len(data.test_set) // 2, seed=0)
    for half, samples in zip("AB", halves, strict=True):
        metrics[half] = FrechetDistance(codes, reset_real_features=False)
        for images in islice(forever(data, samples), len(samples) // data.batch_size):
            metrics[half].update(images, real=True)
    return metrics


def measure(
    metrics: dict[str, FrechetDistance], sample: Callable[[int], Tensor], draw: int
) -> Iterator[dict[str, Any]]:
    """A row for each metric of one draw of samples."""
    for metric in metrics.values():
        metric.reset()
    with seeded(draw), torch.no_grad():
        for _ in range(BATCHES):
            images = sample(SIZE)
            for metric in metrics.values():
                metric.update(images, real=False)
    for name, metric in metrics.items():
        n = {"samples": SIZE * BATCHES, "test_images": int(metric.real_features_num_samples)}
        yield {"images": name, **n, "fad": metric.compute().item()}


if __name__ == "__main__":
    main()
