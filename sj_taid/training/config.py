"""Configs: composed by Hydra from ``conf``, and the folder names of a sweep's jobs."""

from __future__ import annotations

import atexit
import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from .._build import is_below

#: In the package a link to the checkout's conf/, which becomes a copy in a wheel. Where git makes
#: plain files of links, the checkout's own.
CONF = next(str(p / "conf") for p in Path(__file__).parents[1:3] if (p / "conf").is_dir())
#: the Hydra version whose behaviour is meant
VERSION = "1.3"
#: an override that names a folder as it is
PLAIN = r"[\w.]+=[\w.]*\w"


def compose(config_name: str, overrides: Sequence[str] = (), **options: Any) -> DictConfig:
    """The config of a command line."""
    with hydra.initialize_config_dir(CONF, version_base=VERSION):
        return hydra.compose(config_name, list(overrides), **options)


def describe_missing(key: str, known: Collection[Any], override: str = "") -> str:
    """The error text for an unknown dotted key, with the nearest of those ``known``.

    ``override`` would add the key.
    """
    parent, dot, name = key.rpartition(".")
    group = parent if not known and Path(CONF, parent, "none.yaml").is_file() else key
    options = sorted(path.stem for path in Path(CONF, group).glob("*.yaml"))
    if chosen := [f"{group}={option}" for option in options if option != "none"]:
        return f"{group} is not chosen; choose {' or '.join(chosen)}"
    near = get_close_matches(name, map(str, known), 1)
    remedy = f"did you mean {parent}{dot}{near[0]}?" if near else "--cfg job shows what there is."
    if override and dot:
        remedy += f" If its class takes it, add {override}"
    return f"no key {key}; {remedy}"


def override_key(override: str) -> str:
    """The key of an override, as ``logger`` of ``~logger``."""
    return override.partition("=")[0].lstrip("+~")


def select_overrides(overrides: Iterable[str], ignored: Collection[str] = ()) -> list[str]:
    """The last override of each key.

    Args:
        overrides: as on the command line.
        ignored: keys that are left out, with all below them, and whole overrides.
    """
    last = {override_key(text): text for text in overrides}
    return [
        text
        for key, text in last.items()
        if text.lstrip("+") not in ignored and not is_below(key, ignored)
    ]


def folder_name(overrides: Sequence[str], ignored: Collection[str] = ()) -> str:
    """The folder of a sweep's job, ``neuron-lif-seed-0`` for ``neuron=lif seed=0``.

    Letters, digits, ``.``, ``_`` and ``-`` alone, at most 120 of them. Where that leaves something
    out, a hash tells the jobs apart.

    Args:
        overrides: the job's.
        ignored: see :func:`select_overrides`.
    """
    text = ",".join(sorted(select_overrides(overrides, ignored))) or "default"
    name = re.sub(r"[^A-Za-z0-9._]+", "-", text)
    if len(name) <= 120 and re.fullmatch(rf"{PLAIN}(,{PLAIN})*", text, re.ASCII):
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{name[:103].strip('-.')}-{digest}".lstrip("-")


class RemoveEmptyFolders(Callback):
    """Removes the empty folders that Hydra made for a job, as for one that was refused."""

    missing: Sequence[Path] | None = None

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.run.dir).absolute()
        self.missing = [path for path in (folder, *folder.parents) if not path.exists()]
        atexit.register(remove_empty, self.missing)  # Ctrl-C ends no job

    def on_job_end(self, config: DictConfig, job_return: Any, **_: Any) -> None:
        of_a_sweep = [Path(config.hydra.runtime.output_dir)]
        remove_empty(of_a_sweep if self.missing is None else self.missing)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, from the innermost on, until one holds something."""
    with suppress(OSError):
        for path in folders:
            path.rmdir()


def base_name(path: str) -> str:
    """The last part of a path, which names a folder of custom images."""
    return Path(path).expanduser().absolute().name


def as_float(number: float | None) -> float | None:
    """The number as a float, which SpikingJelly's neurons insist on; null stays null."""
    return None if number is None else float(number)


# Hydra names a job's folder in the process that runs the job, which has imported little more than
# this module.
for resolver in (as_float, base_name, folder_name):
    OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
