"""How to compute a tensor again in backward, instead of saving it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._graph import is_checkpointed


class Recipe(NamedTuple):
    """``compute(*tensors)`` gives a tensor again, bit for bit."""

    compute: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]


def set_recipe(tensor: Any, recipe: Recipe | None) -> None:
    """Let a fused operator that reads ``tensor`` save the recipe's tensors instead, if any."""
    if recipe is not None:
        tensor._recipe = recipe, tensor._version


def recipe_of(tensor: Any) -> Recipe | None:
    """The recipe, unless the tensor was changed in place or others decide what is saved."""
    if torch.compiler.is_compiling() or not hasattr(tensor, "_recipe") or is_checkpointed():
        return None
    recipe, version = tensor._recipe
    return recipe if tensor._version == version else None
