"""Validation of a composed config, before anything is built or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .._build import find_class
from .._checks import FLAG, NOT_NEGATIVE, PATH, Rule, check, integer, is_number, is_whole
from .._kinds import check_kinds
from .config import CONF

SHARE: Rule = ("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
POSITIVE: Rule = ("a number > 0", lambda value: is_number(value) and value > 0)
#: What no class takes, and ranges that libraries do not check, or in words that do not name the
#: key. The kinds of all other values are checked where their classes are called.
RULES: dict[str, Rule] = {
    "seed": ("an integer >= 0, below 2^32", lambda value: is_whole(value) and 0 <= value < 2**32),
    "cache_dir": PATH,
    "resume": PATH,
    "pictures": FLAG,
    "accelerate": FLAG,
    "compile": (
        "true, false or options, as '{mode: max-autotune}'",
        lambda value: isinstance(value, bool | DictConfig),
    ),
    "neuron_start.calibrate": ("between 0 and 1", lambda value: is_number(value) and 0 < value < 1),
    "surrogate.alpha": POSITIVE,
    "loss.label_smoothing": SHARE,
    "metric.samples": integer(1),
    "metric.autoencoder.epochs": integer(1),
    "metric.autoencoder.batch_size": integer(1),
    "dataset.erase": SHARE,
    "dataset.mixup": NOT_NEGATIVE,
    "dataset.limit": integer(1),
    "dataset.batch_size": integer(1),
    "dataset.num_workers": integer(0),
    "optimizer.lr": NOT_NEGATIVE,
    "trainer.max_epochs": integer(0),
    "trainer.accumulate_grad_batches": integer(1),
    "trainer.check_val_every_n_epoch": integer(1),
    "trainer.limit_test_batches": POSITIVE,
}
#: of these, what null does not stand for a default of
NEVER_NULL = {"seed", "trainer.max_epochs"}
#: keys of a config next to its groups
KEYS = {
    "accelerate",
    "cache_dir",
    "checkpoint",
    "compile",
    "objective",
    "pictures",
    "resume",
    "seed",
    "trust",
}
#: what one task alone takes: the choice that sets it, the task, and what is in its config alone
OF_ONE_TASK = {
    "loss": ("loss=", "classification", "loss"),
    "model.per_channel": ("neuron=alif_channel", "classification", "loss"),
    "feature_loss": ("feature_loss=", "generation", "feature_loss"),
}
#: arguments of Lightning's Trainer that have a place of their own
OUTSIDE_TRAINER = {
    "logger": "logger=",
    "callbacks": "callbacks=",
    "default_root_dir": "hydra.run.dir=",
    "plugins": "trainer.precision= and trainer.strategy=",
}


def validate(cfg: DictConfig) -> None:
    """Check what the classes of a config cannot: they check their own arguments.

    Raises:
        ValueError: choices that do not fit together, a key that nothing reads, or a class that is
            not trusted.
    """
    for key, rule in RULES.items():
        if (value := OmegaConf.select(cfg, key)) is not None or key in NEVER_NULL:
            check(rule, **{key: value})
    keys = KEYS | {path.name for path in Path(CONF).iterdir() if path.is_dir()} - {"experiment"}
    if unknown := cfg.keys() - keys:
        raise ValueError(
            f"the config has no {', '.join(map(str, unknown))}; there are {', '.join(sorted(keys))}"
        )
    task, data = (find_class(cfg[part]._target_, cfg.trust) for part in ("task", "dataset"))
    values: Any = OmegaConf.to_container(cfg.dataset, resolve=True)
    check_kinds(data, values, "dataset.")  # before the model, which takes some of them too
    if not issubclass(data, task.takes):
        raise ValueError(
            f"{task.__name__} takes {task.takes.__name__}, but dataset={cfg.dataset.name} is "
            f"{data.__name__}; for recordings add task=classification"
        )
    for key, (choice, name, own) in OF_ONE_TASK.items():
        if OmegaConf.select(cfg, key) and own not in cfg.task:
            raise ValueError(
                f"{key}, which {choice} sets, is for task={name}; add that, or leave {choice} out"
            )
    objectives = [*task.objectives, "epochs", "parameters", "training_seconds"]
    if cfg.objective not in objectives:
        raise ValueError(f"objective={cfg.objective} is none of {', '.join(objectives)}")
    for key, instead in OUTSIDE_TRAINER.items():
        if key in cfg.trainer:
            raise ValueError(f"trainer.{key} is set by {instead}; give that")
    callbacks = (cfg.get("callbacks") or {}).values()
    if any(c and "StochasticWeightAveraging" in str(c._target_) for c in callbacks):
        raise ValueError(
            "Lightning's StochasticWeightAveraging averages after the last checkpoint is written, "
            "so other weights than the saved ones would be measured; take WeightAveraging or "
            "EMAWeightAveraging of lightning.pytorch.callbacks"
        )
