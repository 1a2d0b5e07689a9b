"""What a run does beside training: progress, the pictures, and writing checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar, WeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from rich.progress import track

from ..monitoring import warn_at_bound
from .files import atomic_write, unwritable
from .plot import draw_curves, draw_parameters, neuron_parameters


class ProgressBar(RichProgressBar):
    """Lightning's rich bar without the logger's version, which says nothing here."""

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items


class FollowTest(L.Callback):
    """Shows how far a test is, where no training's progress bar does."""

    def on_test_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        batches = range(int(sum(trainer.num_test_batches)))
        self.batches = iter(track(batches, "Testing, in batches", transient=True))

    def on_test_batch_start(self, *_: Any) -> None:
        next(self.batches)

    def on_test_end(self, *_: Any) -> None:
        next(self.batches, None)


class Pictures(L.Callback):
    """Follows figures and neurons' parameters over training, and draws everything at its end.

    Args:
        folder: where to draw.
        draw: whether to.
    """

    def __init__(self, folder: Path, draw: bool) -> None:
        self.folder = folder
        self.draw = draw
        self.history: list[dict[str, dict[str, float]]] = []
        self.epochs: list[dict[str, float]] = []

    def on_fit_start(self, trainer: L.Trainer, task: Any) -> None:
        if not self.history:  # not so when a run is resumed
            self.history.append(neuron_parameters(task.model))

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        self.history.append(neuron_parameters(task.model))
        logged = trainer.callback_metrics.items()  # other callbacks' too, such as learning rates
        ours = {name: float(x) for name, x in logged if name.startswith(("train/", "val/"))}
        self.epochs.append(ours)

    def on_test_end(self, trainer: L.Trainer, task: Any) -> None:
        if not trainer.is_global_zero:
            return
        warn_at_bound(dict(task.model.named_modules()))
        if not self.draw:
            return
        loader: Any = trainer.test_dataloaders
        images, _ = next(iter(loader))
        task.draw(images[:32].to(task.device), self.folder)
        if self.epochs:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            part = "test" if data.validation_set is None else "validation"
            draw_curves(self.epochs, self.folder / "curves.png", f"{part} set")
            if self.history[0]:
                draw_parameters(self.history, self.folder / "parameters.png")

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.epochs = state["history"], state["epochs"]


class RandomNumbers(L.Callback):
    """Lets a resumed run draw the random numbers that it would have drawn without the break."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        # Of this process's own device: all are seeded alike, and the first writes for all.
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else ()
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state

    def on_fit_start(self, trainer: L.Trainer, task: Any) -> None:
        # Later Lightning makes the loader's iterator, which draws the epoch's order.
        if self.loaded:
            torch.set_rng_state(self.loaded["cpu"])
            cuda = self.loaded["cuda"]
            if torch.cuda.is_available() and len(cuda):
                torch.cuda.set_rng_state(cuda[0] if isinstance(cuda, list) else cuda)  # older runs
            self.loaded = {}


class LastEpoch(Checkpoint):
    """Calls the task's ``on_last_epoch_end``: as a checkpoint, which comes after early stopping."""

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        if (
            trainer.should_stop
            or trainer.current_epoch + 1 == trainer.max_epochs
            or trainer.global_step == trainer.max_steps  # that is -1 without a limit
        ):
            kept = task
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):  # takes the trained ones' place later
                    kept = callback._average_model.module  # type: ignore[union-attr]
            task.on_last_epoch_end(trainer.datamodule, kept)  # type: ignore[attr-defined]


class BestCheckpoint(Checkpoint):
    """Keeps the checkpoint of the epoch that was best on the validation set, beside the last.

    Of equals it is the first.

    Args:
        path: of the checkpoint.
        figure: as it is logged; higher is better.
    """

    def __init__(self, path: Path, figure: str) -> None:
        self.path = path
        self.figure = figure
        self.value, self.epoch = -math.inf, 0

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        value = float(trainer.callback_metrics.get(self.figure, -math.inf))
        if value > self.value:
            self.value, self.epoch = value, trainer.current_epoch + 1
            trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.path.is_file():  # not so where a run goes on in another folder
            self.value, self.epoch = state["value"], state["epoch"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the one before, which is there until the new one is whole.

    Lightning's own writes into the temporary folder; where that is another file system, the file is
    copied over the one before, and a kill or a full disk in that moment leaves half of it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        with atomic_write(Path(path)) as whole:
            try:
                torch.save(checkpoint, whole)
            except RuntimeError as error:
                if "inline_container" not in str(error):  # torch's own writer of files
                    raise
                raise unwritable(Path(path), error) from error
