"""Compose configs with Hydra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
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
    """The config of a command line; configs of ``folder`` are found too."""
    more = [f"hydra.searchpath=[file://{folder}]"] if folder != CONF else []
    with hydra.initialize_config_dir(CONF, version_base=VERSION):
        return hydra.compose(config_name, [*more, *overrides], **options)
