"""Validation of a composed config, before anything is built or written."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from .._build import find_class
from .._checks import FLAG, NOT_NEGATIVE, NUMBER, Rule, check, integer, is_number
from .config import CONF, describe_missing


def _or_null(rule: Rule) -> Rule:
    return f"{rule[0]}, or null", lambda value: value is None or rule[1](value)


TAU: Rule = ("a number of time steps greater than 1", lambda value: is_number(value) and value > 1)
PROBABILITY: Rule = ("a probability", lambda value: is_number(value) and 0 <= value <= 1)
RATE: Rule = ("a rate between 0 and 1", lambda value: is_number(value) and 0 < value < 1)
COMPILE: Rule = (
    "true, false or options of torch.compile, such as 'compile={mode: max-autotune}'",
    lambda value: isinstance(value, bool | DictConfig),
)
#: values of a config by their keys; what else a class takes is checked by the class
RULES: dict[str, Rule] = {
    "seed": integer(0),
    "pictures": FLAG,
    "compile": COMPILE,
    "model.T": integer(1),
    "trainer.max_epochs": integer(0),
    "trainer.accumulate_grad_batches": integer(1),
    "trainer.check_val_every_n_epoch": _or_null(integer(1)),
    "trainer.enable_progress_bar": FLAG,
    "trainer.enable_model_summary": FLAG,
    "trainer.limit_train_batches": _or_null(NOT_NEGATIVE),
    "trainer.limit_val_batches": _or_null(NOT_NEGATIVE),
    "trainer.limit_test_batches": _or_null(NOT_NEGATIVE),
    "dataset.image_size": integer(1),
    "dataset.batch_size": integer(1),
    "dataset.num_workers": integer(0),
    "dataset.T": integer(1),
    "dataset.crop": _or_null(integer(1)),
    "dataset.limit": _or_null(integer(1)),
    "dataset.erase": PROBABILITY,
    "dataset.mixup": NOT_NEGATIVE,
    "dataset.seed": integer(0),
    "surrogate.alpha": NUMBER,
    "surrogate.w": NUMBER,
    "surrogate.c": NUMBER,
    "neuron_start.tau": TAU,
    "neuron_start.decay_input": FLAG,
    "neuron_start.v_threshold": NUMBER,
    "neuron_start.v_reset": _or_null(NUMBER),
    "neuron_start.detach_reset": FLAG,
    "neuron_start.calibrate": _or_null(RATE),
    "optimizer.lr": NOT_NEGATIVE,
    "optimizer.nesterov": FLAG,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "task.lr_scale": _or_null(NOT_NEGATIVE),
    "metric.samples": integer(1),
    "metric.autoencoder.latent_channels": integer(1),
    "metric.autoencoder.epochs": integer(0),
    "metric.autoencoder.batch_size": integer(1),
    "metric.autoencoder.seed": integer(0),
    "metric.features": _or_null(FLAG),
    "n": integer(1),
    "columns": integer(1),
}
#: keys of a config next to its groups
KEYS = {"cache_dir", "checkpoint", "compile", "objective", "pictures", "seed", "trust"}
#: what one task alone takes: the choice that sets it, the task, and what is in its config alone
OF_ONE_TASK = {
    "loss": ("loss=", "classification", "loss"),
    "model.per_channel": ("neuron=alif_channel", "classification", "loss"),
    "feature_loss": ("feature_loss=", "generation", "feature_loss"),
}


def validate(cfg: DictConfig) -> None:
    """Check the config of a run.

    Raises:
        ValueError: a value of another type or out of its range, choices that do not fit together,
            or a class that is not trusted.
    """
    check_values(cfg)
    keys = KEYS | {path.name for path in Path(CONF).iterdir() if path.is_dir()}
    for key in cfg.keys() - keys:
        raise ValueError(describe_missing(str(key), keys))
    task, data = (find_class(cfg[part]._target_, cfg.trust) for part in ("task", "dataset"))
    if not issubclass(data, task.takes):
        raise ValueError(
            f"dataset={cfg.dataset.name} holds recordings, which only a classifier takes; "
            "add task=classification, or choose a data set of images"
        )
    for key, (choice, name, own) in OF_ONE_TASK.items():
        if OmegaConf.select(cfg, key) and own not in cfg.task:
            raise ValueError(
                f"{key}, which {choice} sets, is for task={name}; add that, or leave {choice} out"
            )
    if cfg.get("feature_loss") and "_target_" not in cfg.feature_loss:
        raise ValueError(describe_missing("feature_loss", cfg))
    objectives = [*task.objectives, "epochs", "parameters", "training_seconds"]
    if cfg.objective not in objectives:
        near = get_close_matches(str(cfg.objective), objectives, 1) or objectives[:1]
        raise ValueError(
            f"objective must be a metric of the task, but it is {cfg.objective!r}; did you mean "
            f"{near[0]}?"
        )
    callbacks = (cfg.get("callbacks") or {}).values()
    if any("StochasticWeightAveraging" in str(callback._target_) for callback in callbacks):
        raise ValueError(
            "Lightning's StochasticWeightAveraging averages after the last checkpoint is written, "
            "so other weights than the saved ones would be measured; take WeightAveraging or "
            "EMAWeightAveraging of lightning.pytorch.callbacks"
        )


def check_values(cfg: DictConfig) -> None:
    """Check the values that :data:`RULES` names, where the config has them.

    Raises:
        ValueError: a value of another type, or out of its range.
    """
    absent = object()
    for key, rule in RULES.items():
        value = OmegaConf.select(cfg, key, default=absent)
        if value is not absent:
            check(rule, **{key: value})
