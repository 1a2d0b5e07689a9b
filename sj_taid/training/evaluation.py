"""Metrics of the images that a model samples: FAD, FID and the Inception score."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from filelock import FileLock
from rich.progress import track
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers import FeatureShare

from ..data import ImageData
from ..metric import (
    FrechetAutoencoderDistance,
    FrechetDistance,
    Inception,
    InceptionScore,
    PublishedFrechetAutoencoderDistance,
)
from ..model import Autoencoder
from .autoencoding import Autoencoding
from .callbacks import ProgressBar
from .files import atomic_write

log = logging.getLogger(__name__)

SAMPLES_AT_ONCE = 250
#: names of the published autoencoders
PUBLISHED = {"mnist": "mnist", "fashion_mnist": "fashion"}
Tensors = dict[str, torch.Tensor]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random numbers from ``seed`` inside; the global random state is left alone."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


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
        cache_dir: folder of the trained autoencoder and of the statistics of test images.
        seed: seed of the samples; the global random state is left alone.
        accelerator: Lightning's; all but ``"cpu"`` use a GPU where there is one.
    """

    samples: int
    autoencoder: Mapping[str, Any]
    inception_weights: str | Path | Literal[False] | None = None
    published_autoencoders: str | Path | Literal[False] | None = None
    cache_dir: Path = Path("~/.cache/sj-taid")
    seed: int = 0
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        self.cache_dir = Path(self.cache_dir).expanduser()  # a config gives a string

    def evaluate_samples(
        self, model: Any, data: ImageData, only: str | None = None
    ) -> dict[str, Any]:
        """``fad``, with weights ``fid``, ``inception_score`` and ``fad_published``, and protocols.

        Args:
            model: has ``sample(n)``; moved to the metrics' device.
            data: the test images to compare with.
            only: one of the metrics; what the others lack is an error all the same.

        Returns:
            The metrics, and under ``protocol`` how each was measured.

        Raises:
            ValueError: too few samples or test images for one of the metrics, or images that FAD as
                published does not take.
        """
        gpu = self.accelerator != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda" if gpu else "cpu")
        with seeded(self.seed):  # loading the test images draws numbers too
            metrics = self.prepare_metrics(data, device)
            published = self._published_fad(data)
        if only:
            metrics = MetricCollection({only: metrics[only]})
        starts = range(0, self.samples, SAMPLES_AT_ONCE)
        batches = [min(SAMPLES_AT_ONCE, self.samples - start) for start in starts]
        passes = [(metrics, batches, data.describe_test_set())]
        if published and not only:
            collection = MetricCollection({"fad_published": published.to(device)})
            batches = [published.batch_size] * published.batches
            passes.append((collection, batches, "the published statistics of the test images"))
        model.to(device)
        values: dict[str, Any] = {}
        protocol = {}
        for collection, batches, reference in passes:
            with seeded(self.seed):
                for n in track(batches, "Sampling, in batches", transient=True):
                    collection.update(model.sample(n), real=False)
            values |= {name: float(value) for name, value in collection.compute().items()}
            for name, metric in collection.items():
                protocol[name] = f"{metric.protocol}, {sum(batches)} samples"
                protocol[name] += f" against {reference}" if _real_states(metric) else ""
        return values | {"protocol": protocol}

    def prepare_metrics(self, data: ImageData, device: torch.device) -> MetricCollection:
        """The metrics, already updated with the test images."""
        test_images = len(data.test_set)
        # Of several processes the first alone measures: there is nothing to sum.
        alone = {"sync_on_compute": False}
        self._check_enough("fad", self.autoencoder["latent_channels"] + 1, test_images)
        metrics: dict[str, Metric | MetricCollection] = {}
        if self.inception_weights:
            network = Inception(self.inception_weights)
            fid = FrechetDistance(network, **alone)
            score = InceptionScore(network, network.classifier, **alone)
            self._check_enough("fid", fid.needed, test_images)
            self._check_enough("inception_score", score.needed)
            # One pass through the network for both.
            metrics |= FeatureShare({"fid": fid, "inception_score": score}).items()
        metrics["fad"] = FrechetAutoencoderDistance(self._trained_autoencoder(data), **alone)
        for metric in metrics.values():
            metric.to(device)
            if _real_states(metric):
                self._update_with_test_images(metric, data)
        return MetricCollection(metrics, compute_groups=False)

    def _published_fad(self, data: ImageData) -> PublishedFrechetAutoencoderDistance | None:
        if not self.published_autoencoders:
            return None
        name = PUBLISHED.get(str(data.name))
        if name is None or data.image_size != 32:
            raise ValueError(
                f"FAD as published is of {' and '.join(PUBLISHED)} at 32x32, but the data set is "
                f"{data.name} at {data.image_size}x{data.image_size}; leave it out with "
                "metric.published_autoencoders=false"
            )
        folder = self.published_autoencoders
        return PublishedFrechetAutoencoderDistance(folder, name, sync_on_compute=False)

    def _check_enough(self, name: str, needed: int, test_images: int | None = None) -> None:
        out = "" if name == "fad" else ", or leave it out with metric.inception_weights=false"
        counts = {"metric.samples": self.samples, "the number of test images": test_images}
        for what, count in counts.items():
            if count is not None and count < needed:
                raise ValueError(
                    f"{name} needs at least {needed} images, but {what} is {count}; give more{out}"
                )

    def _update_with_test_images(self, metric: Any, data: ImageData) -> None:
        def load(states: Tensors) -> None:
            for name, state in _real_states(metric).items():
                setattr(metric, name, states[name].to(state.device).view_as(state))

        def make() -> Tensors:
            batches = data.test_dataloader()
            for images, _ in track(batches, "Statistics of the test images", transient=True):
                metric.update(images.to(metric.device), real=True)
            return _real_states(metric)

        path = self._cached("statistics", data, metric.protocol, data.fingerprint())
        load_or_make(path, load, make)

    def _trained_autoencoder(self, data: ImageData) -> Autoencoder:
        settings = dict(self.autoencoder)
        widths = settings["hidden_channels"], settings["latent_channels"]
        untrained = partial(Autoencoder, data.channels, data.image_size, *widths)

        def train() -> Tensors:
            train_data = data.without_augmentation()
            train_data.batch_size = settings["batch_size"]
            epochs = settings["epochs"]
            options = {"max_epochs": epochs, "limit_val_batches": 0}
            trainer = bare_trainer(self.accelerator, bar=True, **options)
            log.info("Training FAD's autoencoder on %s for %d epochs, once", data.name, epochs)
            # From its own seed, so that every run looks through the same one.
            with seeded(settings["seed"]):
                task = Autoencoding(untrained(), partial(torch.optim.AdamW, lr=1e-3))
                trainer.fit(task, train_data)
            error = float(trainer.callback_metrics["train/reconstruction"])
            log.info("It is in %s; its reconstruction error is %.4f", self.cache_dir, error)
            return task.model.state_dict()

        autoencoder = untrained()
        training = json.dumps(settings, sort_keys=True, default=list)
        parts = training, repr(autoencoder), data.fingerprint(data.train_set)
        path = self._cached("autoencoder", data, *parts)
        load_or_make(path, autoencoder.load_state_dict, train)
        return autoencoder

    def _cached(self, kind: str, data: ImageData, *parts: str) -> Path:
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        return self.cache_dir / f"{kind}-{data.name}-{digest}.pt"


def bare_trainer(accelerator: str, bar: bool = False, **options: Any) -> L.Trainer:
    """Lightning's trainer on one device, without logs and checkpoints."""
    return L.Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=bar,
        callbacks=[ProgressBar()] if bar else None,
        **options,
    )


def load_or_make(path: Path, load: Callable[[Tensors], Any], make: Callable[[], Tensors]) -> None:
    """Load what is cached at ``path``, or make and cache it, in one of several processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.is_file():
            try:
                load(torch.load(path, map_location="cpu", weights_only=True))
                return
            except Exception as error:  # whatever is wrong with it, making it again is the remedy
                log.warning("%s cannot be used (%s); making it again", path, error)
        made = make()
        with atomic_write(path) as whole:
            torch.save(made, whole)
    load(made)


def _real_states(metric: Any) -> Tensors:
    """What a metric has accumulated of real images."""
    return {k: state for k, state in metric.metric_state.items() if k.startswith("real_")}
