"""``sj-taid walk``: draw images on the way from one test image to another."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from omegaconf import DictConfig

from .._checks import check, integer
from .plot import draw_grid
from .run import build_data
from .sample import load

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Draw ``cfg.n`` walks of the model in ``cfg.checkpoint``, between random test images."""
    check(integer(2), steps=cfg.steps)
    run, model = load(cfg, "walk", "model=esvae")
    config = run.config
    config.trust = cfg.trust
    config.dataset.update({key: value for key, value in cfg.dataset.items() if value is not None})
    data = build_data(config, num_workers=0, batch_size=2 * cfg.n)
    drawn = torch.randperm(len(data.test_set))[: 2 * cfg.n]
    data.test_set = data.test_set.subset(drawn.tolist())
    images, _ = next(iter(data.test_dataloader()))
    walks = [model.walk(a, b, cfg.steps) for a, b in zip(images[::2], images[1::2], strict=False)]
    path = Path(cfg.output or run.folder / f"walk-seed{cfg.seed}.png")
    draw_grid(torch.cat(walks), path, cfg.steps)
    log.info("The walks are in %s", path)
