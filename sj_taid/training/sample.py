"""``sj-taid sample``: draw images from a trained model."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig

from .._checks import check, check_sizes, integer
from .plot import draw_classes, draw_grid
from .run import Run

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Draw ``cfg.n`` samples of the model in ``cfg.checkpoint``, or rows of its classes."""
    check_output(cfg.output)
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
    rows = isinstance(cfg.label, ListConfig) or cfg.label == "all"
    prior = f"{cfg.sample_from}-" if cfg.sample_from else ""
    label = "" if cfg.label is None else "rows-" if rows else f"label{cfg.label}-"
    path = Path(cfg.output or run.folder / f"samples-{prior}{label}seed{cfg.seed}.png")
    with model.draw_from(cfg.sample_from) if cfg.sample_from else nullcontext():
        if rows:
            labels = getattr(model, "labels", []) if cfg.label == "all" else [*cfg.label]
            draw_classes(model, labels, path, cfg.columns)
        else:
            asked = {} if cfg.label is None else {"label": cfg.label}
            draw_grid(model.sample(cfg.n, **asked), path, cfg.columns)
    log.info("The samples are in %s", path)


def check_output(output: str | None) -> None:
    """Refuse a file that is no picture: it may be of another kind."""
    if output and Path(output).suffix != ".png":
        raise ValueError(f"output must name a picture, such as samples.png, but it is {output}")
