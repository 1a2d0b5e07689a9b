"""Draw samples from a trained model: ``python experiments/sample.py checkpoint=RUN``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

# The checkout's root, so that this file runs as a script from anywhere.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import run
from experiments.pictures import draw_grid

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="../conf", config_name="sample")
def main(cfg: DictConfig) -> None:
    for name in ("n", "columns"):
        if cfg[name] < 1:
            raise ValueError(f"{name} must be at least 1, but it is {cfg[name]}")
    model, _ = run.load_model(cfg.checkpoint)
    if not hasattr(model, "sample"):
        raise ValueError(
            f"{cfg.checkpoint} holds a {type(model).__name__}, which draws nothing; "
            "give a checkpoint of task=generation"
        )
    torch.manual_seed(cfg.seed)
    images = model.sample(cfg.n)
    folder = run.find_checkpoint(cfg.checkpoint).parents[1]
    path = Path(cfg.output or folder / f"samples-seed{cfg.seed}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(images, path, cfg.columns, "Samples from the prior")
    log.info("%d samples are in %s", cfg.n, path)


if __name__ == "__main__":
    main()
