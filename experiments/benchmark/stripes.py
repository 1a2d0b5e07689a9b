"""Stripes in images of generators, by the spectrum of columns and rows.

    python experiments/benchmark/stripes.py RUN ...

adds to ``results/stripes.csv`` three rows per run, of test images, of their reconstructions and of
samples: ``columns`` is the power of the finest frequency across columns, which stripes of one pixel
have, over the mean of the next three; ``rows`` likewise.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from attention import describe, load_images
from common import write_csv
from torch import Tensor

from sj_taid._context import seeded
from sj_taid.training.process import reuse_freed_memory
from sj_taid.training.run import Run

RESULT = Path(__file__).resolve().parents[2] / "results" / "stripes.csv"


def main(arguments: Sequence[str] | None = None, result: Path = RESULT) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="of a generator")
    parser.add_argument("--images", type=int, default=1000, help="of each kind")
    options = parser.parse_args(arguments)
    reuse_freed_memory()
    rows = [row for run in map(Run.find, options.runs) for row in measure(run, options.images)]
    write_csv(pd.DataFrame(rows), result, keys=["trained_by", "trained_at", "images"])


@seeded(0)
@torch.no_grad()
def measure(run: Run, n: int) -> list[dict[str, Any]]:
    """A row for each kind of image."""
    model: Any = run.model()
    test = load_images(run, n)
    made = torch.cat([model(batch).image for batch in test.split(100)])
    samples = torch.cat([model.sample(len(batch)) for batch in test.split(100)])
    return [
        describe(run) | {"images": name, "columns": stripes(images), "rows": stripes(images.mT)}
        for name, images in {"test": test, "reconstructions": made, "samples": samples}.items()
    ]


def stripes(images: Tensor) -> float:
    """The power of the finest frequency across columns over the mean of the next three."""
    power = torch.fft.rfft(images).abs().square().mean((0, 1, 2))
    return (power[-1] / power[-4:-1].mean()).item()


if __name__ == "__main__":
    main()
