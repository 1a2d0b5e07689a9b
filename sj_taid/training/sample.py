"""``sj-taid sample`` and ``sj-taid walk``: draw images by a trained model."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from .._checks import check, check_sizes
from .config import CONF, RULES, refuse_unknown
from .plot import draw_classes, draw_grid
from .run import Run, build_data

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Draw ``cfg.n`` samples of the model in ``cfg.checkpoint``, or rows of its classes."""
    check_sizes(n=cfg.n, columns=cfg.columns)
    run, model = load(cfg, "sample", "task=generation")
    if cfg.sample_from and not hasattr(model, "draw_from"):
        raise ValueError(f"sample_from is for model=esvae, but this is a {type(model).__name__}")
    several = isinstance(cfg.label, ListConfig)
    prior = f"{cfg.sample_from}-" if cfg.sample_from else ""
    shown = "-".join(map(str, cfg.label)) if several else cfg.label
    label = "" if cfg.label is None else f"label{shown}-"
    path = Path(cfg.output or run.folder / f"samples-{prior}{label}seed{cfg.seed}.png")
    with model.draw_from(cfg.sample_from) if cfg.sample_from else nullcontext():
        labels = [] if cfg.label is None else find_labels(model, cfg.label)
        if several or cfg.label == "all":
            draw_classes(model, labels, path, cfg.columns)
        else:
            asked = {} if cfg.label is None else {"label": cfg.label}
            draw_grid(model.sample(cfg.n, **asked), path, cfg.columns)
    log.info("The samples are in %s", path)


def find_labels(model: Any, asked: Any) -> list[int]:
    """The classes that are asked for: one, a list of them or ``all``."""
    known: list[int] = getattr(model, "labels", [])  # without any the model says what it lacks
    labels = known if asked == "all" else [*asked] if isinstance(asked, ListConfig) else [asked]
    if known and not (labels and all(label in known for label in labels)):
        raise ValueError(f"label must be one of {known}, a list of them, or all, not {asked}")
    return labels


def walk(cfg: DictConfig) -> None:
    """Draw ``cfg.n`` walks of the model in ``cfg.checkpoint``, between random test images."""
    check_sizes(n=cfg.n)
    run, model = load(cfg, "walk", "model=esvae")
    config = run.config
    config.trust = cfg.trust
    config.dataset.update({key: value for key, value in cfg.dataset.items() if value is not None})
    data = build_data(config, num_workers=0, batch_size=2 * cfg.n)
    if cfg.n > (most := len(data.test_set) // 2):
        raise ValueError(f"n must be at most {most}, half the test images, but it is {cfg.n}")
    drawn = torch.randperm(len(data.test_set))[: 2 * cfg.n]
    data.test_set = data.test_set.subset(drawn.tolist())
    images, _ = next(iter(data.test_dataloader()))
    walks = [model.walk(a, b, cfg.steps) for a, b in zip(images[::2], images[1::2], strict=True)]
    path = Path(cfg.output or run.folder / f"walk-seed{cfg.seed}.png")
    draw_grid(torch.cat(walks), path, cfg.steps)
    log.info("The walks are in %s", path)


def load(cfg: DictConfig, method: str, choice: str) -> tuple[Run, Any]:
    """The run of ``cfg.checkpoint`` and its model, which draws by a method, from ``cfg.seed``."""
    keys: Any = OmegaConf.load(Path(CONF) / f"{method}.yaml").keys()
    refuse_unknown(cfg, keys - {"defaults", "hydra"})
    check(RULES["seed"], seed=cfg.seed)
    if cfg.output and Path(cfg.output).suffix != ".png":  # or it may replace a file
        raise ValueError(f"output must name a picture, such as a.png, but it is {cfg.output}")
    run = Run.find(cfg.checkpoint)
    model = run.model(cfg.trust)
    if not hasattr(model, method):
        raise ValueError(f"{method} needs {choice}, but this is a {type(model).__name__}")
    torch.manual_seed(cfg.seed)
    return run, model
