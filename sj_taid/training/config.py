"""Configs: composed by Hydra from ``conf``, checked, and named by their choices."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import hydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from .._internal.build import find_class
from .._internal.checks import expand_home, is_number
from .._internal.kinds import Seed, Share, Text, check_kinds

#: In the package a link to the checkout's conf/, which becomes a copy in a wheel. Where git makes
#: plain files of links, the checkout's own.
CONF = next(str(p / "conf") for p in Path(__file__).parents[1:3] if (p / "conf").is_dir())
#: the Hydra version whose behaviour is meant
VERSION = "1.3"
#: a run's config, with its interpolations
CONFIG = "config.yaml"

#: keys of the config itself, which no class takes
KINDS: dict[str, Any] = {
    "seed": Seed,
    "trust": str | list[str],
    "cache_dir": Text,
    "start_from": Text | None,
    "resume": Text | None,
    "pictures": bool,
    "accelerate": bool,
    "compile": bool | dict[str, Any],
}
#: what libraries would take in silence; all other values are checked where their classes are called
KINDS_OF_GROUPS: dict[str, dict[str, Any]] = {
    "neuron_start": {"calibrate": Annotated[float, Field(gt=0, lt=1)] | None},
    "surrogate": {"alpha": PositiveFloat},
    "loss": {"label_smoothing": Share},
    "dataset": {"root": Text, "test_root": Text | None},  # none is the folder that one is in
    "optimizer": {"lr": Annotated[float, Field(ge=0, le=1000)]},  # or weights may stay finite
    "trainer": {
        "max_epochs": NonNegativeInt,
        "gradient_clip_val": NonNegativeFloat | None,
        "accumulate_grad_batches": PositiveInt,
        "check_val_every_n_epoch": PositiveInt | None,
        "limit_train_batches": PositiveFloat | None,
        "limit_test_batches": PositiveFloat | None,
    },
}


class OfOneTask(NamedTuple):
    """A choice that one task alone takes."""

    choice: str  #: what sets the key
    task: str
    own: str  #: a key that only the task's config has


#: key -> the choice that sets it
OF_ONE_TASK = {
    "loss": OfOneTask("loss=", "classification", "loss"),
    "model.per_channel": OfOneTask("neuron=alif_channel", "classification", "loss"),
    "feature_loss": OfOneTask("feature_loss=", "generation", "feature_loss"),
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
    parts: Any = {} if place else OmegaConf.to_container(cfg)
    alike = [name for name in flatten(parts) if last in name.rpartition(".")[2]]
    elsewhere = f"; elsewhere: {', '.join(alike)}" if alike else ""
    has = f"{place or 'the config'} has {names}" if names else f"no {place} is chosen"
    return f"there is no {key}; {has}{elsewhere}"


def refuse_unknown(command: str, keys: Set[Any]) -> None:
    """Raise a ``ValueError`` for keys that the command does not know: a misspelt ``+key``."""
    known: Any = OmegaConf.load(Path(CONF, f"{command}.yaml")).keys()
    if command == "train":
        known |= {path.name for path in Path(CONF).iterdir() if path.is_dir()}
    if unknown := keys - known:
        names = ", ".join(sorted(known - {"defaults", "hydra", "experiment"}))
        raise ValueError(f"the config has no {', '.join(map(str, unknown))}; there are {names}")


class Folders(Callback):
    """Knows the folders of Hydra's job or sweep, and says how a sweep's runs become a table."""

    folder: ClassVar[Path | None] = None
    #: the outermost folder that it makes, which is not there before
    made: ClassVar[Path | None] = None
    #: of the sweep that has begun and not ended
    sweep: ClassVar[str | None] = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with suppress(OmegaConfBaseException):  # as of resume=, which is reported later
            self.look(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        Folders.sweep = config.hydra.sweep.dir
        self.look(config.hydra.sweep.dir)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        Folders.sweep = None
        print(f"A table of the runs: sj-taid compare {shlex.quote(config.hydra.sweep.dir)}")

    def look(self, folder: str) -> None:
        """Find which folders are not there yet."""
        Folders.folder = path = Path(folder).absolute()
        missing = [one for one in (path, *path.parents) if not one.exists()]
        Folders.made = missing[-1] if missing else None


def options_of(group: str) -> list[str]:
    """The names of a group's choices; none if it is no group."""
    return sorted(path.stem for path in Path(CONF, group).glob("*.yaml")) if group else []


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


