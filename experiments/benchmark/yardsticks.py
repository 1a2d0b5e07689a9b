"""FAD as published of images that no model drew, to know what a value means.

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
from sj_taid.training.composing import compose
from sj_taid.training.evaluation import PUBLISHED
from sj_taid.training.plot import mean_gradient

RESULT = Path(__file__).resolve().parents[2] / "results" / "yardsticks.csv"


def distance(images: Tensor, published: Path, name: str) -> float:
    """Of all images, in the papers' batches."""
    fad = PublishedFrechetAutoencoderDistance(published, name)
    for batch in images.split(fad.batch_size):
        fad.update(batch, real=False)
    return fad.compute().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--root", type=Path, default=Path("data"), help="holds mnist, fashion_mnist"
    )
    parser.add_argument("--published", type=Path, required=True, help="the papers' autoencoders")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    rows = []
    for dataset, name in PUBLISHED.items():
        cfg = compose("train", [f"dataset={dataset}"]).dataset
        data = instantiate(cfg, root=given.root / dataset, batch_size=10**6)
        data.setup()
        loaders = data.test_dataloader(), data.train_samples()
        (test, _), (training, _) = (next(iter(loader)) for loader in loaders)
        drawn = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
        sets = {
            "test images": test,
            "training images, drawn at random": training[drawn[: len(test)]],
            "every sixth training image": training[::6],
        }
        for sigma in (0.7, 1.0):
            blurred = gaussian_blur(test, [7, 7], [sigma, sigma])
            sets[f"test images blurred, sigma {sigma:g} pixels"] = blurred
        for images, values in sets.items():
            value = distance(values, given.published, name)
            row = {"dataset": dataset, "images": images, "fad_published": value}
            rows.append(row | {"gradient": mean_gradient(values)})
            print(f"{dataset}, {images}: {value:.2f}")
    write_csv(rows, given.out)


if __name__ == "__main__":
    main()
