"""From a config to objects: :func:`build_parts`, the one place where that happens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .._internal.build import TRUSTED, build
from ..data import Data
from ..model.prepare import prepare
from .config import validate
from .evaluator import Evaluator
from .task import Task

#: modules whose public classes the config of a run may name
OF_A_RUN = (
    *TRUSTED,
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.trainer",
)


@dataclass(frozen=True)
class Parts:
    """What a config describes."""

    #: untrained, in the form in which it is trained and measured
    model: nn.Module
    #: not loaded yet
    data: Data
    #: with its optimizer if the config has one
    task: Task
    evaluator: Evaluator | None
    #: the config's own
    callbacks: list[L.Callback]
    #: takes ``save_dir``
    logger: partial[Any] | None
    #: Lightning's, which takes what a run adds
    trainer: partial[L.Trainer]
    #: the weights are drawn from it, and the global random state is left there
    seed: int
    #: whether a run ends with them
    pictures: bool
    #: a trained model to train further
    start_from: str | None
    #: the firing rate that thresholds are calibrated to
    calibrate: float | None
    #: whether the model is compiled, or options of ``torch.compile``
    compile: bool | dict[str, Any]
    #: the whole config, without interpolations
    values: dict[str, Any]
    #: the whole config as YAML, with its interpolations
    text: str

    def load_data(self) -> Data:
        """The data, fetched if they are asked for, and loaded."""
        self.data.prepare_data()
        self.data.setup()
        return self.data


def build_parts(cfg: DictConfig, num_workers: int | None = None) -> Parts:
    """Check a config, and build what it describes.

    ``num_workers`` processes load the data if the config does not say how many do.

    Groups that it lacks are left out; ``optimizer``, ``callbacks`` and ``logger`` are for training
    alone.

    Raises:
        ValueError: choices that do not fit together, a key that nothing reads, a class that is not
            trusted or that does not take its arguments.
    """
    validate(cfg)
    groups: dict[Any, Any] = {k: group for k, group in cfg.items() if isinstance(group, DictConfig)}
    groups |= {f"callbacks.{k}": part for k, part in groups.get("callbacks", {}).items() if part}
    keys = {str(group.get("_target_")): str(key) for key, group in groups.items()}
    make = partial(build, trust=cfg.trust, keys=keys, trusted=OF_A_RUN)

    if num_workers is not None and cfg.dataset.get("num_workers") is None:
        cfg.dataset.num_workers = num_workers
    data = make(OmegaConf.to_container(cfg.dataset, resolve=True))
    complete(cfg, data)
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    task = values["task"] | {name: values.get(name) for name in ("model", "optimizer")}
    others = {name: values.get(name) for name in ("metric", "callbacks", "logger", "trainer")}
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    built = make({"task": task, **others})
    return Parts(
        model=prepare(built["task"].model, cfg.accelerate),
        data=data,
        task=built["task"],
        evaluator=built["metric"],
        callbacks=[one for one in (built["callbacks"] or {}).values() if one],
        logger=built["logger"],
        trainer=built["trainer"],
        seed=cfg.seed,
        pictures=cfg.pictures,
        start_from=cfg.start_from,
        calibrate=cfg.neuron_start.get("calibrate"),
        compile=values["compile"],
        values=values,
        text=OmegaConf.to_yaml(cfg),
    )


def complete(cfg: DictConfig, data: Data) -> None:
    """Put into a config what the data say: how many classes and loader processes there are.

    Raises:
        ValueError: a part has another number of classes than the data, or a classifier's data none.
    """
    OmegaConf.update(cfg, "dataset.classes", data.classes, force_add=True)
    # The augmentation of each process draws its own numbers.
    OmegaConf.update(cfg, "dataset.num_workers", data.num_workers, force_add=True)
    parts = [part for part in ("model", "feature_loss") if "classes" in (cfg.get(part) or {})]
    for part in parts:
        own = cfg[part].classes
        if own is None and "loss" in cfg.task:
            raise ValueError(
                "a classifier needs classes, but the data have none; put the images of each class "
                "into a folder of its own"
            )
        if data.classes not in (None, own):
            raise ValueError(
                f"{part}.classes={own}, but dataset.classes is {data.classes}; leave "
                f"{part}.classes out"
            )
