"""Models built from the neuron and the layers: import what you need from here."""

from .autoencoder import VAE, Autoencoder
from .classifier import Classifier
from .fsvae import FSVAE, FSVAEOutput

__all__ = ["FSVAE", "VAE", "Autoencoder", "Classifier", "FSVAEOutput"]
