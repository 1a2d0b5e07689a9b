"""Training of the plain autoencoder that FAD looks through."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from sj_taid.model.autoencoder import Autoencoder


class Autoencoding(L.LightningModule):
    """Mean squared error of the reconstruction, AdamW."""

    def __init__(self, model: Autoencoder, lr: float = 1e-3) -> None:
        super().__init__()
        self.model = model
        self.lr = lr

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        image, _ = batch
        return self.model.training_loss(image)["loss"]
