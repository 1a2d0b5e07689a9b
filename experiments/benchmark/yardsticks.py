"""FAD as published of images that no model drew, to interpret the FAD of samples.

    python experiments/benchmark/yardsticks.py --root data --published FOLDER

writes ``results/yardsticks.csv``: for MNIST and Fashion-MNIST the distance of the test images
themselves, of as many training images in two ways, and of test images blurred.
"""

import argparse
from pathlib import Path

import torch
from common import write_csv
from hydra.utils import instantiate
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from sj_taid.metric import PublishedFrechetAutoencoderDistance
from sj_taid.training.config import compose
from sj_taid.training.evaluation import PUBLISHED

RESULT = Path(__file__).resolve().parents[2] / "results" / "yardsticks.csv"


def distance(images: Tensor, published: Path, name: str) -> float:
    """FAD of all images, in the papers' batches."""
    fad = PublishedFrechetAutoencoderDistance(published, name)
    for batch in images.split(fad.batch_size):
        fad.update(batch, real=False)
    return fad.compute().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default="data", help="holds mnist, fashion_mnist")
    parser.add_argument("--published", type=Path, required=True, help="the papers' autoencoders")
    options = parser.parse_args()
    rows = []
    for dataset, name in PUBLISHED.items():
        cfg = compose("train", [f"dataset={dataset}"]).dataset
        data = instantiate(cfg, root=options.root / dataset, batch_size=10**6)
        data.setup()
        loaders = data.test_dataloader(), data.train_samples()
        (test, _), (training, _) = (next(iter(loader)) for loader in loaders)
        drawn = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
        sets = {
            "test images": test,
            "training images, drawn at random": training[drawn[: len(test)]],
            "every sixth training image": training[::6],
            "test images blurred, sigma 0.7 pixels": gaussian_blur(test, [7, 7], [0.7, 0.7]),
            "test images blurred, sigma 1 pixels": gaussian_blur(test, [7, 7], [1.0, 1.0]),
        }
        for images, values in sets.items():
            value = distance(values, options.published, name)
            row = {"dataset": dataset, "images": images, "fad_published": value}
            # The mean absolute difference of neighbours in a row.
            rows.append(row | {"gradient": values.diff(dim=-1).abs().mean().item()})
    write_csv(rows, RESULT)


if __name__ == "__main__":
    main()
