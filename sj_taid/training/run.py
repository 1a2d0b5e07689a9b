"""A run and its folder: what is written there, and how a checkpoint becomes a model again."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .. import data
from ..ops.surrogate import DERIVATIVES
from .files import replacing

CONFIG = "config.yaml"
METRICS = "metrics.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"

# Lightning's notes on devices and services are left out; its warnings stay. Here, where the
# processes of a parallel sweep pass too: they never see train.py as a module.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
# Lightning's own use of torch, at every run: nothing that who runs it can change.
warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")

#: A run's config names classes; when a checkpoint is loaded, no others are ever called.
TRUSTED_TARGETS = {
    "sj_taid.training.autoencoding.Autoencoding",
    "sj_taid.training.classification.Classification",
    "sj_taid.training.generation.Generation",
    *(f"sj_taid.data.{name}" for name in data.__all__),
    "torch.optim.lr_scheduler.CosineAnnealingLR",
    "sj_taid.model.Autoencoder",
    "sj_taid.model.Classifier",
    "sj_taid.model.FSVAE",
    "sj_taid.model.VAE",
    "sj_taid.ALIFNode",
    "sj_taid.TAID",
    "sj_taid.FixedDecoder",
    "spikingjelly.activation_based.neuron.LIFNode",
    "spikingjelly.activation_based.neuron.ParametricLIFNode",
    *(f"spikingjelly.activation_based.surrogate.{name}" for name in DERIVATIVES),
}


@rank_zero_only
def save_config(cfg: DictConfig, folder: Path) -> None:
    with replacing(folder / CONFIG) as path:
        path.write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")


def save_metrics(metrics: dict[str, Any], folder: Path) -> None:
    with replacing(folder / METRICS) as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def load_metrics(folder: Path) -> dict[str, Any]:
    """What a finished run left.

    Raises:
        FileNotFoundError: the run is not finished.
    """
    path = folder / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"no {METRICS} in {folder}: finish the run first")
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder, until the block or this process ends.

    Raises:
        RuntimeError: another process holds it.
    """
    if rank_zero_only.rank != 0:  # the first process of a distributed run holds it for all
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / LOCK).acquire(blocking=False)
    except Timeout as error:
        raise RuntimeError(
            f"another process is running in {folder}; wait until it ends, or choose another folder "
            "with hydra.run.dir=... (for a sweep hydra.sweep.dir=...)"
        ) from error
    with lock:
        yield


def places(hydra_cfg: DictConfig) -> list[str]:
    """The keys that are no choices: where things lie, and how it looks."""
    return list(hydra_cfg.job.config.override_dirname.exclude_keys)


def command(script: str, hydra_cfg: DictConfig) -> str:
    """The command line, for another machine: without where things lie here."""
    apart = places(hydra_cfg)
    overrides = {text.partition("=")[0].lstrip("+~"): text for text in hydra_cfg.overrides.task}
    chosen = [text for key, text in overrides.items() if not is_below(key, apart)]
    return shlex.join(["python", f"experiments/{script}", *chosen])


def is_below(key: str, keys: Iterable[str]) -> bool:
    """Whether ``key`` is one of ``keys`` or stands below one."""
    return any(f"{key}.".startswith(f"{other}.") for other in keys)


def finished(
    cfg: DictConfig, folder: Path, apart: Iterable[str], may_differ: bool = False
) -> dict[str, Any] | None:
    """The metrics of the run in ``folder``; None where there is none yet or it is half done.

    Args:
        cfg: the run's config.
        folder: the run's folder.
        apart: keys that may differ, with all below them.
        may_differ: a run with another config goes on with this one, so it is half done.

    Raises:
        FileExistsError: ``folder`` holds a run with another config, and it may not differ.
    """
    if (folder / CONFIG).is_file():
        there = _flat(OmegaConf.to_container(OmegaConf.load(folder / CONFIG)))
        here = _flat(OmegaConf.to_container(cfg, resolve=True))
        differing = [
            f"{key} ({there.get(key)}, now {here.get(key)})"
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key) and not is_below(key, apart)
        ]
        if differing and may_differ:
            return None
        if differing:
            raise FileExistsError(
                f"{folder} holds a run that differs in {', '.join(differing)}; go on with its own "
                "config, choose another folder with hydra.run.dir=... (for a sweep "
                "hydra.sweep.dir=...), or delete this one"
            )
    return load_metrics(folder) if (folder / METRICS).is_file() else None


