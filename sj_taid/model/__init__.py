"""Models built from the neuron and the layers."""

from .autoencoder import Autoencoder
from .classifier import Classifier
from .esvae import ESVAE
from .fsvae import FSVAE

__all__ = ["ESVAE", "FSVAE", "Autoencoder", "Classifier"]
