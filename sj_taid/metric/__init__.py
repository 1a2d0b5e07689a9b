"""Metrics of generated images. Needs torchmetrics, in the extra ``[experiments]``."""

from .frechet import Features, FrechetDistance
from .frechet_autoencoder import FrechetAutoencoderDistance, PublishedFrechetAutoencoderDistance
from .generation import Inception, InceptionScore

__all__ = [
    "Features",
    "FrechetAutoencoderDistance",
    "FrechetDistance",
    "Inception",
    "InceptionScore",
    "PublishedFrechetAutoencoderDistance",
]