def folder_name(overrides: str) -> str:
    """The folder of a sweep's job, ``neuron-lif-seed-0`` for ``neuron=lif,seed=0``.

    Letters, digits, ``.``, ``_`` and ``-`` alone, at most 120 of them. Where that leaves something
    out, a hash tells the jobs apart.
    """
    text = overrides or "default"
    name = re.sub(r"[^A-Za-z0-9._]+", "-", text)
    plain = r"[\w.]+=[\w.]*\w"
    if len(name) <= 120 and re.fullmatch(rf"{plain}(,{plain})*", text, re.ASCII):
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{name[:103].strip('-.')}-{digest}".lstrip("-")


def base_name(path: str) -> str:
    """The last part of a path, which names a folder of custom images."""
    return expand_home(path).absolute().name


def help_of(command: str) -> str:
    """The keys of a command as its config has and explains them, for Hydra's template."""
    keys = Path(CONF, f"{command}.yaml").read_text("utf-8").partition("\nhydra:")[0]
    return keys.partition("\n\n")[2].replace("$", "$$")


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
        ValueError: choices that do not fit together, or a class that is not trusted.
    """
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    refuse_unknown("train", values.keys())
    check_kinds(KINDS, values)
    for group, kinds in KINDS_OF_GROUPS.items():
        check_kinds(kinds, values.get(group) or {}, f"{group}.")
    task, data = (find_class(cfg[part]._target_, cfg.trust) for part in ("task", "dataset"))
    if not issubclass(data, task.takes):
        raise ValueError(
            f"{task.__name__} takes {task.takes.__name__}, but dataset={cfg.dataset.name} is "
            f"{data.__name__}; for recordings add task=classification"
        )
    for key, of in OF_ONE_TASK.items():
        if OmegaConf.select(cfg, key) and of.own not in cfg.task:
            raise ValueError(
                f"{of.choice} is for task={of.task}; add that, or leave {of.choice} out"
            )
    precision = str(cfg.trainer.get("precision"))
    if precision in ("16-true", "bf16-true", "64-true", "64") and "loss" not in cfg.task:
        raise ValueError(
            f"trainer.precision={precision} has no 32-bit weights, in which alone images are "
            "measured and drawn; choose trainer.precision=bf16-mixed, or 16-mixed"
        )
    if cfg.get("decoder") and "loss" in cfg.task:
        raise ValueError(f"{task.__name__} makes no images, which decoder= is for; leave it out")
    metrics = "|".join(task.objectives)
    if not re.fullmatch(rf"(validation_)?({metrics})(_[a-z_]+)?", str(cfg.objective)):
        names = ", ".join(task.objectives)
        raise ValueError(
            f"objective={cfg.objective} is none of {names}, or one of them after validation_"
        )
    reserved = {"logger", "callbacks", "default_root_dir", "plugins", "enable_progress_bar"}
    if taken := reserved & cfg.trainer.keys():
        raise ValueError(f"trainer.{taken.pop()} is set by the run; leave it out")
    if "StochasticWeightAveraging" in str(values.get("callbacks")):
        raise ValueError(
            "StochasticWeightAveraging would measure other weights than the saved ones; take "
            "WeightAveraging or EMAWeightAveraging of lightning.pytorch.callbacks"
        )


def flatten(node: Any, key: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries, by their dotted keys."""
    if not isinstance(node, dict):
        return {key: node}
    return {
        name: leaf
        for child, value in node.items()
        for name, leaf in flatten(value, f"{key}.{child}" if key else str(child)).items()
    }


# Hydra names a job's folder in the process that runs the job, which has imported little more than
# this module.
for resolver in (as_float, base_name, folder_name, help_of, run_folder):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
