"""Less memory and time for the nets one has: README.md next to this file draws how."""

from .exchange import accelerate, unaccelerate
from .report import Acceleration

__all__ = ["Acceleration", "accelerate", "unaccelerate"]
