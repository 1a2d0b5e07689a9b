"""``sj-taid sample``: draw images from a trained model."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from .._checks import check, check_sizes, integer
from .plot import draw_grid
from .run import Run

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Draw ``cfg.n`` samples of the model in ``cfg.checkpoint`` into a picture."""
    if cfg.output and Path(cfg.output).suffix != ".png":  # it may be a file of another kind
        raise ValueError(f"output must name a picture, such as samples.png, but it is {cfg.output}")
    check_sizes(n=cfg.n, columns=cfg.columns)
    check(integer(0), seed=cfg.seed)
    run = Run.find(cfg.checkpoint)
    model: Any = run.model(cfg.trust)
    if not hasattr(model, "sample"):
        raise ValueError(
            f"{cfg.checkpoint} holds a {type(model).__name__}, which draws nothing; "
            "give a checkpoint of task=generation"
        )
    if cfg.sample_from and not hasattr(model, "draw_from"):
        raise ValueError(f"sample_from is for model=esvae, but this is a {type(model).__name__}")
    torch.manual_seed(cfg.seed)
    with model.draw_from(cfg.sample_from) if cfg.sample_from else nullcontext():
        images = model.sample(cfg.n)
    prior = f"{cfg.sample_from}-" if cfg.sample_from else ""
    path = Path(cfg.output or run.folder / f"samples-{prior}seed{cfg.seed}.png")
    draw_grid(images, path, cfg.columns)
    log.info("%d samples are in %s", cfg.n, path)
