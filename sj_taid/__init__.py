"""sj-taid: the ALIF neuron and temporal attention image decoding (TAID) for SpikingJelly.

>>> from sj_taid import ALIFNode, TAID
"""

from . import functional
from .layer import TAID, FixedDecoder
from .neuron import ALIFNode

__all__ = ["TAID", "ALIFNode", "FixedDecoder", "functional"]
__version__ = "0.1.0"
