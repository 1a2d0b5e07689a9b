"""Residual sums in front of a neuron, ``norm(x) + shortcut``, which backward computes again.

The norm saves ``x`` anyway, and a layer the shortcut's spikes as bits: the sum need not be saved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.pooling import _MaxPoolNd

from . import _spikes
from ._forward import Forward, PackingForward, only_argument
from ._fused_neuron import KINDS
from .fusion import KNOWN_NORMS, is_norm
from .ops.recipe import Recipe, recipe_of, set_recipe
from .tracing import trace


class NormOutput(Tensor):
    """The output of a batch norm; its sum with spikes or another such output has a recipe."""

    __torch_function__ = nn.Parameter.__torch_function__  # other operations see a plain tensor

    def __add__(self, other: Any) -> Tensor:
        recipe, total = _add_recipes(self, other), super().__add__(other)
        set_recipe(total, recipe)
        return total

    __radd__ = __add__

    def __iadd__(self, other: Any) -> Tensor:
        recipe, total = _add_recipes(self, other), super().__iadd__(other)
        total.__class__ = Tensor
        set_recipe(total, recipe)
        return total


def _add_recipes(y: NormOutput, other: Any) -> Recipe | None:
    first, second = recipe_of(y), recipe_of(other)
    spikes = _spikes.find(other)
    if spikes is not None:
        second = Recipe(spikes.restorer(other), (spikes.bits,))
    if first is None or second is None or _form(y) != _form(other):
        return None
    # Not the recipes themselves, whose tensors autograd alone may hold.
    compute = partial(_add, first.compute, second.compute, len(first.tensors))
    return Recipe(compute, first.tensors + second.tensors)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride()


def _add(
    first: Callable[..., Tensor], second: Callable[..., Tensor], count: int, *tensors: Tensor | None
) -> Tensor:
    return first(*tensors[:count]) + second(*tensors[count:])


class NormForward(Forward):
    """The forward of a batch norm, around that of its class, whose output has a recipe."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        norm, x = self.module, only_argument(*args, **kwargs)
        y: Any = type(norm).forward(norm, x)
        if torch.compiler.is_compiling() or not y.requires_grad or type(y) is not Tensor:
            return y
        running = not norm.training and norm.running_mean is not None
        statistics = (norm.running_mean, norm.running_var) if running else (None, None)
        compute = partial(_apply_norm, getattr(norm, "step_mode", "s") == "m", norm.eps)
        # Not a view, in which adding in place would cost a copy of the gradient.
        y.__class__ = NormOutput
        set_recipe(y, Recipe(compute, (x, *statistics, norm.weight, norm.bias)))
        return y


def _apply_norm(
    folds: bool, eps: float, x: Tensor, mean: Any, var: Any, weight: Any, bias: Any
) -> Tensor:
    flat = x.flatten(0, 1) if folds else x
    y = F.batch_norm(flat, mean, var, weight, bias, training=mean is None, eps=eps)
    return y.view(x.shape)


def recompute_sums(net: nn.Module) -> dict[str, str]:
    """Save no sum of a norm's output that a neuron reads; the paths of both."""
    paths = {module: path for path, module in net.named_modules()}
    known = {
        norm: reader
        for norm, other, reader in trace(net, is_norm).sums
        if _has_recipe(norm) and _has_recipe(other) and type(reader) in KINDS
    }
    for norm in known:
        norm.forward = NormForward(norm)
    return {paths[norm]: paths[reader] for norm, reader in known.items()}


def _has_recipe(maker: nn.Module) -> bool:
    """Whether the output of a module has a recipe, its own or its spikes' bits."""
    if isinstance(maker, _MaxPoolNd):  # of spikes
        return True
    forward = vars(maker).get("forward")
    if forward is not None and not isinstance(forward, PackingForward):
        return False
    return type(maker) in {*KINDS, *KNOWN_NORMS} - {nn.SyncBatchNorm}
