"""Trained models, by name or from a folder; nothing in them is code.

A model is a folder that :func:`save_model` writes: ``config.json`` (its class and arguments, the
SHA-256 of its weights, the metrics of its run) and ``model.safetensors``. Those of the package have
a card, too, ``README.md``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._internal.build import build as build_object
from .._internal.checks import expand_home
from .._internal.extras import needs
from ..calibration import set_fixed_thresholds
from ..nets.neurons import copy_net

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"


def list_models() -> list[str]:
    """The names of the models that come with the package.

    >>> list_models()
    ['classifier_digits_alif', ...]
    """
    return sorted(path.parent.name for path in Path(__file__).parent.glob(f"*/{CONFIG}"))


def create_model(source: str | Path, pretrained: bool = False) -> nn.Module:
    """Create a model of :func:`.list_models`, or one from elsewhere, in eval mode.

    Args:
        source: a name of :func:`.list_models`, or a folder of :func:`.save_model`.
        pretrained: load its weights (needs ``safetensors``); otherwise it is untrained.

    Raises:
        ValueError: no model there, a config that does not fit this version or names foreign
            classes, or weights of another model.
        ModuleNotFoundError: ``pretrained`` without safetensors.

    >>> model = create_model("fsvae_digits_taid", pretrained=True)
    >>> model.sample(4).shape
    torch.Size([4, 1, 16, 16])
    """
    config = read_config(source)
    model = build(config["model"])
    if pretrained:
        unfit = f"{WEIGHTS} of {source} is of another model than its {CONFIG}"
        _load(model, _read_weights(source, config), config, unfit)
    return model.eval()


def start_from(model: nn.Module, source: str | Path) -> str:
    """Load the weights of a trained model into ``model``, to train it further.

    An ESVAE's flow is left as it is, since it is fitted after training. Returns the SHA-256 of the
    trained model's weights.

    Args:
        model: of the same layers.
        source: as of :func:`.create_model`.

    Raises:
        ValueError: layers that differ, and nothing is loaded; ``source`` as in
            :func:`.create_model`.
    """
    config = read_config(source)
    flows = {k: v for k, v in model.state_dict().items() if k.startswith("flow.")}
    trained = _read_weights(source, config).items()
    weights = {k: v for k, v in trained if not k.startswith("flow.")} | flows
    unfit = f"start_from={source} has other layers; choose model and data as its {CARD} says"
    _load(copy_net(model), weights, config, unfit)  # torch loads what fits before it raises
    _load(model, weights, config, unfit)
    return config["sha256"]


def read_config(source: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a model: ``model``, ``sha256`` and the ``metrics`` of its run.

    And ``fixed_thresholds``, those that are no parameters, where there are some.

    Raises:
        ValueError: no model there, or the ``config.json`` of another program.

    >>> sorted(read_config("fsvae_digits_taid"))
    ['metrics', 'model', 'sha256']
    """
    path = _locate(source) / CONFIG
    try:
        config = json.loads(path.read_bytes())
        config["model"], config["sha256"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} describes no model of sj-taid: {error!r}") from error
    return config


def __getattr__(name: str) -> Any:
    if name == "save_model":
        from ..training.save_model import save_model  # which needs the extra train

        return save_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build(config: dict[str, Any]) -> nn.Module:
    """Build the untrained model of a config's entry ``model``."""
    from ..model.prepare import prepare  # and all models, without which sj_taid is imported

    try:
        model = build_object(config)
        if not isinstance(model, nn.Module):
            raise ValueError(f"it is a {type(model).__name__}")
    except ValueError as error:
        raise ValueError(f"{CONFIG} describes no model of this version: {error}") from error
    return prepare(model)


def _locate(source: str | Path) -> Path:
    """The model's folder."""
    if str(source) in list_models():
        return Path(__file__).parent / source
    folder = expand_home(source)
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"no model {str(source)!r}: give a folder of save_model, or one of "
            f"{', '.join(list_models())}"
        )
    return folder


def _read_weights(source: str | Path, config: dict[str, Any]) -> dict[str, Tensor]:
    with needs("safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load
    path = _locate(source) / WEIGHTS
    if not path.is_file():
        raise ValueError(f"no weights at {path}; copy the whole folder, or leave pretrained out")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != config["sha256"]:
        raise ValueError(
            f"{path} is damaged or of another model: its SHA-256 is {digest}, not "
            f"{config['sha256']}, as {CONFIG} states"
        )
    try:
        return load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is no file of safetensors: {error}") from error


def _load(model: nn.Module, weights: dict[str, Tensor], config: dict[str, Any], unfit: str) -> None:
    try:
        model.load_state_dict(weights)
        set_fixed_thresholds(model, config.get("fixed_thresholds", {}))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{unfit}: {str(error).splitlines()[-1].strip():.200}") from error
