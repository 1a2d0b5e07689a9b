"""sj-taid: the ALIF neuron and temporal attention image decoding (TAID) for SpikingJelly.

>>> from sj_taid import ALIFNode, TAID
"""

from . import functional
from .convert import swap_neurons, to_lif
from .layer import TAID, FixedDecoder
from .monitoring import monitor
from .neuron import ALIFNode
from .optim import parameter_groups
from .state import fresh_state, name_neurons

__all__ = [
    "TAID",
    "ALIFNode",
    "FixedDecoder",
    "fresh_state",
    "functional",
    "monitor",
    "name_neurons",
    "parameter_groups",
    "swap_neurons",
    "to_lif",
]
__version__ = "0.1.0"
