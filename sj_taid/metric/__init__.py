"""Metrics of generated images. Needs the extra ``[metrics]`` (torchmetrics)."""

from .frechet_autoencoder import FrechetAutoencoderDistance

__all__ = ["FrechetAutoencoderDistance"]
