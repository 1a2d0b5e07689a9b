"""Models built from the neuron and the layers."""

from .autoencoder import Autoencoder
from .classifier import Classifier
from .esvae import ESVAE, ESVAEOutput
from .fsvae import FSVAE, FSVAEOutput

__all__ = ["ESVAE", "FSVAE", "Autoencoder", "Classifier", "ESVAEOutput", "FSVAEOutput"]
