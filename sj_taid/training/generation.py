"""Training of a model that draws images of its own: FSVAE or the plain VAE."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import ImageData
from ..model import FSVAE
from .autoencoding import Autoencoding
from .evaluation import Evaluator, seeded
from .plot import draw_attention, draw_grid


class Generation(Autoencoding):
    """Autoencoding by a model that has ``sample(n)`` too; the samples are measured and drawn."""

    def before_training(self, data: ImageData, evaluator: Evaluator | None) -> dict[str, Any]:
        if evaluator is None:
            raise ValueError(
                "task=generation measures its samples, but metric is null; choose one of "
                "conf/metric, or task=autoencoding, which draws no samples"
            )
        if data.validation_set is not None:  # what its metric lacks shows now
            with seeded(evaluator.seed):
                evaluator.ready_metrics(data.validating(), torch.device("cpu"))
        untrained = evaluator.evaluate_samples(self.model, data, only="fad")
        return {"fad_untrained": untrained["fad"]}

    def after_training(self, data: ImageData, evaluator: Evaluator) -> dict[str, Any]:
        figures = evaluator.evaluate_samples(self.model, data)
        figures["protocol"] |= super().after_training(data, evaluator)["protocol"]
        if data.validation_set is not None:
            chosen = evaluator.evaluate_samples(self.model, data.validating(), only="fad")
            figures["validation_fad"] = chosen["fad"]
            figures["protocol"]["validation_fad"] = chosen["protocol"]["fad"]
        return figures

    def report(self, metrics: dict[str, Any]) -> list[str]:
        before = metrics.get("fad_untrained")
        titles = {
            "fad_published": "FAD as published",
            "fid": "FID of the samples",
            "inception_score": "Their Inception score",
        }
        return [
            *super().report(metrics),
            f"FAD of the samples: {metrics['fad']:.3f}"
            + ("" if before is None else f" (before training: {before:.3f})"),
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
            decoder: Any = model.image_decoder
            draw_attention(decoder.attention(sequence), folder / "attention.png")
