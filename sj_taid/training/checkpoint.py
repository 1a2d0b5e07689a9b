"""Checkpoints: reading what Lightning saves, loading it into a model, writing it atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from ..calibration import set_fixed_thresholds
from .files import atomic_save


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what Lightning saved: a whole checkpoint, which runs no code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["state_dict"]
        return checkpoint
    except Exception as error:  # each kind of damage has an error of its own
        raise ValueError(
            f"{path} is not a whole checkpoint of tensors ({type(error).__name__}); replace it, or "
            "move it away and give the same command again to train from the start"
        ) from error


def load_weights(model: nn.Module, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Load the model's part of the checkpoint that was read from ``path``."""
    state = checkpoint["state_dict"].items()
    try:
        model.load_state_dict(
            {k.removeprefix("model."): v for k, v in state if k.startswith("model.")}
        )
        # Calibrated thresholds are not the config's.
        set_fixed_thresholds(model, checkpoint.get("fixed_thresholds", {}))
    except (RuntimeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a checkpoint of this run's model ({error}); leave out "
            "the choices that change the model, or give a checkpoint of this run"
        ) from error


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a new file, which replaces the old one when it is whole.

    Lightning's own writes into the temporary folder; where that is another file system, the file is
    copied over the old one, and a kill or a full disk in that moment leaves half of it.
    """

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        atomic_save(Path(path), checkpoint)


class LastCheckpoint(ModelCheckpoint):
    """Checkpoint of the last epoch; a subclass, since a user may add a ``ModelCheckpoint``."""


class BestCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint of the best epoch, found again after the run's folder was moved."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        path = Path(str(self.dirpath), f"{self.filename}.ckpt")
        if path.is_file():
            best = {
                "best_model_path": str(path),
                "kth_best_model_path": str(path),
                "best_k_models": {str(path): state["best_model_score"]},
            }
            super().load_state_dict({**state, **best, "dirpath": self.dirpath})


def checkpoint_callbacks(last: Path, best: Path, monitor: str | None) -> list[ModelCheckpoint]:
    """One file for the last epoch, and where a metric chooses it one for the best."""
    options: dict[str, Any] = {
        "dirpath": last.parent,
        "enable_version_counter": False,
        "save_on_train_epoch_end": True,
    }
    callbacks: list[ModelCheckpoint] = [LastCheckpoint(filename=last.stem, **options)]
    if monitor:
        options |= {"filename": best.stem, "monitor": monitor, "mode": "max"}
        callbacks.insert(0, BestCheckpoint(**options))  # the last one keeps the state of the best
    return callbacks