def last_checkpoint(folder: Path) -> Path | None:
    """Where a half-done run goes on."""
    path = folder / CHECKPOINTS / "last.ckpt"
    return path if path.is_file() else None


def find_checkpoint(place: str | Path) -> Path:
    """The checkpoint at ``place``: the file itself, or the last one of a run's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(place).expanduser().absolute()
    checkpoint = last_checkpoint(path) if path.is_dir() else path
    if checkpoint is None or not checkpoint.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}; a run leaves it in <run folder>/{CHECKPOINTS}/"
        )
    return checkpoint


def resuming(arguments: list[str]) -> list[str]:
    """The command line that goes on with the run which ``resume=...`` names, in its own folder.

    It repeats what the run was started with. ``arguments`` come after that, so they win.

    Raises:
        FileNotFoundError: no checkpoint there, or Hydra's notes of the command line are gone.
    """
    named = [argument for argument in arguments if argument.startswith("resume=")]
    if not named:
        return arguments
    checkpoint = find_checkpoint(named[-1].removeprefix("resume=").strip("'\""))
    folder = checkpoint.parents[1]
    notes = folder / ".hydra" / "overrides.yaml"
    if not notes.is_file():
        raise FileNotFoundError(
            f"no {notes}, where Hydra notes what a run was started with; repeat that command "
            f"with hydra.run.dir={folder} instead, and it goes on"
        )
    others = [argument for argument in arguments if argument not in named]
    # Quoted: a sweep's folders have = and , in their names.
    here = [f'hydra.run.dir="{folder}"', f'resume="{checkpoint}"']
    return [*OmegaConf.load(notes), *here, *others]


def folder_name(overrides: str) -> str:
    """A job's folder: named by its overrides, cut where a file system takes no longer name."""
    if len(overrides) <= 200:
        return overrides
    return f"{overrides[:180]}...{hashlib.sha256(overrides.encode()).hexdigest()[:16]}"


# Here for the processes of a parallel sweep, as above.
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def _flat(node: Any, key: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries, by their dotted keys."""
    if not isinstance(node, dict):
        return {key: node}
    return {
        name: leaf
        for child, value in node.items()
        for name, leaf in _flat(value, f"{key}.{child}" if key else str(child)).items()
    }


def load_model(checkpoint: str | Path) -> tuple[nn.Module, DictConfig]:
    """The model of a checkpoint or of a run's folder, in eval mode, and the config of its run.

    Raises:
        FileNotFoundError: no checkpoint there, or no config beside it.
        ValueError: not a checkpoint, damaged, of another model, or a config that names foreign
            classes.
    """
    path = find_checkpoint(checkpoint)
    config = path.parent.parent / CONFIG
    if not config.is_file():
        raise FileNotFoundError(
            f"no {CONFIG} at {config}; keep a checkpoint in its run's folder, "
            f"<run folder>/{CHECKPOINTS}/"
        )
    cfg = OmegaConf.load(config)
    model = build(cfg.model)
    state = read_checkpoint(path)["state_dict"]
    try:
        model.load_state_dict(
            {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        )
    except RuntimeError as error:
        raise _unusable(path, error) from error
    return model.eval(), cfg


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What Lightning left in a checkpoint.

    Raises:
        ValueError: not a checkpoint, or damaged.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["state_dict"]
    except Exception as error:  # each kind of damage has an error of its own
        raise _unusable(path, error) from error
    return checkpoint


def _unusable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is not a whole checkpoint of this run's model "
        f"({type(error).__name__}: {error}); use another one of {path.parent}, or train again"
    )


def build(node: DictConfig, **arguments: Any) -> Any:
    """Instantiate a part of a run's config.

    Raises:
        ValueError: it names foreign classes.
    """
    # Resolved first, so that what is checked is what is built.
    config = OmegaConf.to_container(node, resolve=True)
    _check_targets(config)
    return instantiate(config, **arguments)


def _check_targets(node: Any) -> None:
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None and target not in TRUSTED_TARGETS:
            raise ValueError(
                f"the run's config names {target!r}, but a checkpoint may use only "
                f"{', '.join(sorted(TRUSTED_TARGETS))}; is this checkpoint from a trusted source?"
            )
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            _check_targets(child)
