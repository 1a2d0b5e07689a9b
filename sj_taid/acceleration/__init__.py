"""Less memory and time for the nets one has: README.md next to this file draws how."""

from .accelerate import Acceleration, accelerate, unaccelerate

__all__ = ["Acceleration", "accelerate", "unaccelerate"]
