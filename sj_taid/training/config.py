"""Configs: composed by Hydra from ``conf``, checked, and named by their choices."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from .._internal.build import find_class, is_below
from .._internal.checks import (
    FLAG,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    SEED,
    SHARE,
    Rule,
    check,
    expand_home,
    integer,
    is_number,
)
from .._internal.kinds import check_kinds

#: In the package a link to the checkout's conf/, which becomes a copy in a wheel. Where git makes
#: plain files of links, the checkout's own.
CONF = next(str(p / "conf") for p in Path(__file__).parents[1:3] if (p / "conf").is_dir())
#: the Hydra version whose behaviour is meant
VERSION = "1.3"
#: a run's config, with its interpolations
CONFIG = "config.yaml"

#: Keys that no class takes, and ranges that libraries check late, or in messages without the key.
#: The kinds of all other values are checked where their classes are called.
RULES: dict[str, Rule] = {
    "seed": SEED,
    "cache_dir": PATH,
    "start_from": PATH,
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
    "metric.seed": SEED,
    "metric.autoencoder.seed": SEED,
    "metric.autoencoder.epochs": integer(1),
    "metric.autoencoder.batch_size": integer(1),
    "dataset.root": PATH,
    "dataset.test_root": PATH,
    "dataset.erase": SHARE,
    "dataset.mixup": NOT_NEGATIVE,
    "dataset.seed": SEED,
    "dataset.limit": integer(1),
    "dataset.batch_size": integer(1),
    "dataset.num_workers": integer(0),
    # Beyond, a model may diverge and stay finite.
    "optimizer.lr": (
        "a number from 0 to 1000",
        lambda value: is_number(value) and 0 <= value <= 1000,
    ),
    "task.scheduler": ("a class by its _target_", lambda value: isinstance(value, DictConfig)),
    "trainer.max_epochs": integer(0),
    "trainer.gradient_clip_val": NOT_NEGATIVE,
    "trainer.accumulate_grad_batches": integer(1),
    "trainer.check_val_every_n_epoch": integer(1),
    "trainer.limit_test_batches": POSITIVE,
}
#: keys of RULES that must not be null
NEVER_NULL = {"seed", "pictures", "accelerate", "compile", "trainer.max_epochs"}
#: key -> the override that sets it, the only task that takes it, a key that only its config has
OF_ONE_TASK = {
    "loss": ("loss=", "classification", "loss"),
    "model.per_channel": ("neuron=alif_channel", "classification", "loss"),
    "feature_loss": ("feature_loss=", "generation", "feature_loss"),
}


def compose(config_name: str, overrides: Sequence[str] = (), **options: Any) -> DictConfig:
    """The config of a command line."""
    with hydra.initialize_config_dir(CONF, version_base=VERSION):
        return hydra.compose(config_name, list(overrides), **options)


def keys_there(command: str, overrides: Sequence[str], key: str) -> str:
    """What the config of a command has in place of a key that it has not."""
    groups = [word for word in overrides if (Path(CONF) / key_of(word)).is_dir()]
    try:
        cfg = compose(command, groups)
    except Exception:  # another error, or a sweep's list
        cfg = compose(command)
    place, _, last = key.rpartition(".")
    if not isinstance(node := OmegaConf.select(cfg, place), DictConfig):
        place, node = "", cfg
    names = ", ".join(sorted(name for name in map(str, node) if name[0] != "_"))
    values: Any = OmegaConf.to_container(cfg)
    parts = {group: part for group, part in values.items() if isinstance(part, dict)}
    alike = [f"{group}.{name}" for group, part in parts.items() for name in part if last in name]
    elsewhere = f"; elsewhere: {', '.join(alike)}" if alike else ""
    return f"there is no {key}; {place or 'the config'} has {names}{elsewhere}"


class SweepEnd(Callback):
    """Says at the end of a sweep how its runs become a table."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        print(f"A table of the runs: sj-taid compare {shlex.quote(config.hydra.sweep.dir)}")


def key_of(override: str) -> str:
    """The key that an override of the command line sets, adds or deletes."""
    return override.partition("=")[0].lstrip("+~")


def argument(key: str, value: Any) -> str:
    """The override of a path, quoted for Hydra and for the shell if need be.

    >>> print(argument("resume", "runs/1"), *shlex.split(argument("resume", "my runs/1")))
    resume=runs/1 resume='my runs/1'
    """
    text = str(value)
    if not re.fullmatch(r"[\w./:@%+-]+", text, re.ASCII):
        text = QuotedString(text, Quote.single).with_quotes()
    return shlex.quote(f"{key}={text}")


