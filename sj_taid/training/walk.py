"""``sj-taid walk``: draw images on the way from one test image to another."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from .._checks import check, check_sizes, integer
from .plot import draw_grid
from .run import Run, build_data
from .sample import check_output

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Draw ``cfg.n`` walks of the model in ``cfg.checkpoint``, between random test images."""
    check_output(cfg.output)
    check_sizes(n=cfg.n)
    check(integer(2), steps=cfg.steps)
    check(integer(0), seed=cfg.seed)
    run = Run.find(cfg.checkpoint)
    model: Any = run.model(cfg.trust)
    if not hasattr(model, "walk"):
        raise ValueError(f"a walk needs model=esvae, but this is a {type(model).__name__}")
    config = run.config
    config.dataset.update({key: value for key, value in cfg.dataset.items() if value is not None})
    data = build_data(config, cfg.trust, num_workers=0, batch_size=2 * cfg.n)
    torch.manual_seed(cfg.seed)
    drawn = torch.randperm(len(data.test_set))[: 2 * cfg.n]
    data.test_set = data.test_set.subset(drawn.tolist())
    images, _ = next(iter(data.test_dataloader()))
    walks = [model.walk(a, b, cfg.steps) for a, b in zip(images[::2], images[1::2], strict=False)]
    path = Path(cfg.output or run.folder / f"walk-seed{cfg.seed}.png")
    draw_grid(torch.cat(walks), path, cfg.steps)
    log.info("The walks are in %s", path)
