"""Validation of a composed config, before anything is built or written."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from .._build import find_class
from .._checks import FLAG, NOT_NEGATIVE, Rule, check, integer, is_number
from .config import CONF
from .run import flatten

#: what libraries would take, or refuse in words that do not name the key
RULES: dict[str, Rule] = {
    "seed": integer(0),
    "pictures": FLAG,
    "accelerate": FLAG,
    "compile": (
        "true, false or options, as '{mode: max-autotune}'",
        lambda value: isinstance(value, bool | DictConfig),
    ),
    "metric.features": FLAG,
    "metric.samples": integer(1),
    "dataset.limit": integer(1),
    "dataset.batch_size": integer(1),
    "dataset.num_workers": integer(0),
    "optimizer.lr": NOT_NEGATIVE,
    "trainer.max_epochs": integer(0),
    "trainer.limit_test_batches": ("more than 0", lambda x: is_number(x) and x > 0),
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
        ValueError: choices that do not fit together, a key that nothing reads, a class that is not
            trusted, or a word where Hydra expects true or false.
    """
    words = {key for key, value in flatten(OmegaConf.to_container(cfg)).items() if is_word(value)}
    if words:
        raise ValueError(f"{', '.join(sorted(words))} must be true or false")
    for key, rule in RULES.items():
        if (value := OmegaConf.select(cfg, key)) is not None or key in NEVER_NULL:
            check(rule, **{key: value})
    keys = KEYS | {path.name for path in Path(CONF).iterdir() if path.is_dir()}
    if unknown := cfg.keys() - keys:
        raise ValueError(
            f"the config has no {', '.join(map(str, unknown))}; there are {', '.join(sorted(keys))}"
        )
    task, data = (find_class(cfg[part]._target_, cfg.trust) for part in ("task", "dataset"))
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


def is_word(value: object) -> bool:
    """Whether it is a flag to YAML, but to Hydra a text, which Python counts as true."""
    return isinstance(value, str) and value.lower() in ("yes", "no", "on", "off")
