"""Training of a generator: FSVAE or ESVAE."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._internal.context import seeded
from ..data import ImageData
from ..layer import TAID, FixedDecoder
from ..model.esvae import ESVAE
from ..model.flow import CLASSES, FlowPrior, check_enough
from ..model.spiking_vae import SpikingVAE
from .callbacks import show_progress
from .evaluator import Evaluator
from .loss import FeatureLoss
from .plot import draw_attention, draw_classes, draw_grid, draw_pairs
from .task import Task

log = logging.getLogger(__name__)

#: With fewer training images of a class, only half of its samples may be of it (``RESULTS.md``).
ENOUGH_OF_A_CLASS = 50


class Generation(Task):
    """Training of an autoencoder that samples: by its own ``training_loss(image, progress)``.

    That gives ``loss`` and its terms and, for a feature loss, ``image``, the reconstruction. Called
    with images, the model returns an object with ``image``, too; ``sample(n)`` gives new images.

    Args:
        args, kwargs: the arguments of :class:`~sj_taid.training.task.Task`.
        prior_lr_scale: ESVAE's learned prior learns at the optimizer's learning rate times this.
            None treats it as all other parameters.
        feature_loss: joins the losses, see :class:`~sj_taid.training.loss.FeatureLoss`.

    Raises:
        ValueError: ``prior_lr_scale`` for a model without a learned prior.
    """

    takes = ImageData
    model_attributes = ("training_loss", "sample")
    objectives = ("reconstruction", "fad", "fad_published", "fid", "inception_score")

    def __init__(
        self,
        *args: Any,
        prior_lr_scale: float | None = None,
        feature_loss: FeatureLoss | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.prior_lr_scale = prior_lr_scale
        self.feature_loss = feature_loss
        if prior_lr_scale is not None and not isinstance(self.model, ESVAE):
            name = type(self.model).__name__
            raise ValueError(f"task.prior_lr_scale is for model=esvae, not {name}; leave it out")

    @property
    def flow(self) -> FlowPrior | None:
        """The prior that is fitted after training, of an ESVAE with ``sample_from="flow"``."""
        return getattr(self.model, "flow", None)

    def labels(self, data: ImageData) -> list[int] | None:
        """The training images' labels, if the flow can learn them."""
        labels = data.train_set.labels
        return labels if 1 < len({*labels}) <= CLASSES else None

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = super().parameter_groups()
        if self.prior_lr_scale is None:
            return groups
        prior = dict.fromkeys(self.model.prior.parameters())
        for group in groups:
            group["params"] = [p for p in group["params"] if p not in prior]
        rate = self.optimizer.keywords["lr"] * self.prior_lr_scale
        return [*groups, {"params": [*prior], "lr": rate}]

    def before_training(self, data: ImageData, evaluator: Evaluator | None) -> None:
        # What may fail at the end of the training is tried here.
        if self.flow:
            check_enough(len(data.train_set))
            counts = Counter(self.labels(data)).values()
            if (fewest := min(counts, default=ENOUGH_OF_A_CLASS)) < ENOUGH_OF_A_CLASS:
                log.warning(
                    "A class has %d training images; below about %d, only half of the samples of a "
                    "class may show it",
                    *(fewest, ENOUGH_OF_A_CLASS),
                )
        if self.feature_loss:
            self.feature_loss.prepare(data)
        if evaluator is None:
            return
        evaluator.prepare(data)
        if data.validation_set is not None:
            evaluator.fad_alone().prepare(data.test_on_validation())

    def on_train_start(self) -> None:
        if self.flow:
            self.flow.clear()  # a resumed run's was fitted to an earlier encoder

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        image, _ = batch
        epochs = max((self.trainer.max_epochs or 1) - 1, 1)
        progress = min(self.current_epoch / epochs, 1.0)  # 0 in the first epoch, 1 in the last
        losses = self.model.training_loss(image, progress)
        loss, reconstruction = losses.pop("loss"), losses.pop("image", None)
        if self.feature_loss:
            losses["features"] = self.feature_loss(reconstruction, image)
            loss = loss + losses["features"]
        for name, part in losses.items():
            self.log_mean(f"train/{name}", part)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._log_reconstruction("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._log_reconstruction("test", batch)

    def _log_reconstruction(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        image, _ = batch
        self.log_mean(f"{stage}/reconstruction", F.mse_loss(self.model(image).image, image))

    def fit_prior(self, data: ImageData) -> None:
        """Fit ESVAE's flow to the training images, and to their labels if any.

        They are not augmented; their mirror images join them where training has them.
        """
        if self.flow:
            batches = show_progress(data.loader(data.train_set), "Rates of the training images")
            # The seed leaves the random state to a run that resumes with more epochs.
            with seeded(0):
                images = (image.to(self.device) for image, _ in batches)
                self.model.fit_prior(images, self.labels(data), data.mirrors)

    def evaluate(self, data: ImageData, evaluator: Evaluator | None) -> dict[str, Any]:
        how = "mean squared error, images in [-1, 1], "
        exact = ", exact spike counts" if isinstance(self.model, ESVAE) else ""
        tested = how + data.describe_test_set() + self.describe_limit("test")
        protocol = {"reconstruction": tested + exact}
        if data.validation_set is not None:
            validated = how + data.test_on_validation().describe_test_set()
            validated += self.describe_limit("val")
            protocol["validation_reconstruction"] = validated + exact
        metrics = {} if evaluator is None else self._measure_samples(data, evaluator)
        return metrics | {"protocol": protocol | metrics.get("protocol", {})}

    def _measure_samples(self, data: ImageData, evaluator: Evaluator) -> dict[str, Any]:
        model = self.model
        metrics = evaluator.evaluate_samples(model, data)
        protocol = metrics["protocol"]
        if data.validation_set is not None:
            validated = evaluator.fad_alone().evaluate_samples(model, data.test_on_validation())
            metrics["validation_fad"] = validated["fad"]
            protocol["validation_fad"] = validated["protocol"]["fad"]
        if isinstance(model, ESVAE):
            metrics["prior"] = model.sample_from
        if self.flow:
            with model.draw_from("learned"):
                others = evaluator.evaluate_samples(model, data)
            for name, how in others["protocol"].items():
                metrics[f"{name}_learned"] = others[name]
                protocol[f"{name}_learned"] = f"{how}, drawn from the prior learned"
        return metrics

    @torch.no_grad()
    def draw(self, images: Tensor, folder: Path) -> None:
        model = self.model
        if labels := getattr(model, "labels", []):
            names = self.trainer.datamodule.class_names  # type: ignore[attr-defined]
            draw_classes(model, labels, folder / "samples.png", 16, names)
        else:
            draw_grid(model.sample(64), folder / "samples.png", 16)
        pairs, names = (images, model(images).image), ("test image", "through the model")
        draw_pairs(*pairs, folder / "reconstructions.png", 16, names)
        if isinstance(model, SpikingVAE) and isinstance(model.image_decoder, TAID | FixedDecoder):
            sequence = model.decode_sequence(model.latent_spikes(images))
            draw_attention(model.image_decoder.attention(sequence), folder / "attention.png")
