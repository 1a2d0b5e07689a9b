"""Shared by the models: checks of their inputs, reset, and the block of layer, norm and neuron."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from spikingjelly.activation_based import base, layer
from torch import Tensor, nn

from .._internal.checks import check_sizes, is_whole
from ..ops.surrogate import levels_of

Neuron = Callable[..., nn.Module]
"""Makes a SpikingJelly neuron in step mode ``"m"`` each time it is called."""


def encoder_shape(hidden_channels: int, image_size: int) -> tuple[tuple[int, ...], int]:
    """The widths of an encoder's blocks of stride 2, and the side of what is left of the image.

    The first is ``hidden_channels``; they double until 2x2 pixels or an odd side are left.

    >>> encoder_shape(32, 64), encoder_shape(16, 28)
    (((32, 64, 128, 256, 512), 2), ((16, 32), 7))
    """
    check_sizes(hidden_channels=hidden_channels, image_size=image_size)
    if image_size % 2:
        raise ValueError(f"image_size must be even, so that it can be halved, not {image_size}")
    widths, side = [hidden_channels], image_size // 2
    while side > 2 and side % 2 == 0:
        widths.append(2 * widths[-1])
        side //= 2
    return tuple(widths), side


def check_images(model: Any, x: Tensor, frames: bool = False) -> None:
    """Refuse all but images ``[N, C, H, W]`` of the model's size with values in [-1, 1].

    With ``frames`` also ``[T, N, C, H, W]``, and any finite values, as counts of events are.
    """
    shape = (model.in_channels, model.image_size, model.image_size)
    got = list(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
    if got[-3:] != [*shape] or len(got) not in ((4, 5) if frames else (4,)):
        sizes = ", ".join(map(str, shape))
        expected = f"images [N, {sizes}]" + f" or frames [T, N, {sizes}]" * frames
        raise ValueError(f"{type(model).__name__} expects {expected}, but got {got}")
    check_values(model, x, bound=math.inf if frames else 1.0)


def check_labels(labels: Any, n: int, allowed: Sequence[int], expected: str) -> Tensor:
    """The labels ``[n]``, from one for all or one for each; refuse all but ``allowed`` integers."""
    values = labels.tolist() if hasattr(labels, "tolist") else labels
    values = [*values] if isinstance(values, Iterable) else [values] * n
    fits = bool(allowed) and len(values) == n
    if not fits or not all(is_whole(label) and label in allowed for label in values):
        raise ValueError(f"{expected}, but got {labels!r:.80}")
    return torch.tensor(values, dtype=torch.long)


def check_values(module: nn.Module, x: Tensor, bound: float) -> None:
    """Refuse an input with NaN, infinite values or values beyond ``bound``.

    Not in a training step: reading a value waits for the GPU, and a loss that is not finite is an
    error there. Nor in a compiled graph, which a condition on a value would cut in two.
    """
    in_training_step = module.training and torch.is_grad_enabled()
    if in_training_step or torch.compiler.is_compiling():
        return
    if not (x.isfinite() & (x.abs() <= bound + 1e-3)).all():  # beyond what rounding adds
        low, high = x.min().item(), x.max().item()
        remedy = f" in [{-bound:g}, {bound:g}]; scale pixels from 0 to 255 by pixel / 127.5 - 1"
        raise ValueError(
            f"{type(module).__name__} got values from {low:.4g} to {high:.4g}, but expects finite "
            f"values{remedy if bound < math.inf else ''}"
        )


def reset(*nets: nn.Module) -> None:
    """Bring every neuron of ``nets`` to rest.

    A model does so before a pass, and after it: a compiled graph depends on the state it starts
    from. Not by SpikingJelly's ``reset_net``, which in 2.x remembers what it resets for all nets,
    so that a graph would depend on which nets are alive.
    """
    for net in nets:
        for module in net.modules():
            if isinstance(module, base.MemoryModule):
                module.reset()


def spiking_block(synapse: Any, neuron: Neuron, alpha: float = 1.0) -> nn.Sequential:
    """Join a convolution or linear layer with threshold-dependent batch norm and a neuron.

    The norm's statistics are over time and batch, and its gain starts at ``alpha * V_th``, so that
    currents reach the neuron at the height of its threshold (tdBN, Zheng et al. 2021, arXiv
    2011.05280).
    """
    kind = nn.BatchNorm1d if isinstance(synapse, nn.Linear) else nn.BatchNorm2d
    norm, node = kind(len(synapse.bias)), make_neuron(neuron)
    if levels_of(getattr(node, "surrogate_function", None)) > 1:
        raise ValueError(
            "a generator draws spikes, and these neurons count: take another surrogate_function"
        )
    with torch.no_grad():
        norm.weight.fill_(alpha * float(torch.as_tensor(node.v_threshold).mean()))
    # The container folds time into the batch once for both layers.
    return nn.Sequential(layer.SeqToANNContainer(synapse, norm), node)


def make_neuron(neuron: Neuron, **options: Any) -> nn.Module:
    """Make a neuron of a model; in step mode ``"s"`` it would take time for the batch."""
    if not callable(neuron) or isinstance(neuron, nn.Module):
        raise TypeError(
            "neuron must make a neuron each time it is called, as partial(ALIFNode, step_mode='m') "
            f"does, but it is {neuron!r:.80}; on the command line choose it with neuron=NAME, "
            "whose config has _partial_: true"
        )
    node = neuron(**options)
    if getattr(node, "step_mode", "m") != "m":
        raise ValueError(
            f"neuron must make neurons in step mode 'm', but {type(node).__name__} is in "
            f"{node.step_mode!r}; give it step_mode='m'"
        )
    return node
