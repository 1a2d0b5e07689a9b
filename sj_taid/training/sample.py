"""``sj-taid sample``: draw images by a trained model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from pydantic import PositiveInt

from .._internal.kinds import Seed, check_kinds
from .callbacks import show_progress
from .config import KINDS, refuse_unknown
from .evaluator import SAMPLES_AT_ONCE
from .plot import draw_classes, draw_grid
from .run import Run

log = logging.getLogger(__name__)


def main(cfg: DictConfig) -> None:
    """Draw ``cfg.n`` samples of the model in ``cfg.checkpoint``, or rows of its classes."""
    refuse_unknown("sample", cfg.keys())
    kinds = {"n": PositiveInt, "columns": PositiveInt, "seed": Seed, "trust": KINDS["trust"]}
    check_kinds(kinds, OmegaConf.to_container(cfg))  # type: ignore[arg-type]
    if cfg.output and Path(cfg.output).suffix != ".png":  # or it may replace a file
        raise ValueError(f"output must name a picture, such as a.png, but it is {cfg.output}")
    run = Run.find(cfg.checkpoint)
    model: Any = run.model(cfg.trust)
    if not hasattr(model, "sample"):
        raise ValueError(f"sample needs task=generation, but this is a {type(model).__name__}")
    torch.manual_seed(cfg.seed)
    if cfg.sample_from and not hasattr(model, "draw_from"):
        raise ValueError(f"sample_from is for model=esvae, but this is a {type(model).__name__}")
    several = isinstance(cfg.label, ListConfig)
    prior = f"{cfg.sample_from}-" if cfg.sample_from else ""
    shown = "-".join(map(str, cfg.label)) if several else cfg.label
    label = "" if cfg.label is None else f"label{shown}-"
    path = Path(cfg.output or run.folder / f"samples-{prior}{label}seed{cfg.seed}.png")
    names = run.metrics.get("class_names", []) if run.is_finished else []
    with model.draw_from(cfg.sample_from) if cfg.sample_from else nullcontext():
        labels = [] if cfg.label is None else find_labels(model, cfg.label, names)
        if several or cfg.label == "all":
            draw_classes(model, labels, path, cfg.columns, names)
        else:
            asked = {"label": labels[0]} if labels else {}
            begins = show_progress(
                range(0, cfg.n, SAMPLES_AT_ONCE), f"Drawing {cfg.n} samples, in batches"
            )
            images = [model.sample(min(SAMPLES_AT_ONCE, cfg.n - k), **asked) for k in begins]
            draw_grid(torch.cat(images), path, cfg.columns)
    log.info("The samples are in %s", path)


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
