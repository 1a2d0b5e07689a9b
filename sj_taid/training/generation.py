"""Training of a model that draws images of its own: FSVAE or the plain VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ..data import ImageData
from ..model import FSVAE
from .autoencoding import Autoencoding
from .evaluation import measure
from .plot import draw_attention, draw_grid


class Generation(Autoencoding):
    """Autoencoding by a model that has ``sample(n)`` too; the samples are measured and drawn."""

    def before_training(self, data: ImageData, cfg: DictConfig) -> dict[str, Any]:
        return {"fad_untrained": measure(self.model, data, cfg, only="fad")["fad"]}

    def after_training(self, data: ImageData, cfg: DictConfig) -> dict[str, Any]:
        figures = measure(self.model, data, cfg)
        figures["protocol"] |= super().after_training(data, cfg)["protocol"]
        return figures

    def report(self, metrics: dict[str, Any]) -> list[str]:
        # An evaluation may look through other weights, or at other samples.
        before = f" (before training: {metrics['fad_untrained']:.3f})"
        if "evaluations" in metrics:
            before = ""
        titles = {"fid": "FID of the samples", "inception_score": "Their Inception score"}
        return [
            *super().report(metrics),
            f"FAD of the samples: {metrics['fad']:.3f}{before}",
            *(f"{title}: {metrics[name]:.3f}" for name, title in titles.items() if name in metrics),
        ]

    @torch.no_grad()
    def draw(self, images: Tensor, folder: Path) -> None:
        model = self.model
        draw_grid(model.sample(64), folder / "samples.png", 16, "Samples from the prior")
        super().draw(images, folder)
        if isinstance(model, FSVAE):
            z_seq = model.posterior(model.encode(images), model._picks(len(images)))[0]
            sequence = model.decode_sequence(z_seq)
            draw_attention(model.image_decoder.attention(sequence), folder / "attention.png")
