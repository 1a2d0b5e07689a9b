"""Metrics of the images that a model draws: FAD, and FID and the Inception score.

FAD's autoencoder and the statistics of the test images are made once and kept in the cache.
"""

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
from lightning.pytorch.callbacks import LambdaCallback
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
from .files import atomic_write

log = logging.getLogger(__name__)

SAMPLES_AT_ONCE = 250
#: what the published autoencoders are called
PUBLISHED = {"mnist": "mnist", "fashion_mnist": "fashion"}
STATISTICS = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")
Tensors = dict[str, torch.Tensor]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from ``seed`` inside; the global random state is left alone."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@dataclass
class Evaluator:
    """Compares the samples of a model with the test images of a data set.

    Args:
        samples: how many images the model draws.
        autoencoder: of the one that FAD looks through: ``hidden_channels`` and ``latent_channels``
            of :class:`~sj_taid.model.Autoencoder`; ``epochs``, ``batch_size`` and ``seed`` of its
            training.
        inception_weights: a file or ``"download"``, see :class:`~sj_taid.metric.Inception`: adds
            FID and the Inception score.
        published_autoencoders: a folder, see
            :class:`~sj_taid.metric.PublishedFrechetAutoencoderDistance`: adds FAD as published, of
            20 batches of 256 samples, for MNIST and FashionMNIST at 32x32.
        cache_dir: where the trained autoencoder and the statistics of test images are kept.
        seed: of the samples; the global random state is left alone.
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
        """``fad``, and where there are weights ``fid``, ``inception_score`` and ``fad_published``.

        And under ``protocol`` how each was measured.

        Args:
            model: has ``sample(n)``; moved to the metrics' device.
            data: the test images to compare with.
            only: one of the metrics. The others are made ready all the same, so that what they lack
                shows before a training and not after it.

        Raises:
            ValueError: too few samples or test images for one of the metrics, or other images than
                FAD as published takes.
        """
        gpu = self.accelerator != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda" if gpu else "cpu")
        with seeded(self.seed):  # loading the test images draws numbers too
            metrics = self.ready_metrics(data, device)
            published = self._published_fad(data)
        if only:
            metrics = MetricCollection({only: metrics[only]})
        model.to(device)
        with seeded(self.seed):
            starts = range(0, self.samples, SAMPLES_AT_ONCE)
            for start in track(starts, "Sampling, in batches", transient=True):
                images = model.sample(min(SAMPLES_AT_ONCE, self.samples - start))
                metrics.update(images, real=False)
        values: dict[str, Any] = {name: float(value) for name, value in metrics.compute().items()}
        values["protocol"] = {
            name: f"{metric.protocol}, {self.samples} samples"
            + (
                f" against {data.describe_test_set()}"
                if isinstance(metric, FrechetDistance)
                else ""
            )
            for name, metric in metrics.items()
        }
        if published and not only:
            published.to(device)
            with seeded(self.seed):
                batches = range(published.batches)
                for _ in track(batches, "Sampling for FAD as published", transient=True):
                    published.update(model.sample(published.batch_size), real=False)
            values["fad_published"] = float(published.compute())
            values["protocol"]["fad_published"] = (
                f"{published.protocol}, {published.batches * published.batch_size} samples against "
                "the published statistics of the test images"
            )
        return values

    def ready_metrics(self, data: ImageData, device: torch.device) -> MetricCollection:
        """The metrics, which have seen the test images already."""
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
            if isinstance(metric, FrechetDistance):
                self._see_test_images(metric, data)
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
        counts = {"metric.samples": self.samples, "the number of test images": test_images}
        for what, count in counts.items():
            if count is not None and count < needed:
                out = ", or leave it out with metric.inception_weights=false"
                raise ValueError(
                    f"{name} needs at least {needed} images, but {what} is {count}; give more"
                    + ("" if name == "fad" else out)
                )

    def _see_test_images(self, metric: FrechetDistance, data: ImageData) -> None:
        def take(statistics: Tensors) -> None:
            for name in STATISTICS:
                state = getattr(metric, name)
                setattr(metric, name, statistics[name].to(state.device).view_as(state))

        def make() -> Tensors:
            batches = data.test_dataloader()
            for image, _ in track(batches, "Statistics of the test images", transient=True):
                metric.update(image.to(metric.device), real=True)
            return {name: getattr(metric, name) for name in STATISTICS}

        fingerprint = _fingerprint(metric.protocol, data.fingerprint())
        take_or_make(self.cache_dir / f"statistics-{data.name}-{fingerprint}.pt", take, make)

    def _trained_autoencoder(self, data: ImageData) -> Autoencoder:
        """The one that FAD looks through."""
        settings = dict(self.autoencoder)
        widths = settings["hidden_channels"], settings["latent_channels"]
        untrained = partial(Autoencoder, data.channels, data.image_size, *widths)

        def report(trainer: L.Trainer, task: L.LightningModule) -> None:
            error = trainer.callback_metrics["train/reconstruction"]
            text = "FAD's autoencoder: epoch %d of %d, reconstruction error %.4f"
            log.info(text, trainer.current_epoch + 1, settings["epochs"], error)

        def train() -> Tensors:
            log.info("Training FAD's autoencoder on %s, once; it is kept in %s", data.name, path)
            its_data = data.without_augmentation()
            its_data.batch_size = settings["batch_size"]
            trainer = bare_trainer(
                self.accelerator,
                max_epochs=settings["epochs"],
                limit_val_batches=0,
                callbacks=[LambdaCallback(on_train_epoch_end=report)],
            )
            # From its own seed, so that every run looks through the same one.
            with seeded(settings["seed"]):
                task = Autoencoding(untrained(), partial(torch.optim.AdamW, lr=1e-3))
                trainer.fit(task, its_data)
            return task.model.state_dict()

        autoencoder = untrained()
        training = json.dumps(settings, sort_keys=True, default=list)
        seen = data.fingerprint(data.train_set)
        fingerprint = _fingerprint(training, repr(autoencoder), seen)
        path = self.cache_dir / f"autoencoder-{data.name}-{fingerprint}.pt"
        take_or_make(path, autoencoder.load_state_dict, train)
        return autoencoder


def bare_trainer(accelerator: str, **options: Any) -> L.Trainer:
    """Lightning's trainer on one device: no logs, no checkpoints, nothing in the terminal."""
    return L.Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **options,
    )


def take_or_make(path: Path, take: Callable[[Tensors], Any], make: Callable[[], Tensors]) -> None:
    """``take`` what lies in ``path``, or else what ``make`` gives, which is put there.

    Of several processes one makes it, while the others wait for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.is_file():
            try:
                take(torch.load(path, map_location="cpu", weights_only=True))
                return
            except Exception as error:  # whatever is wrong with it, making it anew is the remedy
                log.warning("%s cannot be used (%s); making it anew", path, error)
        made = make()
        with atomic_write(path) as whole:
            torch.save(made, whole)
    take(made)


def _fingerprint(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
