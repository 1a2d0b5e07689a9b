"""Metrics of the images that a model samples."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.wrappers import FeatureShare

from .._internal.checks import expand_home
from .._internal.context import seeded
from .._internal.kinds import Seed, check_kinds, declared_kinds
from ..data import ImageData
from ..metric import (
    AutoencoderCodes,
    Features,
    FrechetDistance,
    Inception,
    InceptionScore,
    Precision,
    PublishedFrechetAutoencoderDistance,
    Recall,
)
from ..model import Autoencoder
from .cache import cache_path, cached, fit_once
from .callbacks import show_progress
from .compare import are_alike

log = logging.getLogger(__name__)

SAMPLES_AT_ONCE = 250
#: Among fewer images nearly all are near one of the others, whatever they show.
ENOUGH_FOR_NEIGHBOURS = 100
#: source of the data -> name of the published autoencoder
PUBLISHED = {"MNIST": "mnist", "FashionMNIST": "fashion"}
#: Only the first of several processes measures, so there is nothing to sum over them.
ALONE = {"sync_on_compute": False}


@dataclass
class Evaluator:
    """Compares the samples of a model with the test images of a data set.

    Args:
        samples: number of images that the model samples.
        autoencoder: of FAD's autoencoder: ``hidden_channels`` and ``latent_channels`` of
            :class:`~sj_taid.model.Autoencoder`; ``epochs``, ``batch_size`` and ``seed`` of its
            training.
        inception_weights: a file or ``"download"``, see :class:`~sj_taid.metric.Inception`: adds
            FID and the Inception score.
        published_autoencoders: a folder, see
            :class:`~sj_taid.metric.PublishedFrechetAutoencoderDistance`: adds FAD as published, of
            20 batches of 256 samples, for MNIST and FashionMNIST at 32x32.
        cache_dir: folder of what is made once: FAD's autoencoder and statistics of test images.
        seed: of the samples; the global random state is left alone.
        accelerator: Lightning's; all but ``"cpu"`` use a GPU where there is one.
    """

    samples: PositiveInt
    autoencoder: Mapping[str, Any]
    inception_weights: str | Path | Literal[False] | None = None
    published_autoencoders: str | Path | Literal[False] | None = None
    cache_dir: Path = Path("~/.cache/sj-taid")
    seed: Seed = 0
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        self.cache_dir = expand_home(self.cache_dir)  # a config gives a string
        kinds = declared_kinds(Autoencoder) | get_type_hints(fit_once, include_extras=True)
        check_kinds(kinds, self.autoencoder, "autoencoder.")
        taken = {"hidden_channels", "latent_channels", "lr", "epochs", "batch_size", "seed"}
        if unknown := sorted(self.autoencoder.keys() - taken):
            there = ", ".join(sorted(taken))
            raise ValueError(f"autoencoder has no {unknown[0]}; there are {there}")

    def fad_alone(self) -> Evaluator:
        """The same without the metrics for which validation images may be too few."""
        return replace(self, inception_weights=None, published_autoencoders=None)

    def evaluate_samples(self, model: Any, data: ImageData) -> dict[str, Any]:
        """Metrics of images that a model samples, and under ``protocol`` how each was measured.

        ``fad`` and, where they are asked for, ``fad_published`` and ``fid`` are Frechet distances;
        ``fad_precision`` and ``fad_recall`` come with the first unless the samples are all alike,
        ``inception_score`` with ``fid``. ``sample_variance`` is that of 64 samples.

        Args:
            model: a module that has ``sample(n)``; moved to the metrics' device.
            data: the test images to compare with.

        Raises:
            ValueError: too few samples or test images for a metric, or images that it does not
                take.
        """
        passes = self.prepare(data)
        model.to(self.device)
        with seeded(self.seed):
            values: dict[str, Any] = {"sample_variance": model.sample(64).var(0).mean().item()}
        protocol = {}
        for metrics, batches in passes:
            log.info("Measuring %s on %d samples", ", ".join(map(str, metrics)), sum(batches))
            with seeded(self.seed):
                for n in show_progress(batches, "Sampling, in batches"):
                    metrics.update(model.sample(n).to(self.device), real=False)
                values |= {name: float(value) for name, value in metrics.compute().items()}
            for name, metric in metrics.items():
                protocol[name] = f"{metric.protocol}, {sum(batches)} samples"
                if isinstance(metric, PublishedFrechetAutoencoderDistance):
                    protocol[name] += " against the published statistics of the test images"
                elif _real_states(metric):
                    protocol[name] += f" against {data.describe_test_set()}"
        if are_alike(values):  # one image, near which there is a real one or not
            log.warning("The samples are all alike")
            for name in ("fad_precision", "fad_recall"):
                values.pop(name, None)
                protocol.pop(name, None)
        return values | {"protocol": protocol}

    @property
    def device(self) -> torch.device:
        gpu = self.accelerator != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if gpu else "cpu")

    @property
    def needed(self) -> int:
        """How many images FAD needs."""
        return 1 + self.autoencoder["latent_channels"]

    def prepare(self, data: ImageData) -> list[tuple[MetricCollection, list[int]]]:
        """Metrics, already updated with the test images, and the batches of samples they take.

        FAD is left out, with a warning, where samples or test images are too few for it, but not if
        they are for validation, which was asked for.
        """
        published = self._published(data)
        metrics: dict[str, Any] = {}
        with seeded(self.seed):  # loading the test images draws numbers too
            if self.inception_weights:
                both = {"fid": FrechetDistance, "inception_score": InceptionScore}
                metrics |= self._compare(data, Inception(self.inception_weights), both)
            count = min(self.samples, len(data.test_set))
            if count < self.needed and data.test_name != "validation":
                less = ", or take metric=small, which needs 17" if self.needed > 17 else ""
                log.warning(
                    "FAD needs %d samples and as many test images, but there are %d and %d, so it "
                    "is left out; raise metric.samples or dataset.test_share%s",
                    *(self.needed, self.samples, len(data.test_set), less),
                )
            else:
                kinds: dict[str, type[Any]] = {"fad": FrechetDistance}
                if count >= ENOUGH_FOR_NEIGHBOURS:
                    kinds |= {"fad_precision": Precision, "fad_recall": Recall}
                else:
                    log.warning(
                        "Precision and recall of %d images would mean little, so they are left "
                        "out; they need %d samples and as many %s images",
                        *(count, ENOUGH_FOR_NEIGHBOURS, data.test_name),
                    )
                metrics |= self._compare(data, self._codes(data), kinds)
        starts = range(0, self.samples, SAMPLES_AT_ONCE)
        batches = [min(SAMPLES_AT_ONCE, self.samples - start) for start in starts]
        measured = [(MetricCollection(metrics, compute_groups=False), batches)] if metrics else []
        return [*measured, *published]

    def _published(self, data: ImageData) -> list[tuple[MetricCollection, list[int]]]:
        if not self.published_autoencoders:
            return []
        source = getattr(data, "source", data.name)
        name = PUBLISHED.get(source)
        if name is None or data.image_size != 32:
            raise ValueError(
                f"FAD as published is of {' and '.join(PUBLISHED)} at 32x32, but the data set is "
                f"{source} at {data.image_size}x{data.image_size}; leave it out with "
                "metric.published_autoencoders=false"
            )
        fad = PublishedFrechetAutoencoderDistance(self.published_autoencoders, name, **ALONE)
        metrics = MetricCollection({"fad_published": fad.to(self.device)})
        return [(metrics, [fad.batch_size] * fad.batches)]

    def _check_enough(self, data: ImageData, names: str, needed: int) -> None:
        images = f"the number of {data.test_name} images"
        for what, count in {"metric.samples": self.samples, images: len(data.test_set)}.items():
            if count < needed:
                raise ValueError(
                    f"{names}: at least {needed} images are needed, but {what} is {count}"
                )

    def _compare(
        self, data: ImageData, network: Features, kinds: Mapping[str, type[Any]]
    ) -> dict[Any, Any]:
        """Metrics of a network, which runs once for all, updated with the test images."""
        made = {name: kind(network, **ALONE) for name, kind in kinds.items()}
        self._check_enough(data, ", ".join(made), max(metric.needed for metric in made.values()))
        metrics = FeatureShare(made).to(self.device)

        def make() -> dict[str, Any]:
            batches = data.test_dataloader()
            for images, _ in show_progress(batches, "Statistics of the test images"):
                metrics.update(images.to(self.device), real=True)
            return {name: _real_states(metric) for name, metric in made.items()}

        protocols = (metric.protocol for metric in made.values())
        path = cache_path(self.cache_dir, "statistics", data, *protocols, data.fingerprint())
        for name, states in cached(path, make).items():
            for key, state in states.items():
                setattr(made[name], key, state)
        return dict(metrics.to(self.device))  # what was loaded too

    def _codes(self, data: ImageData) -> AutoencoderCodes:
        """The codes of FAD's autoencoder, which is trained first if need be."""
        self._check_enough(data, "FAD", self.needed)  # before it is trained
        training = {"lr": 1e-3, **self.autoencoder}
        widths = training.pop("hidden_channels"), training.pop("latent_channels")
        make = partial(Autoencoder, data.channels, data.image_size, *widths)

        def loss(network: Any, images: Tensor, labels: Tensor) -> Tensor:
            return F.mse_loss(network(images), images)

        fit = partial(fit_once, self.cache_dir, "autoencoder", make, loss, data)
        return AutoencoderCodes(fit(**training, device=self.device))


def _real_states(metric: Any) -> dict[str, Any]:
    """A metric's states of real images."""
    return {k: state for k, state in metric.metric_state.items() if k.startswith("real_")}
