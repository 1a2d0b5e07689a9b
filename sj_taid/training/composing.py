"""Composing configs and building what they name: Hydra 1.3 and 1.4 from one code."""

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

#: 1.3 asks which version's behaviour is meant; 1.4 has one, warns of being asked for it, and wants
#: a list of what a config may call, of which 1.3 knows nothing.
IS_1_3 = hydra.__version__.startswith("1.3.")
_VERSION: dict[str, Any] = {"version_base": "1.3"} if IS_1_3 else {}
_HYDRAS_OWN: dict[str, Any] = {} if IS_1_3 else {"execution_whitelist": []}
register_resolver: Any = getattr(OmegaConf, f"register_{'new_' * IS_1_3}resolver")


def base_name(place: str) -> str:
    """The last part of a place, which names a folder of images of one's own."""
    return Path(place).expanduser().absolute().name


register_resolver("base_name", base_name, replace=True)


def main(config_name: str, function: Callable[[DictConfig], Any]) -> None:
    """Run ``function`` on what the command line composes, once or in a sweep."""
    hydra.main(CONF, config_name, **_VERSION, **_HYDRAS_OWN)(function)()


def compose(
    config_name: str, overrides: Sequence[str] = (), folder: str = CONF, **options: Any
) -> DictConfig:
    """The config of a command line; the package's configs come after those of ``folder``."""
    with hydra.initialize_config_dir(folder, **_VERSION):
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
    if not IS_1_3:
        is_config = OmegaConf.is_config(config)
        named = set(targets(OmegaConf.to_container(config, resolve=True) if is_config else config))
        defined = [hydra.utils.get_object(target) for target in named]
        named |= {f"{found.__module__}.{found.__qualname__}" for found in defined}
        arguments["_execution_whitelist_"] = sorted(named)
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
