"""Compose configs with Hydra, and instantiate what they name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import hydra.utils
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

#: In the package a link to the checkout's conf/, which becomes a copy in a wheel. Where git makes
#: plain files of links, the checkout's own.
CONF = next(str(p / "conf") for p in Path(__file__).parents[1:3] if (p / "conf").is_dir())
#: the Hydra version whose behaviour is meant
VERSION = "1.3"


def base_name(place: str) -> str:
    """The last part of a place, which names a folder of images of one's own."""
    return Path(place).expanduser().absolute().name


OmegaConf.register_new_resolver("base_name", base_name, replace=True)


def main(config_name: str, function: Callable[[DictConfig], Any]) -> None:
    """Run ``function`` on what the command line composes, once or in a sweep."""
    hydra.main(CONF, config_name, VERSION)(function)()


def compose(
    config_name: str, overrides: Sequence[str] = (), folder: str = CONF, **options: Any
) -> DictConfig:
    """The config of a command line; the package's configs come after those of ``folder``."""
    with hydra.initialize_config_dir(folder, version_base=VERSION):
        if folder != CONF:
            places = create_config_search_path(folder)
            places.append("sj-taid", f"file://{CONF}")
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2("sj-taid", places)
        return hydra.compose(config_name, list(overrides), **options)


def instantiate(config: Any, **arguments: Any) -> Any:
    """Build what a config names.

    Who may be named is for :func:`sj_taid.training.run.check_targets` to say.
    """
    return hydra.utils.instantiate(config, **arguments)


def targets(node: Any) -> Iterator[Any]:
    """All that Hydra would call, and all that it would resolve into something else first."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from targets(child)
    elif isinstance(node, str) and "${" in node:
        yield node
