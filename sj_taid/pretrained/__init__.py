"""Trained models by name, from a folder or from the Hugging Face hub; nothing in them is code.

A model is a folder that ``sj-taid export`` writes: ``config.json`` (its class and arguments, the
SHA-256 of its weights, the metrics of its run), ``model.safetensors`` and the card ``README.md``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from .. import _build
from .._extras import needs
from ..thresholds import set_fixed_thresholds

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
HUB = "hf://"
REMEDY = "copy or export it again, or hf download OWNER/NAME --force-download"


def list_models() -> list[str]:
    """The names of the models that come with the package.

    >>> list_models()
    ['classifier_digits_alif', ...]
    """
    return sorted(path.parent.name for path in Path(__file__).parent.glob(f"*/{CONFIG}"))


def create_model(source: str | Path, pretrained: bool = False) -> nn.Module:
    """Create a model of :func:`.list_models`, or one from elsewhere, in eval mode.

    Args:
        source: a name of :func:`.list_models`; a folder that ``sj-taid export`` has written; or
            ``hf://OWNER/NAME`` on the Hugging Face hub (extra ``hub``), with ``@REVISION`` after it
            for a certain revision.
        pretrained: load its weights (needs ``safetensors``); otherwise it is untrained.

    Raises:
        ValueError: no model there; a config that does not fit this version, or names other classes
            than those of this package and SpikingJelly's neurons and surrogates; weights of another
            model or with another digest than the config's.
        FileNotFoundError: a file is missing.
        ModuleNotFoundError: a package is missing; the message says how to get it.

    >>> model = create_model("fsvae_digits_taid", pretrained=True)
    >>> model.sample(4).shape
    torch.Size([4, 1, 16, 16])
    """
    folder = _locate(source, pretrained)
    config = _read_config(folder / CONFIG)
    model = build(config["model"])
    if pretrained:
        _load_weights(model, folder / WEIGHTS, config)
    return model.eval()


def read_config(source: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a model: ``model``, ``sha256`` and the ``metrics`` of its run.

    And ``fixed_thresholds``, those that are no parameters, where there are some.

    Args:
        source: a name of :func:`.list_models`, or a model's folder.

    Raises:
        ValueError: no such file as ``sj-taid export`` writes.

    >>> sorted(read_config("fsvae_digits_taid"))
    ['metrics', 'model', 'sha256']
    """
    return _read_config(_locate(source, pretrained=False) / CONFIG)


def build(config: dict[str, Any]) -> nn.Module:
    """Build the untrained model of a config's entry ``model``."""
    try:
        model = _build.build(config)
        if not isinstance(model, nn.Module):
            raise ValueError(f"it is a {type(model).__name__}")
    except ValueError as error:
        raise ValueError(
            f"{CONFIG} does not describe a model of this version of sj-taid: {error}; its metrics "
            "name the version that it is of"
        ) from error
    # The memory layout that runs are trained in: another one rounds otherwise.
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _locate(source: str | Path, pretrained: bool) -> Path:
    """The model's folder, downloaded if need be."""
    source = str(source)
    if source in list_models():
        return Path(__file__).parent / source
    folder = _download(source, pretrained) if source.startswith(HUB) else Path(source).expanduser()
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"there is no model {source!r}; give one of {', '.join(list_models())}, a folder that "
            f"sj-taid export has written, or {HUB}OWNER/NAME"
        )
    return folder


def _download(source: str, pretrained: bool) -> Path:
    with needs("huggingface_hub"):
        from huggingface_hub import snapshot_download
    repository, _, revision = source.removeprefix(HUB).partition("@")
    files = [CONFIG, CARD, *[WEIGHTS] * pretrained]
    try:
        there = snapshot_download(repository, revision=revision or None, allow_patterns=files)
    except (OSError, ValueError) as error:  # the hub's own are all one of them
        raise ValueError(
            f"{source} cannot be downloaded: {shorten(str(error), 300)}; expected "
            f"{HUB}OWNER/NAME or {HUB}OWNER/NAME@REVISION, a model that is there and that you may "
            "read (hf auth login), and internet on first use"
        ) from error
    return Path(there)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; {REMEDY}") from error
    for name, kind in {"model": dict, "sha256": str, "metrics": dict}.items():
        if not (isinstance(config, dict) and isinstance(config.get(name), kind)):
            raise ValueError(f"{path} has no {name!r}, a {kind.__name__}; {REMEDY}")
    return config


def _load_weights(model: nn.Module, path: Path, config: dict[str, Any]) -> None:
    with needs("safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != config["sha256"]:
        raise ValueError(
            f"expected weights with the SHA-256 {config['sha256']}, as {CONFIG} states, but {path} "
            f"has {digest}: they are damaged or of another model; {REMEDY}"
        )
    try:
        model.load_state_dict(load(content))
        set_fixed_thresholds(model, config.get("fixed_thresholds", {}))
    except (RuntimeError, ValueError, AttributeError, SafetensorError) as error:
        said = shorten(str(error), 300)  # torch names every key
        raise ValueError(f"{path} does not fit {CONFIG}: {said}; {REMEDY}") from error
