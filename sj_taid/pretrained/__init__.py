"""Trained models by name, from a folder, a URL or the Hugging Face hub; nothing in them is code.

A model is a folder of three files, which ``sj-taid export`` writes: ``config.json`` (its class and
resolved arguments, the SHA-256 of its weights, and the metrics of its run), ``model.safetensors``
and the card ``README.md``. Those in this folder come with the package.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .._extras import needs
from ..thresholds import set_fixed_thresholds

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
HUB = "hf://"

#: A config names classes. Those of these modules that are torch modules do nothing but what their
#: arguments say, and no others are called.
MODULES = (
    "sj_taid",
    "sj_taid.model",
    "spikingjelly.activation_based.neuron",
    "spikingjelly.activation_based.surrogate",
)


def list_models() -> list[str]:
    """The names of the models that come with the package.

    >>> list_models()
    ['classifier_digits_alif', ...]
    """
    return sorted(path.parent.name for path in Path(__file__).parent.glob(f"*/{CONFIG}"))


def create_model(
    source: str | Path, pretrained: bool = False, *, sha256: str | None = None
) -> nn.Module:
    """A model of :func:`.list_models`, or one that is elsewhere, in eval mode.

    Args:
        source: a name of :func:`.list_models`; a folder that ``sj-taid export`` has written; the
            URL of such a folder; or ``hf://OWNER/NAME`` on the Hugging Face hub (extra ``hub``), of
            a certain revision with ``@REVISION`` behind. What is downloaded from a URL is kept in
            ``$SJ_TAID_CACHE/models`` (``~/.cache/sj-taid/models``) and taken from there next time.
        pretrained: with its weights (needs ``safetensors``); otherwise it is as before training.
        sha256: the digest that the weights must have. By default the one in the config, which tells
            damage, but not who made it.

    Raises:
        ValueError: ``sha256`` without ``pretrained``; no model there; a config that names other
            classes than the models of :mod:`sj_taid.model`, SpikingJelly's neurons and surrogates,
            or does not fit this version; weights of another digest or of another model.
        FileNotFoundError: a file is missing, or a URL cannot be reached.
        ModuleNotFoundError: a package is missing; the message says how to get it.

    >>> model = create_model("fsvae_digits_taid", pretrained=True)
    >>> model.sample(4).shape
    torch.Size([4, 1, 16, 16])
    """
    if sha256 is not None and not pretrained:
        raise ValueError("sha256= is of weights, which pretrained=True asks for: give both")
    place = _fetched(str(source), pretrained)
    config = _config(place)
    model = build(config["model"])
    if pretrained:
        _load(model, place, config, sha256)
    # The layout that runs are trained in: another rounds otherwise.
    return model.to(memory_format=torch.channels_last).eval()


def push_to_hub(source: str | Path, repository: str, *, private: bool = False) -> str:
    """Put a model on the Hugging Face hub, from where ``hf://OWNER/NAME`` gets it.

    Needs the extra ``hub``, and a login: ``hf auth login``.

    Args:
        source: a name of :func:`.list_models`, or a folder that ``sj-taid export`` has written.
        repository: ``OWNER/NAME``; made if it is not there.
        private: whether a repository that is made is private.

    Returns:
        The URL of the commit.

    Raises:
        ValueError, FileNotFoundError: not a whole model, see :func:`.create_model`.
    """
    with needs("huggingface_hub"):
        from huggingface_hub import HfApi
    create_model(source, pretrained=True)  # what is not whole stays here
    folder = _fetched(str(source), pretrained=True).folder
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    files = [CONFIG, WEIGHTS, CARD]
    done = api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=files)
    return done.commit_url


def read_config(source: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a model: ``model``, ``sha256`` and the ``metrics`` of its run.

    And ``fixed_thresholds``, those that are no parameters, where they are kept.

    Args:
        source: a name of :func:`.list_models`, or a model's folder.

    Raises:
        ValueError: no such file as ``sj-taid export`` writes.

    >>> sorted(read_config("fsvae_digits_taid"))
    ['metrics', 'model', 'sha256']
    """
    return _config(_fetched(str(source), pretrained=False))


def build(node: Any) -> Any:
    """What a part of a config describes: its ``_target_`` called with the rest of it.

    With ``_partial_`` a partial of that, which makes one at each call.

    Raises:
        ValueError: a class that is not to be called, or arguments that it does not take.

    >>> build({"_target_": "sj_taid.FixedDecoder", "T": 8}).T
    8
    """
    if isinstance(node, list):
        return [build(child) for child in node]
    if not isinstance(node, dict):
        return node
    arguments = {key: build(value) for key, value in node.items()}
    if "_target_" not in arguments:
        return arguments
    target = _class(arguments.pop("_target_"))
    if arguments.pop("_partial_", False):
        return partial(target, **arguments)
    try:
        return target(**arguments)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{CONFIG} does not describe a {target.__name__} of this version of sj-taid: {error}; "
            f"the card, {CARD}, names the version that it is of"
        ) from error


