"""What a run does beside training: the progress bar, and the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from .plot import draw_curves, draw_parameters, neuron_parameters


class ProgressBar(RichProgressBar):
    """Lightning's rich bar without the logger's version, which says nothing here."""

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items


class Pictures(L.Callback):
    """Follows figures and neurons' parameters over training, and draws everything at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history: list[dict[str, dict[str, float]]] = []
        self.epochs: list[dict[str, float]] = []

    def on_fit_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if not self.history:  # not so when a run is resumed
            self.history.append(neuron_parameters(task.model))

    def on_train_epoch_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.history.append(neuron_parameters(task.model))
        self.epochs.append({name: float(x) for name, x in trainer.callback_metrics.items()})

    def on_test_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        images, _ = next(iter(trainer.test_dataloaders))
        task.draw(images[:32].to(task.device), self.folder)
        if self.epochs:
            draw_curves(self.epochs, self.folder / "curves.png")
            if self.history[0]:
                draw_parameters(self.history, self.folder / "parameters.png")

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.epochs = state["history"], state["epochs"]
