"""The form in which models are trained and measured."""

from typing import Any

import torch
from torch import nn

from ..nets.exchange import accelerate
from ..nets.neurons import find_neurons


def prepare(model: nn.Module, fuse: bool = True) -> nn.Module:
    """Bring a model into the form in which it is trained and measured; ``fuse`` accelerates it."""
    if fuse and find_neurons(model):
        accelerate(model)
    # In this layout convolutions are faster, in bfloat16 above all; another rounds otherwise.
    untyped: Any = model  # whose types leave memory_format out before torch 2.15
    return untyped.to(memory_format=torch.channels_last)
