"""What generated images are measured by.

FAD's autoencoder and the statistics of the test images are made once and kept in the cache.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.wrappers import FeatureShare

from ..data import ImageData
from ..metric import FrechetAutoencoderDistance, FrechetDistance, Inception, InceptionScore
from ..model import Autoencoder
from .autoencoding import Autoencoding
from .files import replacing

log = logging.getLogger(__name__)

SAMPLES_AT_ONCE = 250
STATISTICS = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from ``seed`` inside; the global random state is left alone."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def measure(
    model: nn.Module, data: ImageData, cfg: DictConfig, only: str | None = None
) -> dict[str, Any]:
    """Figures of images that ``model`` draws, each with its protocol.

    Args:
        model: has ``sample(n)``.
        data: the test images to compare with.
        cfg: the run's config; of it ``metric``, ``seed``, ``cache_dir``, ``trainer.accelerator``.
        only: one figure of them. The others are made ready all the same, so that what they lack
            shows before a training and not after it.

    Raises:
        ValueError: too few samples or test images for a figure that ``cfg`` asks for.
    """
    gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    samples = cfg.metric.samples
    with seeded(cfg.seed):  # loading the test images draws numbers too
        metrics = _metrics(data, cfg, device)
    if only:
        metrics = MetricCollection({only: metrics[only]})
    model.to(device)
    with seeded(cfg.seed):
        for start in range(0, samples, SAMPLES_AT_ONCE):
            metrics.update(model.sample(min(SAMPLES_AT_ONCE, samples - start)), real=False)
    figures: dict[str, Any] = {name: float(x) for name, x in metrics.compute().items()}
    figures["protocol"] = {
        name: f"{metric.protocol}, {samples} samples"
        + (f" against {data.test_images()}" if isinstance(metric, FrechetDistance) else "")
        for name, metric in metrics.items()
    }
    return figures


def _metrics(data: ImageData, cfg: DictConfig, device: torch.device) -> MetricCollection:
    """The metrics, which have seen the test images already."""
    cache = Path(cfg.cache_dir).expanduser()
    test_images, samples = len(data.test_set), cfg.metric.samples
    # Under DDP each process draws the same samples: there is nothing to sum.
    alone = {"sync_on_compute": False}
    _check_enough("fad", cfg.metric.autoencoder.latent_channels + 1, samples, test_images)
    metrics = {}
    if cfg.metric.inception_weights:
        network = Inception(cfg.metric.inception_weights)
        by_inception = {
            "fid": FrechetDistance(network, **alone),
            "inception_score": InceptionScore(network, network.classifier, **alone),
        }
        _check_enough("fid", by_inception["fid"].needed, samples, test_images)
        _check_enough("inception_score", by_inception["inception_score"].needed, samples)
        metrics |= FeatureShare(by_inception).items()  # one pass for both
    metrics["fad"] = FrechetAutoencoderDistance(_autoencoder(data, cfg, cache), **alone)
    for metric in metrics.values():
        metric.to(device)
        if isinstance(metric, FrechetDistance):
            _see_test_images(metric, data, cache)
    return MetricCollection(metrics, compute_groups=False)


def _check_enough(name: str, needed: int, samples: int, test_images: int | None = None) -> None:
    counts = {"metric.samples": samples, "the number of test images": test_images}
    for what, count in counts.items():
        if count is not None and count < needed:
            out = "" if name == "fad" else ", or leave it out with metric.inception_weights=false"
            raise ValueError(
                f"{name} needs at least {needed} images, but {what} is {count}; give more{out}"
            )


def _see_test_images(metric: FrechetDistance, data: ImageData, cache: Path) -> None:
    def see() -> dict[str, torch.Tensor]:
        for image, _ in data.test_dataloader():
            metric.update(image.to(metric.device), real=True)
        return {name: getattr(metric, name) for name in STATISTICS}

    fingerprint = _fingerprint(metric.protocol, data.fingerprint())
    statistics = kept(cache / f"statistics-{data.name}-{fingerprint}.pt", see)
    for name, value in statistics.items():
        setattr(metric, name, value.to(metric.device))


def _autoencoder(data: ImageData, cfg: DictConfig, cache: Path) -> Autoencoder:
    """The one that FAD looks through."""
    settings = cfg.metric.autoencoder

    def train() -> dict[str, torch.Tensor]:
        log.info("Training FAD's autoencoder on %s, once; it is kept in %s", data.name, path)
        its_data = copy.copy(data)
        its_data.batch_size, its_data.augment = settings.batch_size, None
        trainer = bare_trainer(
            cfg.trainer.accelerator, max_epochs=settings.epochs, limit_val_batches=0
        )
        task = Autoencoding(autoencoder, partial(torch.optim.AdamW, lr=1e-3))
        trainer.fit(task, its_data)
        return autoencoder.state_dict()

    # From its own seed, weights and batches, so that every run looks through the same one.
    with seeded(settings.seed):
        autoencoder = Autoencoder(
            data.channels, data.image_size, settings.hidden_channels, settings.latent_channels
        )
        training = json.dumps(OmegaConf.to_container(settings, resolve=True), sort_keys=True)
        fingerprint = _fingerprint(training, repr(autoencoder), data.fingerprint())
        path = cache / f"autoencoder-{data.name}-{fingerprint}.pt"
        autoencoder.load_state_dict(kept(path, train))
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


def kept(path: Path, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What is in ``path``, or else what ``make`` gives, which is put there.

    Of several processes one makes it, while the others wait for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.is_file():
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # whatever damaged it, making it anew is the remedy
                log.warning("%s cannot be read (%s); making it anew", path, error)
        made = make()
        with replacing(path) as whole:
            torch.save(made, whole)
        return made


def _fingerprint(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
