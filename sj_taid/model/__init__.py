"""Models built from the neuron and the layers: import what you need from here."""

from .classifier import Classifier
from .fsvae import FSVAE, FSVAEOutput

__all__ = ["FSVAE", "Classifier", "FSVAEOutput"]
