"""Metrics of generated images. Needs torchmetrics."""

from .._internal.extras import needs

with needs("torchmetrics"):
    from .frechet import (
        AutoencoderCodes,
        Features,
        FrechetDistance,
        PublishedFrechetAutoencoderDistance,
    )
    from .inception import Inception, InceptionScore
    from .precision_recall import Precision, Recall

__all__ = [
    "AutoencoderCodes",
    "Features",
    "FrechetDistance",
    "Inception",
    "InceptionScore",
    "Precision",
    "PublishedFrechetAutoencoderDistance",
    "Recall",
]
