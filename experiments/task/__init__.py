"""LightningModules: what is learned, from which loss, with which figures logged."""

from .autoencoding import Autoencoding
from .generation import Generation

__all__ = ["Autoencoding", "Generation"]
