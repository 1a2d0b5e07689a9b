"""Less memory and time for SpikingJelly nets: ``accelerate``. README.md explains how."""

from .exchange import accelerate, unaccelerate
from .report import Acceleration

__all__ = ["Acceleration", "accelerate", "unaccelerate"]
