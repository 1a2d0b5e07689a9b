"""``sj-taid sample``: draw images by a trained model."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import PositiveInt
from torch import Tensor

from .._internal.build import build
from .._internal.kinds import Seed, check_kinds
from ..data import ImageData
from .callbacks import show_progress
from .config import KINDS, refuse_unknown
from .evaluator import SAMPLES_AT_ONCE
from .plot import draw_classes, draw_grid, draw_pairs
from .run import Run

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Draw ``cfg.n`` samples of the model in ``cfg.checkpoint``, or rows of its classes."""
    refuse_unknown("sample", cfg.keys())
    kinds = {"n": PositiveInt, "columns": PositiveInt, "seed": Seed, "trust": KINDS["trust"]}
    check_kinds(kinds | {"neighbours": bool}, OmegaConf.to_container(cfg))  # type: ignore[arg-type]
    if cfg.output and Path(cfg.output).suffix != ".png":  # or it may replace a file
        raise ValueError(f"output must name a picture, such as a.png, but it is {cfg.output}")
    run = Run.find(cfg.checkpoint)
    model: Any = run.model(cfg.trust)
    if not hasattr(model, "sample"):
        raise ValueError(f"sample needs task=generation, but this is a {type(model).__name__}")
    if cfg.sample_from and not hasattr(model, "draw_from"):
        raise ValueError(f"sample_from is for model=esvae, but this is a {type(model).__name__}")
    several = isinstance(cfg.label, ListConfig) or cfg.label == "all"
    if several and cfg.neighbours:
        raise ValueError("neighbours=true is for samples of one label, or of none; leave one out")
    prior = f"{cfg.sample_from}-" if cfg.sample_from else ""
    shown = "-".join(map(str, cfg.label)) if isinstance(cfg.label, ListConfig) else cfg.label
    label = "" if cfg.label is None else f"label{shown}-"
    label += "neighbours-" if cfg.neighbours else ""
    path = Path(cfg.output or run.folder / f"samples-{prior}{label}seed{cfg.seed}.png")
    names = run.metrics.get("class_names", []) if run.is_finished else []
    data = load_data(cfg, run) if cfg.neighbours else None
    torch.manual_seed(cfg.seed)
    with model.draw_from(cfg.sample_from) if cfg.sample_from else nullcontext():
        labels = [] if cfg.label is None else find_labels(model, cfg.label, names)
        if several:
            draw_classes(model, labels, path, cfg.columns, names)
        else:
            asked = {"label": labels[0]} if labels else {}
            begins = show_progress(
                range(0, cfg.n, SAMPLES_AT_ONCE), f"Drawing {cfg.n} samples, in batches"
            )
            images = [model.sample(min(SAMPLES_AT_ONCE, cfg.n - k), **asked) for k in begins]
            if data is None:
                draw_grid(torch.cat(images), path, cfg.columns)
            else:
                draw_neighbours(torch.cat(images), data, path, cfg.columns)
    log.info("The samples are in %s", path)


def load_data(cfg: DictConfig, run: Run) -> ImageData:
    """The images that the run was trained on."""
    root = {} if cfg.dataset.root is None else {"dataset.root": cfg.dataset.root}
    config: Any = OmegaConf.to_container(run.config_with(root).dataset, resolve=True)
    data: Any = build(config, cfg.trust)
    data.prepare_data()
    data.setup()
    return data


def draw_neighbours(samples: Tensor, data: ImageData, path: Path, columns: int) -> None:
    """Draw samples above the training images nearest to them, and say how near these are."""
    tests, _ = next(iter(data.test_dataloader()))
    nearest, away = find_nearest(torch.cat([samples, tests]), data)
    n = len(samples)
    log.info(
        "The nearest training image is %.3g away from a sample, %.3g from one of %d test images "
        "(medians; root mean square of the differences of pixels in [-1, 1])",
        *(away[:n].median(), away[n:].median(), len(tests)),
    )
    draw_pairs(samples, nearest[:n], path, columns, ("sample", "nearest"))


def find_nearest(images: Tensor, data: ImageData) -> tuple[Tensor, Tensor]:
    """The training image nearest to each image, and the root mean square of their differences.

    As training sees them but for its augmentation, of which mirror images alone are looked at.
    """
    found, least = torch.empty_like(images), torch.full((len(images),), math.inf)
    for batch, _ in show_progress(data.loader(data.train_set), "Nearest of the training images"):
        seen = torch.cat([batch, batch.flip(-1)]) if data.mirrors else batch
        exact = "donot_use_mm_for_euclid_dist"  # of a copy 0
        away, at = torch.cdist(images.flatten(1), seen.flatten(1), compute_mode=exact).min(1)
        nearer = away < least
        found[nearer], least[nearer] = seen[at[nearer]], away[nearer]
    return found, least / math.sqrt(images[0].numel())


def find_labels(model: Any, asked: Any, names: Sequence[str] = ()) -> list[int]:
    """The classes that are asked for, by their names or else numbers: one, a list, or ``all``."""
    known: list[int] = getattr(model, "labels", [])
    if asked == "all":
        return known
    words = [*asked] if isinstance(asked, ListConfig) else [asked]
    if not known:
        return words  # the model says what it lacks
    by_name = {names[label] if names else str(label): label for label in known}
    if not words or not {*map(str, words)} <= by_name.keys():
        allowed = ", ".join(by_name)
        raise ValueError(f"label must be one of {allowed}, a list of them, or all, not {asked}")
    return [by_name[str(word)] for word in words]
