"""What every task has, and what train.py asks of it beside Lightning's hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from ..data import Data


class Task(L.LightningModule):
    """A model and its training.

    ``takes`` says from which data sets it can learn.

    What is logged as ``test/<name>`` becomes ``<name>`` in ``metrics.json``.

    Args:
        model: what is trained.
        optimizer: makes the optimizer from the parameters.
    """

    takes: type[Data] = Data

    def __init__(self, model: nn.Module, optimizer: Callable[[Iterable[Any]], Optimizer]) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())

    def figures(
        self, trainer: L.Trainer, data: L.LightningDataModule, cfg: DictConfig
    ) -> dict[str, Any]:
        """Every figure of the trained model.

        In a distributed run every process tests, and the first alone measures the rest.
        """
        (tested,) = trainer.test(self, data, verbose=False)
        logged = {name.removeprefix("test/"): value for name, value in tested.items()}
        if distributed.is_initialized():
            # A metric sums over all processes, and would wait for the others for ever.
            distributed.destroy_process_group()
        return logged | self.after_training(data, cfg) if trainer.is_global_zero else logged

    def before_training(self, data: L.LightningDataModule, cfg: DictConfig) -> dict[str, Any]:
        """Figures of the untrained model, for ``metrics.json``."""
        return {}

    def after_training(self, data: L.LightningDataModule, cfg: DictConfig) -> dict[str, Any]:
        """Figures of the trained model that its test does not log."""
        return {}

    def report(self, metrics: dict[str, Any]) -> list[str]:
        """The lines a run ends with."""
        raise NotImplementedError

    def draw(self, images: Tensor, folder: Path) -> None:
        """Pictures of the tested model; ``images`` are some of the test set."""
        raise NotImplementedError

    def log_mean(self, name: str, value: Tensor) -> None:
        """Log the mean over an epoch."""
        self.log(name, value, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True)
