"""Metrics of generated images. Needs torchmetrics, in the extra ``[metric]``."""

from .._extras import needs

with needs("torchmetrics"):
    from .frechet import Features, FrechetDistance
    from .frechet_autoencoder import FrechetAutoencoderDistance, PublishedFrechetAutoencoderDistance
    from .inception import Inception, InceptionScore

__all__ = [
    "Features",
    "FrechetAutoencoderDistance",
    "FrechetDistance",
    "Inception",
    "InceptionScore",
    "PublishedFrechetAutoencoderDistance",
]