def select_overrides(
    overrides: Iterable[str], ignored: Collection[str] = (), data_class: str = ""
) -> list[str]:
    """The overrides that are choices: all but ``ignored`` overrides, keys and what is below these.

    The folders of an ``ImageFolder``, or of a custom ``data_class``, say what the data are.
    """
    if data_class.endswith(".ImageFolder") or not is_below(data_class or "sj_taid", ["sj_taid"]):
        ignored = {*ignored} - {"dataset.root", "dataset.test_root"}
    return [
        text
        for text in overrides
        if text.lstrip("+") not in ignored and not is_below(key_of(text), ignored)
    ]


def folder_name(
    overrides: Sequence[str], ignored: Collection[str] = (), data_class: str = ""
) -> str:
    """The folder of a sweep's job, ``neuron-lif-seed-0`` for ``neuron=lif seed=0``.

    Letters, digits, ``.``, ``_`` and ``-`` alone, at most 120 of them. Where that leaves something
    out, a hash tells the jobs apart. See :func:`select_overrides` for the arguments.
    """
    text = ",".join(sorted(select_overrides(overrides, ignored, data_class))) or "default"
    name = re.sub(r"[^A-Za-z0-9._]+", "-", text)
    plain = r"[\w.]+=[\w.]*\w"
    if len(name) <= 120 and re.fullmatch(rf"{plain}(,{plain})*", text, re.ASCII):
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{name[:103].strip('-.')}-{digest}".lstrip("-")


def base_name(path: str) -> str:
    """The last part of a path, which names a folder of custom images."""
    return expand_home(path).absolute().name


def as_float(number: Any) -> Any:
    """A number as a float, which SpikingJelly's neurons insist on; all else as it is."""
    return float(number) if is_number(number) else number


def run_folder(resume: str | None, new: str) -> str:
    """The folder of the run to resume, or of a new one."""
    if resume is None:
        return new
    folder = expand_home(resume).absolute()
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"resume= needs the folder of a run, which holds {CONFIG}, but got {folder}"
        )
    return str(folder)


def validate(cfg: DictConfig) -> None:
    """Check what the classes of a config cannot: they check their own arguments.

    Raises:
        ValueError: choices that do not fit together, a key that nothing reads, or a class that is
            not trusted.
    """
    for key, rule in RULES.items():
        if (value := OmegaConf.select(cfg, key)) is not None or key in NEVER_NULL:
            check(rule, **{key: value})
    groups = {path.name for path in Path(CONF).iterdir() if path.is_dir()} - {"experiment"}
    keys = groups | {key for key in RULES if "." not in key} | {"checkpoint", "objective", "trust"}
    refuse_unknown(cfg.keys(), keys)
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
    if cfg.get("decoder") and "loss" in cfg.task:
        raise ValueError(f"{task.__name__} makes no images, which decoder= is for; leave it out")
    metrics = "|".join(task.objectives)
    if not re.fullmatch(rf"(validation_)?({metrics})(_[a-z_]+)?", str(cfg.objective)):
        raise ValueError(f"objective={cfg.objective} is none of {metrics}, also of validation_...")
    reserved = {"logger", "callbacks", "default_root_dir", "plugins", "enable_progress_bar"}
    if taken := reserved & cfg.trainer.keys():
        raise ValueError(
            f"trainer.{taken.pop()} is set by the run; choose logger=, callbacks=, hydra.run.dir= "
            "or trainer.precision="
        )
    callbacks = (cfg.get("callbacks") or {}).values()
    if any(c and "StochasticWeightAveraging" in str(c._target_) for c in callbacks):
        raise ValueError(
            "StochasticWeightAveraging would measure other weights than the saved ones; take "
            "WeightAveraging or EMAWeightAveraging of lightning.pytorch.callbacks"
        )


def merge(cfg: DictConfig, given: Mapping[str, Any]) -> None:
    """Put values into a run's config, by their keys, in groups that it has."""
    for key, value in given.items():
        group = key.partition(".")[0]
        if group != key and cfg.get(group) is None:
            raise ValueError(f"{key} is given, but the run has no {group}; leave it out")
        OmegaConf.update(cfg, key, value, merge=False, force_add=True)


def refuse_unknown(given: Set[Any], keys: Set[str]) -> None:
    """Raise a ``ValueError`` for a key that is not in ``keys``, such as a misspelt ``+key``."""
    if unknown := given - keys:
        raise ValueError(
            f"the config has no {', '.join(map(str, unknown))}; there are {', '.join(sorted(keys))}"
        )


# Hydra names a job's folder in the process that runs the job, which has imported little more than
# this module.
for resolver in (as_float, base_name, folder_name, run_folder):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
