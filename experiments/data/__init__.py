"""Lightning datamodules. Images are ``[C, H, W]`` in [-1, 1]."""

from .image import MNIST, Digits, ImageData

__all__ = ["MNIST", "Digits", "ImageData"]
