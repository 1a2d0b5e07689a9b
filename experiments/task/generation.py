"""Training of a generative model: FSVAE."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from experiments.data import ImageData
from experiments.fad import fad_metric, fad_of
from experiments.pictures import draw_attention, draw_grid, draw_reconstructions
from experiments.task.task import Task
from sj_taid.model import FSVAE
from sj_taid.model.latent import LATENT_LOSSES


class Generation(Task):
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
        super().__init__(model, optimizer)
        if latent_loss not in LATENT_LOSSES:
            raise ValueError(
                f"task.latent_loss must be one of {', '.join(LATENT_LOSSES)}, "
                f"but it is {latent_loss!r}"
            )
        self.latent_loss = latent_loss
        self.own_sample_probability = tuple(own_sample_probability)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        image, _ = batch
        output = self.model(image, self._probability())
        losses = self.model.loss(image, output, self.latent_loss)
        self.log_mean("train/reconstruction", losses["reconstruction"])
        self.log_mean("train/latent", losses["latent"])
        return losses["loss"]

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._log_reconstruction("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._log_reconstruction("test", batch)

    def before_training(self, data: ImageData, cfg: DictConfig) -> dict[str, Any]:
        return {"fad_untrained": self._fad(data, cfg)}

    def after_training(self, data: ImageData, cfg: DictConfig) -> dict[str, Any]:
        return {
            "fad": self._fad(data, cfg),
            "fad_protocol": f"{cfg.fad.samples} samples against the test set, own autoencoder",
        }

    def report(self, metrics: dict[str, Any]) -> list[str]:
        return [
            f"Test reconstruction error (MSE): {metrics['reconstruction']:.4f}",
            f"FAD of the samples: {metrics['fad']:.3f} "
            f"(before training: {metrics['fad_untrained']:.3f})",
        ]

    @torch.no_grad()
    def draw(self, images: Tensor, folder: Path) -> None:
        model = self.model
        draw_grid(model.sample(64), folder / "samples.png", 16, "Samples from the prior")
        output = model(images)
        draw_reconstructions(images, output.image, folder / "reconstructions.png")
        z_seq = model.posterior(model.encode(images), model._picks(len(images)))[0]
        sequence = model.decode_sequence(z_seq)
        draw_attention(model.image_decoder.attention(sequence), folder / "attention.png")

    def _fad(self, data: ImageData, cfg: DictConfig) -> float:
        metric = fad_metric(cfg.fad, data, Path(cfg.cache_dir), cfg.trainer.accelerator)
        return fad_of(self.model, metric, cfg.fad.samples, cfg.seed)

    def _log_reconstruction(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        image, _ = batch
        self.log_mean(f"{stage}/reconstruction", F.mse_loss(self.model(image).image, image))

    def _probability(self) -> float:
        """Linear over the epochs."""
        first, last = self.own_sample_probability
        epochs = max((self.trainer.max_epochs or 1) - 1, 1)
        return first + (last - first) * min(self.current_epoch / epochs, 1.0)
