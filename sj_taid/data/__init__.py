"""Lightning datamodules: batches of images or of event frames, and labels. Extra ``[train]``."""

from .._internal.extras import needs

with needs("lightning torchvision scikit-learn filelock pydantic"):
    from .base import Data
    from .event import Recordings
    from .folder import CelebA, ImageFolder
    from .image import Digits, ImageData, Torchvision
    from .samples import Samples

__all__ = [
    "CelebA",
    "Data",
    "Digits",
    "ImageData",
    "ImageFolder",
    "Recordings",
    "Samples",
    "Torchvision",
]
