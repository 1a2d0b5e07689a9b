"""Training of a model that draws images of its own: FSVAE, ESVAE or the plain VAE."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from ..data import ImageData
from ..model import ESVAE
from ..model.spiking_vae import SpikingVAE
from .autoencoding import Autoencoding
from .evaluation import Evaluator, seeded
from .plot import draw_attention, draw_grid, draw_reconstructions, draw_spectra

#: what ESVAE's samples can be drawn from
PRIORS = ("learned", "mixture")
#: metrics that depend on it
OF_SAMPLES = ("fad", "fad_published", "fid", "inception_score", "validation_fad")


class Generation(Autoencoding):
    """Autoencoding by a model that has ``sample(n)`` too; the samples are measured and drawn.

    Args:
        prior_lr_scale: ESVAE's learned prior learns at the optimizer's learning rate times this.
            None treats it as all else.
        args: and ``kwargs``: those of :class:`~sj_taid.training.task.Task`.

    Raises:
        ValueError: ``prior_lr_scale`` is negative, or the model has no learned prior of its own.
    """

    model_attributes: tuple[str, ...] = ("training_loss", "sample")
    metric_names: tuple[str, ...] = (
        *Autoencoding.metric_names,
        *OF_SAMPLES,
        "fad_untrained",
        *(f"{name}_{prior}" for name in OF_SAMPLES[:-1] for prior in PRIORS),
    )

    def __init__(self, *args: Any, prior_lr_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prior_lr_scale = prior_lr_scale
        if prior_lr_scale is None:
            return
        if not isinstance(self.model, ESVAE):
            raise ValueError(
                f"task.prior_lr_scale={prior_lr_scale} is for ESVAE's learned prior, but the model "
                f"is {type(self.model).__name__}; leave it out, or choose model=esvae"
            )
        if prior_lr_scale < 0:
            raise ValueError(f"task.prior_lr_scale must be >= 0, but it is {prior_lr_scale}")

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = super().parameter_groups()
        if self.prior_lr_scale is None:
            return groups
        prior = [*self.model.prior.parameters()]
        apart = {*prior}
        for group in groups:
            group["params"] = [p for p in group["params"] if p not in apart]
        return [*groups, {"params": prior, "lr": self.learning_rate() * self.prior_lr_scale}]

    def measure_untrained(self, data: ImageData, evaluator: Evaluator | None) -> dict[str, float]:
        if evaluator is None:
            raise ValueError(
                "task=generation measures its samples, but there is no metric; choose one of "
                "conf/metric, or task=autoencoding, which draws no samples"
            )
        if data.validation_set is not None:  # what its metric lacks shows now
            with seeded(evaluator.seed):
                chosen_on = data.test_on_validation()
                _fad_alone(evaluator).prepare_metrics(chosen_on, torch.device("cpu"))
        with self._draw_from("learned"):  # the mixture is not fitted yet
            untrained = evaluator.evaluate_samples(self.model, data, only="fad")
        return {"fad_untrained": untrained["fad"]}

    def on_train_start(self) -> None:
        if isinstance(self.model, ESVAE):  # a longer run's is not that of the shorter before it
            self.model.mixture.clear()

    def fit_prior(self, data: ImageData) -> None:
        """Fit ESVAE's mixture of Gaussians to the training images as they are, not augmented."""
        if isinstance(self.model, ESVAE):
            batches = track(data.train_samples(), "Rates of the training images", transient=True)
            with seeded(0):  # a run that resumes later draws what it would have drawn
                self.model.fit_prior(image.to(self.device) for image, _ in batches)

    def evaluate(self, data: ImageData, evaluator: Evaluator) -> dict[str, Any]:
        figures = evaluator.evaluate_samples(self.model, data)
        figures["protocol"] |= super().evaluate(data, evaluator)["protocol"]
        if data.validation_set is not None:
            chosen = _fad_alone(evaluator).evaluate_samples(self.model, data.test_on_validation())
            figures["validation_fad"] = chosen["fad"]
            figures["protocol"]["validation_fad"] = chosen["protocol"]["fad"]
        for prior in self._other_priors():
            with self._draw_from(prior):
                others = evaluator.evaluate_samples(self.model, data)
            for name, how in others.pop("protocol").items():
                figures[f"{name}_{prior}"] = others[name]
                figures["protocol"][f"{name}_{prior}"] = f"{how}, drawn from the prior {prior}"
        return figures

    def _other_priors(self) -> list[str]:
        """Those beside the model's own that it can draw from."""
        if not isinstance(self.model, ESVAE):
            return []
        fitted = ["mixture"] if self.model.mixture.fitted else []
        return [prior for prior in ("learned", *fitted) if prior != self.model.sample_from]

    def _draw_from(self, prior: str) -> AbstractContextManager[None]:
        model = self.model
        return model.draw_from(prior) if isinstance(model, ESVAE) else nullcontext()

    def report(self, metrics: Mapping[str, Any]) -> list[str]:
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
            *self._note_on_learned_prior(metrics),
        ]

    def _note_on_learned_prior(self, metrics: Mapping[str, Any]) -> list[str]:
        before = metrics.get("fad_untrained")
        learned = metrics.get("fad_learned", metrics["fad"])
        if not isinstance(self.model, ESVAE) or before is None or learned < before / 2:
            return []
        return [
            f"The learned prior is near untrained: FAD {learned:.3f}, {before:.3f} before "
            "training; it needs more epochs than the mixture"
        ]

    @torch.no_grad()
    def draw(self, images: Tensor, folder: Path) -> None:
        model = self.model
        samples = model.sample(64)
        draw_grid(samples, folder / "samples.png", 16, "Samples from the prior")
        reconstructions = model(images).image
        draw_reconstructions(images, reconstructions, folder / "reconstructions.png")
        sets = {"test images": images, "reconstructions": reconstructions, "samples": samples}
        draw_spectra(sets, folder / "spectra.png")
        if isinstance(model, SpikingVAE):
            sequence = model.decode_sequence(model.latent_spikes(images))
            decoder: Any = model.image_decoder
            draw_attention(decoder.attention(sequence), folder / "attention.png")


def _fad_alone(evaluator: Evaluator) -> Evaluator:
    """For validation images, which may be too few for the others."""
    return replace(evaluator, inception_weights=None, published_autoencoders=None)
