"""Training of a generative model: FSVAE."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from sj_taid.model import FSVAE
from sj_taid.model.latent import LATENT_LOSSES


class Generation(L.LightningModule):
    """FSVAE with its two losses and the prior's scheduled sampling.

    Args:
        model: the FSVAE.
        optimizer: makes the optimizer from the parameters.
        latent_loss: ``"mmd"`` or ``"kl"``.
        own_sample_probability: scheduled sampling's probability in the first and the last epoch.
    """

    def __init__(
        self,
        model: FSVAE,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        latent_loss: str = "mmd",
        own_sample_probability: tuple[float, float] = (0.1, 0.3),
    ) -> None:
        super().__init__()
        if latent_loss not in LATENT_LOSSES:
            raise ValueError(
                f"task.latent_loss must be one of {', '.join(LATENT_LOSSES)}, "
                f"but it is {latent_loss!r}"
            )
        self.model = model
        self.optimizer = optimizer
        self.latent_loss = latent_loss
        self.own_sample_probability = tuple(own_sample_probability)

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.parameters())

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        image, _ = batch
        output = self.model(image, self._probability())
        losses = self.model.loss(image, output, self.latent_loss)
        self._log("train/mse", losses["reconstruction"])
        self._log("train/latent", losses["latent"])
        return losses["loss"]

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._log_reconstruction("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._log_reconstruction("test", batch)

    def _log_reconstruction(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        image, _ = batch
        self._log(f"{stage}/mse", F.mse_loss(self.model(image).image, image))

    def _log(self, name: str, value: Tensor) -> None:
        self.log(name, value, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True)

    def _probability(self) -> float:
        """Linear over the epochs."""
        first, last = self.own_sample_probability
        epochs = max((self.trainer.max_epochs or 1) - 1, 1)
        return first + (last - first) * min(self.current_epoch / epochs, 1.0)
