"""Lightning datamodules: batches of images or of event frames, and labels. Extra ``[train]``."""

from .._internal.extras import needs

with needs("lightning torchvision scikit-learn filelock"):
    from .base import Data
    from .event import CIFAR10DVS, NMNIST, DVS128Gesture
    from .folder import CelebA, ImageFolder
    from .image import CIFAR10, MNIST, Digits, ImageData
    from .samples import Files, InMemory, Samples

__all__ = [
    "CIFAR10",
    "CIFAR10DVS",
    "MNIST",
    "NMNIST",
    "CelebA",
    "DVS128Gesture",
    "Data",
    "Digits",
    "Files",
    "ImageData",
    "ImageFolder",
    "InMemory",
    "Samples",
]
