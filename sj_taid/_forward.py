"""The forwards that this package gives to modules, instead of those of their classes."""

from typing import Any

import torch


class Forward:
    """It holds the module alone, so that the net can be copied and pickled."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def remove(self) -> None:
        """Give the module the forward of its class back."""
        if vars(self.module).get("forward") is self:
            del self.module.forward


def only_argument(*args: Any, **kwargs: Any) -> Any:
    """The input of a batch norm, which torch names ``input`` and SpikingJelly ``x``."""
    (x,) = (*args, *kwargs.values())
    return x


class PackingForward(Forward):
    """The forward of a module that packs, around that of its class."""

    packing = 0  # how many :class:`.packing.PackedSpikes` ask for it

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def is_on(self) -> bool:
        return self.packing > 0 and torch.is_grad_enabled() and not torch.compiler.is_compiling()
