"""Callbacks of a run: progress, history and random numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import rich
import torch
from lightning.pytorch.callbacks import RichProgressBar, Timer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread
from rich.progress import track

from .._internal.context import eval_mode, seeded
from ..monitoring import monitor, notes_on_thresholds, warn_of
from ..nets.neurons import find_neurons
from .plot import draw_curves, draw_parameters

log = logging.getLogger(__name__)


def has_viewer() -> bool:
    """Whether there is a terminal or a notebook: in a file rich's bars would be blank lines."""
    console = rich.get_console()
    return console.is_interactive or console.is_jupyter


def show_progress(items: Iterable[Any], description: str) -> Iterable[Any]:
    """The items, under a progress bar that goes away at their end, or after a line that stays."""
    if not has_viewer():
        log.info("%s", description)
    return track(items, description, transient=True, disable=not has_viewer())


class ProgressBar(RichProgressBar):
    """Lightning's rich bar; where there is no viewer, a line for each epoch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not has_viewer():
            self.disable()

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        super().on_train_start(trainer, task)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        text = (
            f"Training {type(task.model).__name__} on {data.name}, {len(data.train_set)} samples, "
            f"by {trainer.strategy.root_device} in {trainer.default_root_dir}"
        )
        if trainer.current_epoch:
            text += f"; resumes after epoch {trainer.current_epoch} of {trainer.max_epochs}"
        if trainer.is_global_zero:
            log.info("%s", text)

    def on_train_epoch_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, task)
        if trainer.is_global_zero and not has_viewer():
            shown = sorted(f"{k} {float(x):.4g}" for k, x in trainer.progress_bar_metrics.items())
            epoch = f"Epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
            log.info("%s: %s", epoch, ", ".join(shown))


@torch.no_grad()
def watch_neurons(trainer: L.Trainer, task: Any, x: torch.Tensor | None = None) -> monitor | None:
    """A monitor of a task's neurons, which has seen a pass of ``x``; None where there are none."""
    if not find_neurons(task.model):
        return None
    eager = torch.compiler.set_stance("force_eager")
    precision = trainer.precision_plugin.forward_context()
    with monitor(task.model) as watch, eval_mode(task.model), seeded(0), eager, precision:
        if x is not None:
            task.model(task.model_input(x))
    return watch


class History(L.Callback):
    """Metrics and neurons' states of each epoch, drawn into ``folder`` after the test."""

    def __init__(self, folder: Path, draw: bool) -> None:
        self.folder = folder
        self.draw = draw
        self.neurons: list[dict[str, float]] = []  # the first are of the start
        self.epochs: list[dict[str, float]] = []
        self.validated: torch.Tensor | None = None  # some samples, where an epoch was validated

    def on_fit_start(self, trainer: L.Trainer, task: Any) -> None:
        if not self.neurons:  # not so when a run is resumed
            self.neurons.append(self.describe_neurons(trainer, task))

    def on_validation_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, *_: Any) -> None:
        self.validated = None if trainer.sanity_checking else batch[0][:8]

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        # Lightning keeps the values of an earlier validation.
        ours = ("train/",) if self.validated is None else ("train/", "val/")
        logged = trainer.callback_metrics.items()  # other callbacks' too, such as learning rates
        self.epochs.append({name: float(x) for name, x in logged if name.startswith(ours)})
        self.neurons.append(self.describe_neurons(trainer, task))
        self.validated = None
        for tracker in trainer.loggers:
            tracker.log_metrics(self.neurons[-1], trainer.global_step)

    def describe_neurons(self, trainer: L.Trainer, task: Any) -> dict[str, float]:
        """Each layer's tau, threshold and, if trackers show it, firing rate in the validation."""
        watch = watch_neurons(trainer, task, self.validated if trainer.loggers else None)
        layers = watch.layers() if watch else {}
        return {
            f"{name}/{path}": value
            for path, state in layers.items()
            for name, value in asdict(state).items()
            if value is not None
        }

    def on_test_end(self, trainer: L.Trainer, task: Any) -> None:
        if not trainer.is_global_zero:
            return
        warn_of(notes_on_thresholds(task.model))
        if not self.draw:
            return
        loader: Any = trainer.test_dataloaders
        images, _ = next(iter(loader))
        task.draw(images[:32].to(task.device), self.folder)
        if self.epochs:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            part = "test" if data.validation_set is None else "validation"
            draw_curves(self.epochs, self.folder / "curves.png", f"{part} set")
            if self.neurons[0]:
                draw_parameters(self.neurons, self.folder / "parameters.png")
        for tracker in trainer.loggers:
            if isinstance(tracker, TensorBoardLogger):
                for path in sorted(self.folder.glob("*.png")):
                    tracker.experiment.add_image(path.stem, imread(path), dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        return {"neurons": self.neurons, "epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.neurons, self.epochs = state["neurons"], state["epochs"]


class Stopwatch(Timer):
    """Lightning's ``Timer``; a subclass, since state is saved by class, and a user may add one."""


class RandomNumbers(L.Callback):
    """Restores the random state, so a resumed run draws what it would have drawn uninterrupted."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        # Of this process's own device: all are seeded alike, and the first writes for all.
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else ()
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state

    def on_fit_start(self, trainer: L.Trainer, task: Any) -> None:
        # Here, before Lightning makes the loader's iterator, which draws the epoch's order.
        if self.loaded:
            torch.set_rng_state(self.loaded["cpu"])
            cuda = self.loaded["cuda"]
            if torch.cuda.is_available() and len(cuda):
                torch.cuda.set_rng_state(cuda)
            self.loaded = {}
