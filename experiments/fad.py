"""FAD for a data set: its autoencoder, trained on first use and cached."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from experiments import run
from experiments.data import ImageData
from experiments.task.autoencoding import Autoencoding
from sj_taid.metric import FrechetAutoencoderDistance
from sj_taid.model import FSVAE
from sj_taid.model.autoencoder import Autoencoder

log = logging.getLogger(__name__)

SAMPLES_AT_ONCE = 250


def fad_metric(
    cfg: DictConfig, data: ImageData, cache: Path, accelerator: str = "auto"
) -> FrechetAutoencoderDistance:
    """The metric, with the test images already counted as the real ones.

    The autoencoder comes from ``cache`` if it was trained there with the same settings on the same
    images; else it is trained on the training images and put there.
    """
    data.setup()
    settings = OmegaConf.to_container(cfg, resolve=True)
    fingerprint = hashlib.sha256(
        json.dumps([settings, data.fingerprint()], sort_keys=True).encode()
    ).hexdigest()[:16]
    path = cache.expanduser() / f"autoencoder-{data.name}-{fingerprint}.pt"

    # From its own seed, weights and batches, so that every run looks through the same one.
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)
        autoencoder = Autoencoder(
            data.channels, data.image_size, tuple(cfg.hidden_channels), cfg.latent_channels
        )
        if not _load(autoencoder, path):
            log.info("Training FAD's autoencoder on %s, once; it is kept in %s", data.name, path)
            _train(autoencoder, cfg, data, accelerator)
            with run.replacing(path) as whole:
                torch.save(autoencoder.state_dict(), whole)

    metric = FrechetAutoencoderDistance(autoencoder, reset_real_features=False)
    for image, _ in data.test_dataloader():
        metric.update(image, real=True)
    return metric


@torch.no_grad()
def fad_of(model: FSVAE, metric: FrechetAutoencoderDistance, samples: int, seed: int) -> float:
    """FAD of ``samples`` images drawn from ``model``; the global random state is left alone."""
    device = next(model.parameters()).device
    metric = metric.to(device)
    metric.reset()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, samples, SAMPLES_AT_ONCE):
            metric.update(model.sample(min(SAMPLES_AT_ONCE, samples - start)), real=False)
    return float(metric.compute())


def _train(autoencoder: Autoencoder, cfg: DictConfig, data: ImageData, accelerator: str) -> None:
    trainer = L.Trainer(
        max_epochs=cfg.epochs,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Autoencoding(autoencoder), data.train_dataloader())
    autoencoder.eval()


def _load(autoencoder: Autoencoder, path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        autoencoder.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # whatever damaged it, training it anew is the remedy
        log.warning("%s cannot be read (%s); training it anew", path, error)
        return False
    return True
