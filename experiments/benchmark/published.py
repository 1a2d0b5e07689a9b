"""How long the papers' trainings take on a CPU, estimated from a few steps of each.

    python experiments/benchmark/published.py --threads 1

writes ``published.csv``: for each command of ``results/published.csv`` the time of a training step
on random images of its size, and the core-hours of all epochs at that rate per image, without
loading, validation and metrics. The steps have ``--batch`` images, to be short.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import interleave, parser, training_step, write_csv
from hydra.utils import get_class

from sj_taid.training.allocator import reuse_freed_memory
from sj_taid.training.config import compose

PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "published.csv"


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, repeats=2, device=False)
    options_parser.add_argument("--batch", type=int, default=8, help="images in a step")
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    reuse_freed_memory()
    rows: list[dict[str, Any]] = []
    for recipe in pd.read_csv(PUBLISHED)["command"].dropna().unique():
        cfg = compose("train", recipe.split())
        timing = interleave({recipe: training_step(cfg, options.batch)}, options.repeats)[recipe]
        dataset: Any = get_class(cfg.dataset._target_)
        images = dataset.counts[0] * (1 - (cfg.dataset.validation or 0))
        ms_per_image = timing.median_ms / options.batch
        hours = ms_per_image * images * cfg.trainer.max_epochs / 3.6e6
        row = {"recipe": recipe, "batch": options.batch, "epochs": cfg.trainer.max_epochs}
        row |= timing._asdict() | {"ms_per_image": ms_per_image}
        rows.append(row | {"core_hours": hours * options.threads})
    print(write_csv(rows, options.out / "published.csv").iloc[:, :8].to_string())


if __name__ == "__main__":
    main()