def _class(target: Any) -> type[nn.Module]:
    module, _, name = str(target).rpartition(".")
    found = getattr(import_module(module), name, None) if module in MODULES else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{CONFIG} names {target!r}, which is no model or neuron of {MODULES}")
    # What one of these modules imports from elsewhere is not meant.
    if found.__module__.partition(".")[0] not in ("sj_taid", "spikingjelly"):
        raise ValueError(f"{CONFIG} names {target!r}, which {module} does not define")
    return found


class _Place(NamedTuple):
    """A folder that holds a model, and how to get one that is whole where it does not."""

    folder: Path
    remedy: str


def _fetched(source: str, pretrained: bool) -> _Place:
    """Where the model is, downloaded if need be."""
    if source in list_models():
        return _Place(Path(__file__).parent / source, "reinstall sj-taid")
    if source.startswith(HUB):
        with needs("huggingface_hub"):
            from huggingface_hub import snapshot_download
        repository, _, revision = source.removeprefix(HUB).partition("@")
        files = [CONFIG, CARD, *[WEIGHTS] * pretrained]
        there = snapshot_download(repository, revision=revision or None, allow_patterns=files)
        again = (
            f"hf download {repository} --force-download{f' --revision {revision}' * bool(revision)}"
        )
        return _Place(Path(there), f"fetch it anew: {again}")
    if re.match(r"(https?|file)://", source):
        folder = _downloaded(source.rstrip("/"), [CONFIG, *[WEIGHTS] * pretrained])
        return _Place(folder, f"delete {folder}, a copy, and it is fetched anew")
    folder = Path(source).expanduser()
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"there is no model {source!r}; give one of {', '.join(list_models())}, a folder that "
            f"sj-taid export has written, its URL, or {HUB}OWNER/NAME"
        )
    return _Place(folder, "copy the folder anew, or export its run again")


def _downloaded(url: str, files: list[str]) -> Path:
    cache = Path(os.environ.get("SJ_TAID_CACHE", "~/.cache/sj-taid")).expanduser()
    folder = cache / "models" / hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    for name in files:
        if (folder / name).is_file():
            continue
        try:  # to a file beside, which is moved when it is whole
            torch.hub.download_url_to_file(f"{url}/{name}", str(folder / name), progress=False)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise _unwritable(folder, error) from error
            raise FileNotFoundError(
                f"{url}/{name} cannot be fetched ({error}); give the URL of a folder that holds "
                f"{CONFIG} and {WEIGHTS}"
            ) from error
    return folder


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"{folder} cannot be written ({error}); make room, or let SJ_TAID_CACHE name another folder"
    )


def _config(place: _Place) -> dict[str, Any]:
    """What ``config.json`` says, of which every part is there."""
    path = place.folder / CONFIG
    try:
        config = json.loads(_read(path, place))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}; {place.remedy}") from error
    config = config if isinstance(config, dict) else {}
    digest = str(config.get("sha256"))
    expected = {
        "model": ("a class and its arguments", _is_call(config.get("model"))),
        "sha256": ("64 hexadecimal digits", re.fullmatch("[0-9a-f]{64}", digest)),
        "metrics": ("those of a run", isinstance(config.get("metrics"), dict)),
    }
    for name, (what, there) in expected.items():
        if not there:
            raise ValueError(
                f"{path} is not what sj-taid export writes: expected {what} as its {name!r}, "
                f"but got {config.get(name)!r:.80}; {place.remedy}"
            )
    return config


def _is_call(node: Any) -> bool:
    return isinstance(node, dict) and "_target_" in node and not node.get("_partial_")


def _load(model: nn.Module, place: _Place, config: dict[str, Any], asked: str | None) -> None:
    """Load the weights that have the digest asked for, or else the one stated in the config."""
    with needs("safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load
    path = place.folder / WEIGHTS
    weights = _read(path, place)
    digest = hashlib.sha256(weights).hexdigest()
    stated = config["sha256"]
    wanted, whose = stated, f"{CONFIG} states"
    if asked is not None:
        wanted, whose = asked.lower(), "sha256= asks"
    if digest != wanted:
        whole = "it is as exported, so sha256= means another model: correct it, or give that model"
        raise ValueError(
            f"expected weights with the SHA-256 {wanted}, as {whose}, but {path} has {digest}; "
            f"{whole if digest == stated else f'it is damaged or another one: {place.remedy}'}"
        )
    try:
        model.load_state_dict(load(weights))
        set_fixed_thresholds(model, config.get("fixed_thresholds", {}))
    except (RuntimeError, ValueError, AttributeError, SafetensorError) as error:
        raise ValueError(f"{path} does not fit {CONFIG}: {error}; {place.remedy}") from error


def _read(path: Path, place: _Place) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no {path}; sj-taid export writes it: {place.remedy}") from error
