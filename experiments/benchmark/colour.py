"""Colour in reconstructions, and grids of dots.

    sj-taid train -m experiment=cifar10_esvae_cpu task=autoencoding model.subpixel=true,false ...
    python experiments/benchmark/colour.py RUN ...

writes ``results/colour.csv``: for each run the share of the test images' variance that their
reconstructions explain along grey, red-green and blue-yellow, and the power of the reconstructions
in a chessboard of single pixels, as a multiple of the images' own.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from common import describe_training, load_images, write_csv
from torch import Tensor

from sj_taid.training.allocator import reuse_freed_memory
from sj_taid.training.run import Run

RESULT = Path(__file__).resolve().parents[2] / "results" / "colour.csv"
#: orthogonal axes of red, green and blue
AXES = {"grey": (1.0, 1.0, 1.0), "red_green": (1.0, -1.0, 0.0), "blue_yellow": (1.0, 1.0, -2.0)}
CHOICES = ("subpixel", "chroma_weight", "T", "hidden_channels", "latent_channels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="of photographs")
    parser.add_argument("--images", type=int, default=1000, help="of the test set")
    options = parser.parse_args()
    reuse_freed_memory()
    write_csv([measure(Run.find(path), options.images) for path in options.runs], RESULT)


def measure(run: Run, n: int) -> dict[str, Any]:
    """A row: what was trained, and what its reconstructions of ``n`` test images lack."""
    images, model = load_images(run, n), run.model()
    with torch.no_grad():
        output = torch.cat([model(batch).image for batch in images.split(100)])
    row = {name: run.config.model[name] for name in CHOICES} | describe_training(run)
    row |= {"images": n, "reconstruction": (output - images).square().mean().item()}
    power = chessboard(output) / chessboard(images)
    return row | explained_variance(output, images) | {"grid": power}


def explained_variance(output: Tensor, images: Tensor) -> dict[str, float]:
    """The share of variance of ``images`` ``[N, 3, H, W]`` that ``output`` explains, per axis."""
    shares = {}
    for name, axis in AXES.items():
        expected, got = (
            torch.einsum("nchw,c->nhw", x, torch.tensor(axis)) for x in (images, output)
        )
        shares[name] = 1 - ((got - expected).square().mean() / expected.var()).item()
    return shares


def chessboard(images: Tensor) -> float:
    """The mean power of ``[N, C, H, W]`` in the pattern +1, -1, ... along both axes."""
    signs = (-1.0) ** torch.arange(images.shape[-1])
    return (images * signs * signs.view(-1, 1)).mean((2, 3)).square().mean().item()


if __name__ == "__main__":
    main()
