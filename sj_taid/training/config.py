"""Configs: composed by Hydra from ``conf``, and the folder names of a sweep's jobs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from .._build import is_below
from .._checks import expand_home, is_number

#: In the package a link to the checkout's conf/, which becomes a copy in a wheel. Where git makes
#: plain files of links, the checkout's own.
CONF = next(str(p / "conf") for p in Path(__file__).parents[1:3] if (p / "conf").is_dir())
#: the Hydra version whose behaviour is meant
VERSION = "1.3"
#: a run's config, with its interpolations
CONFIG = "config.yaml"
#: an override that names a folder as it is
PLAIN = r"[\w.]+=[\w.]*\w"


def compose(config_name: str, overrides: Sequence[str] = (), **options: Any) -> DictConfig:
    """The config of a command line."""
    with hydra.initialize_config_dir(CONF, version_base=VERSION):
        return hydra.compose(config_name, list(overrides), **options)


def key_of(override: str) -> str:
    """The key that an override of the command line sets, adds or deletes."""
    return override.partition("=")[0].lstrip("+~")


def quote(text: str) -> str:
    """The text as a value of Hydra's overrides, in quotes where it would be read as another."""
    try:
        value = OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        value = None
    if value == text and "$" not in text:
        return text
    # A backslash before "${" says that it is no interpolation, and those before it are doubled.
    return QuotedString(re.sub(r"(\\*)\$\{", r"\1\1\\${", text), Quote.single).with_quotes()


def select_overrides(
    overrides: Iterable[str], ignored: Collection[str] = (), data_class: str = ""
) -> list[str]:
    """The overrides that are choices.

    Args:
        overrides: as on the command line.
        ignored: keys that are none, with all below them, and whole overrides.
        data_class: the full name of the data set's class. The folders of an ``ImageFolder``, or of
            a custom class, are kept, since they say what the data are.
    """
    module, _, name = data_class.rpartition(".")
    if name == "ImageFolder" or (name and not is_below(module, ["sj_taid"])):
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
    if len(name) <= 120 and re.fullmatch(rf"{PLAIN}(,{PLAIN})*", text, re.ASCII):
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


# Hydra names a job's folder in the process that runs the job, which has imported little more than
# this module.
for resolver in (as_float, base_name, folder_name, run_folder):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
