"""sj-taid: the ALIF neuron and temporal attention image decoding (TAID) for SpikingJelly.

>>> from sj_taid import ALIFNode, TAID

The parts ``data``, ``lightning``, ``metric``, ``model`` and ``training`` are imported when they are
first used. ``import *`` leaves out ``functional``, which would take the place of SpikingJelly's.
"""

from importlib import import_module
from types import ModuleType

from . import functional as functional
from .binary_spikes import binary
from .calibration import calibrate
from .layer import TAID, FixedDecoder
from .monitoring import monitor
from .nets.convert import swap_neurons, to_lif
from .nets.describe import describe
from .nets.exchange import accelerate, unaccelerate
from .neuron import ALIFNode
from .optim import parameter_groups
from .pretrained import create_model, list_models
from .state import fresh_state, name_neurons

__all__ = [
    "TAID",
    "ALIFNode",
    "FixedDecoder",
    "accelerate",
    "binary",
    "calibrate",
    "create_model",
    "describe",
    "fresh_state",
    "list_models",
    "monitor",
    "name_neurons",
    "parameter_groups",
    "swap_neurons",
    "to_lif",
    "unaccelerate",
]
__version__ = "0.1.0"

#: the parts imported at their first use: some need more than torch and SpikingJelly
_PARTS = ("data", "lightning", "metric", "model", "training")


def __getattr__(name: str) -> ModuleType:
    if name in _PARTS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
