"""Metrics of generated images. Needs torchmetrics, in the extra ``[experiments]``."""

from .frechet_autoencoder import FrechetAutoencoderDistance

__all__ = ["FrechetAutoencoderDistance"]
